"""The two implementations are the same step, and a wrong one is noticed."""

import contextlib
import dataclasses
import json
import sys

import numpy as np
import pytest
from rich.console import Console

import check
import command_line
import timing
import train_step
import workload
from ekd_jax import config as configs
from ekd_jax import data
from ekd_jax.config import Config
from tests.reference import augment as reference

TINY = configs.resolve(
  Config(depth=8, widths=(1.0, 0.4), dataset="digits", batch_size=4)
)


@pytest.fixture(scope="module")
def pytorch_step():
  reason = "PyTorch is not installed: pip install -e '.[bench]'"
  pytest.importorskip("torch", reason=reason)
  import pytorch_step

  return pytorch_step


@pytest.fixture(scope="module")
def ours():
  import product_step

  return product_step.one_step(check.config(TINY))


def _disagreements(pytorch_step, ours, **options):
  config = dataclasses.replace(check.config(TINY), **options)
  channels = workload.stage_channels(config)
  theirs, rounded = (
    pytorch_step.one_step(config, channels, ours, dtype)
    for dtype in ("float64", "float32")
  )
  findings = check.compare(ours, theirs, rounded)
  return {f.quantity for f in findings if not f.agrees}


def test_both_take_the_same_step(pytorch_step, ours):
  assert _disagreements(pytorch_step, ours) == set()


@pytest.mark.parametrize(
  "option, value, noticed",
  [
    ("temperature", 3.0, "distill"),
    ("label_weight", 0.6, "gradient"),
    ("feature_weight", 0.2, "gradient"),
    ("distill_weight", 0.2, "gradient"),
    ("learning_rate", 0.05, "update"),
    ("momentum", 0.8, "update"),
    ("weight_decay", 0.0, "update"),
    ("adapter_learning_rate", 1.0, "update"),
  ],
)
def test_a_wrong_step_is_noticed(pytorch_step, ours, option, value, noticed):
  assert noticed in _disagreements(pytorch_step, ours, **{option: value})


def test_a_value_that_is_not_finite_is_noticed(ours):
  path = "stem/conv/kernel"
  gradients = ours["gradients"] | {path: np.nan * ours["gradients"][path]}
  findings = check.compare(ours, {**ours, "gradients": gradients}, ours)
  (broken,) = [f for f in findings if not f.agrees]
  assert (broken.quantity, broken.where) == ("gradient", path)


@pytest.mark.parametrize(
  ("ours", "pytorch", "agrees"),
  [
    # Nothing but rounding, in a network that takes it well.
    ({}, {}, True),
    ({7: 0.019}, {}, True),
    ({7: 0.021}, {}, False),
    ({7: 0.19}, {3: 0.05}, True),
    # One that does not: a single tensor says nothing, some of them do.
    ({7: 0.9}, {3: 0.13}, True),
    ({n: 0.9 for n in range(6)}, {3: 0.13}, False),
    ({n: 0.9 for n in range(6)}, {n: 0.3 for n in range(6)}, True),
    ({n: 0.01 for n in range(101)}, {}, False),
    ({n: 0.01 for n in range(101)}, {n: 0.004 for n in range(101)}, True),
    ({7: np.nan}, {3: 0.13}, False),
  ],
)
def test_what_rounding_cannot_do_is_noticed(ours, pytorch, agrees):
  """200 gradients, nearly all right: which of the others are let pass?"""

  def step(differences):
    gradients = {
      f"tensor_{n}": np.array([1.0, -2.0 * (1 + differences.get(n, 1e-6))])
      for n in range(200)
    }
    same = dict.fromkeys(gradients, np.ones(2))
    return {
      "metrics": {},
      "params": same,
      "new_params": {name: 2 * value for name, value in same.items()},
      "gradients": gradients,
      "batch_stats": {"norm/mean": np.ones(2)},
      "new_batch_stats": {"norm/mean": np.ones(2)},
    }

  exact = dict.fromkeys(range(200), 0.0)
  findings = check.compare(step(ours), step(exact), step(pytorch))
  (gradient,) = [f for f in findings if f.quantity == "gradient"]
  assert gradient.agrees is agrees
  assert all(f.agrees for f in findings if f is not gradient)


def test_pytorch_crops_and_flips(pytorch_step):
  import torch

  info = dataclasses.replace(data.info("digits"), flip=True)
  images = workload.examples(TINY)["image"]
  found = pytorch_step.augment(torch.from_numpy(images), info).numpy()
  sides = range(2 * info.crop_padding + 1)
  choices = [(r, c, flip) for r in sides for c in sides for flip in (0, 1)]
  seen = set()
  for image, result in zip(images, found, strict=True):
    matches = [
      (r, c, flip)
      for r, c, flip in choices
      if np.allclose(
        reference.normalize(
          reference.crop_and_flip(image, (r, c), flip, info.crop_padding),
          info.mean,
          info.std,
        ),
        result.transpose(1, 2, 0),
        atol=1e-5,
      )
    ]
    assert len(matches) == 1
    seen.update(matches)
  assert len(seen) > len(choices) / 2


def test_a_failed_check_ends_the_run(monkeypatch, capsys):
  wrong = check.Finding(
    "distill",
    "distill/student_1",
    check.Spread(0.04, 0.04, 0.03),
    check.Spread(0.0, 0.0, 0.0),
    count=2,
    agrees=False,
  )
  monkeypatch.setattr(check, "run", lambda config: [wrong])
  monkeypatch.setattr(workload, "require_pytorch", lambda command: None)
  with pytest.raises(SystemExit) as caught:
    _main("--check", "--case", "resnet20x5")
  assert caught.value.code == 1
  assert capsys.readouterr().err == (
    "error: the two steps are not the same: resnet20x5 distill (4.0e-02 at "
    "distill/student_1)\n"
  )


@pytest.mark.parametrize(
  "arguments, message",
  [
    (
      ["--against", "eager"],
      "benchmarks/train_step.py needs PyTorch: pip install -e '.[bench]'",
    ),
    (
      ["--against", "solo", "--check"],
      "benchmarks/train_step.py needs PyTorch: pip install -e '.[bench]'",
    ),
    (
      ["--against", "solo,lazy"],
      "--against lazy is not possible: choose of eager,channels_last,compile,"
      "solo_each,solo,dml",
    ),
    (["--pairs", "0"], "--pairs is 0: at least 1"),
    (
      ["--case", "resnet21"],
      "--case resnet21 is not possible: choose one of resnet20x5, "
      "resnet110x4, all",
    ),
    (["--pair", "3"], "--pair is not a known option: did you mean --pairs?"),
    (
      ["--no-tune-alocator"],
      "--no-tune-alocator is not a known option: did you mean "
      "--no-tune-allocator?",
    ),
  ],
)
def test_mistakes_are_one_line(monkeypatch, capsys, arguments, message):
  monkeypatch.setitem(sys.modules, "torch", None)  # As if not installed.
  with pytest.raises(SystemExit) as caught:
    _main(*arguments)
  assert caught.value.code == 2
  assert capsys.readouterr().err == f"error: {message}\n"


def test_without_a_compiler_that_row_is_skipped(monkeypatch, capsys, tmp_path):
  monkeypatch.setattr(workload, "compiler", lambda: None)
  monkeypatch.setattr(workload, "require_pytorch", lambda command: None)
  monkeypatch.setattr(
    timing, "worker", lambda prepare, **more: contextlib.nullcontext(prepare)
  )
  monkeypatch.setattr(
    timing, "alternate", lambda a, b, pairs, steps: [timing.Pair(1.0, 2.0)]
  )
  records = tmp_path / "records.json"
  _main("--case", "resnet20x5", "--json", str(records))
  assert "skipped: no compiler" in capsys.readouterr().out
  opponents = [record["b"] for record in json.loads(records.read_text())]
  assert opponents == ["eager", "channels_last", "solo_each", "solo", "dml"]


def test_an_opponent_that_never_gets_ready_is_skipped(monkeypatch, capsys):
  @contextlib.contextmanager
  def worker(prepare, *, patience=None):
    if patience is not None:
      raise timing.PatienceError("not ready after 400 s")
    yield prepare

  monkeypatch.setattr(workload, "require_pytorch", lambda command: None)
  monkeypatch.setattr(timing, "worker", worker)
  _main("--case", "resnet20x5", "--against", "channels_last")
  assert "skipped: not ready after 400 s" in capsys.readouterr().out


@pytest.mark.slow
def test_whole_runs(monkeypatch, pytorch_step, tmp_path):
  monkeypatch.setattr(workload, "CASES", {"tiny": TINY})
  records = tmp_path / "records.json"
  options = train_step.Options(
    against="eager,channels_last,solo_each,solo,dml",
    pairs=1,
    steps=1,
    check=True,
    json=str(records),
  )
  train_step.run(options, Console())
  assert len(json.loads(records.read_text())) == 5


def _main(*arguments):
  command_line.main(train_step.Options, train_step.run, arguments)
