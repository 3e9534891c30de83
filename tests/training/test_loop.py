"""The loop: what it writes, when it stops, and that a kill costs nothing.

These tests train a tiny method (see tests/tiny.py) in this process;
test_resume.py kills and resumes real runs.
"""

import itertools
import pathlib
import shutil

import jax
import numpy as np
import pytest

from ekd_jax import build, run_directory
from ekd_jax.errors import NonFiniteError, UserError
from ekd_jax.training import loop, parallel
from ekd_jax.training.checkpoint import Checkpoints
from ekd_jax.training.logs import ConsoleLog, MetricsLog
from tests import runs, tiny

STEPS = 2 * tiny.STEPS_PER_EPOCH


class Killed(BaseException):
  """Not an Exception, so that nothing but a test catches it."""


@pytest.fixture(autouse=True)
def tiny_method(monkeypatch):
  monkeypatch.setattr(build, "method", tiny.method)


def _metrics(run_dir, kind=None):
  return [
    line
    for line in run_directory.read_metrics(run_dir)
    if kind in (None, line["kind"])
  ]


def _kept(run_dir):
  return sorted(int(path.name) for path in (run_dir / "checkpoints").iterdir())


def _kill(monkeypatch, owner, name, *, call):
  """The `call`-th call of owner.name raises `Killed` instead."""
  original = getattr(owner, name)
  calls = itertools.count(1)

  def method(*args, **options):
    if next(calls) == call:
      raise Killed
    return original(*args, **options)

  monkeypatch.setattr(owner, name, method)


def _finish(config):
  """Trains to the end and sums up, as the command line does."""
  shown = tiny.train(config)
  run_dir = pathlib.Path(config.run_dir)
  run_directory.write_summary(run_dir)
  return shown


# What a run writes.


def test_lines_come_in_the_order_in_which_things_happened(tmp_path):
  tiny.train(tiny.config(tmp_path, log_every=2))
  assert [(m["kind"], m["epoch"], m["step"]) for m in _metrics(tmp_path)] == [
    ("step", 1, 2),
    ("epoch", 1, 3),
    ("test", 1, 3),
    ("step", 2, 4),
    ("step", 2, 6),
    ("epoch", 2, 6),
    ("test", 2, 6),
  ]


def test_an_epoch_line_holds_the_means_of_its_steps(tmp_path):
  tiny.train(tiny.config(tmp_path))
  steps, epochs = _metrics(tmp_path, "step"), _metrics(tmp_path, "epoch")
  assert len(steps) == STEPS
  for number, line in enumerate(epochs):
    own = [s for s in steps if s["epoch"] == number + 1]
    assert len(own) == tiny.STEPS_PER_EPOCH
    for name in line.keys() - {"kind", "epoch", "step", "learning_rate"}:
      assert line[name] == pytest.approx(np.mean([s[name] for s in own]))


def test_the_learning_rate_is_the_one_each_step_was_made_with(tmp_path):
  tiny.train(
    tiny.config(tmp_path, learning_rate=0.02, learning_rate_drops=(0.5,))
  )
  rates = [line["learning_rate"] for line in _metrics(tmp_path, "step")]
  assert rates == pytest.approx([0.02, 0.02, 0.02, 0.002, 0.002, 0.002])


def test_the_last_epoch_is_tested_whatever_lies_between(tmp_path):
  tiny.train(tiny.config(tmp_path, epochs=3, evaluate_every=2))
  tested = _metrics(tmp_path, "test")
  assert [line["epoch"] for line in tested] == [2, 3]
  assert all(line["examples"] == 360 for line in tested)


def test_training_learns(tmp_path):
  tiny.train(
    tiny.config(tmp_path, train_examples=1437, epochs=4, log_every=100)
  )
  # A linear model on pixels: far above the 10 % of guessing.
  assert _metrics(tmp_path, "test")[-1]["top1/ensemble"] > 70


def test_checkpoints_are_saved_at_the_end_of_epochs(tmp_path):
  tiny.train(tiny.config(tmp_path))
  assert _kept(tmp_path) == [3, 6]


def test_checkpoints_are_saved_when_minutes_have_passed(tmp_path):
  tiny.train(tiny.config(tmp_path, checkpoint_minutes=tiny.ALWAYS))
  assert _kept(tmp_path) == [5, 6]


def test_every_start_is_on_record(tmp_path):
  config = tiny.config(tmp_path)
  tiny.train(config)
  tiny.train(config)
  commands = (tmp_path / "command.txt").read_text().splitlines()
  assert [command.split()[1:] for command in commands] == 2 * [["train"]]
  starts = run_directory.read_json(tmp_path / "environment.json")["starts"]
  assert len(starts) == 2
  assert starts[0]["versions"]["jax"] == jax.__version__
  assert len(starts[0]["devices"]) == 4


def test_a_pipe_gets_a_line_before_compiling_and_one_per_epoch(tmp_path):
  lines = tiny.train(tiny.config(tmp_path)).splitlines()
  assert lines[0] == "tiny: drawing the parameters"
  assert lines[1].startswith("tiny: compiling, about ")
  assert [line[:15] for line in lines[2:4]] == [
    "tiny: epoch 1/2", "tiny: epoch 2/2",
  ]  # fmt: skip


def test_held_out_examples_are_scored_beside_the_test_set(tmp_path):
  config = tiny.config(tmp_path, validation_examples=40, epochs=4)
  _finish(config)
  lines = _metrics(tmp_path, "validation")
  assert [line["epoch"] for line in lines] == [1, 2, 3, 4]
  assert all(line["examples"] == 40 for line in lines)
  scores = [line["top1/ensemble"] for line in lines]
  best = 1 + scores.index(max(scores))
  assert best * tiny.STEPS_PER_EPOCH in _kept(tmp_path)
  of_best = _metrics(tmp_path, "test")[best - 1]
  summary = run_directory.read_json(tmp_path / "summary.json")
  assert summary["ensemble"]["best_top1"] == of_best["top1/ensemble"]


# One program for all steps, one for all evaluations.


def test_a_run_compiles_its_step_once_and_its_evaluation_once(
  tmp_path, monkeypatch, compilations
):
  mapped = parallel.per_device
  compiled = {}

  def per_device(function, *args, **options):
    program = mapped(function, *args, **options)

    def counted(*arguments):
      before = len(compilations)
      result = program(*arguments)
      own = compiled.setdefault(function.__name__, [])
      own.append(len(compilations) - before)
      return result

    return counted

  monkeypatch.setattr(parallel, "per_device", per_device)
  config = tiny.config(
    tmp_path, epochs=3, evaluation_batch_size=100,
    checkpoint_minutes=tiny.ALWAYS,
  )  # fmt: skip
  tiny.train(config)
  assert compiled["train_step"] == [1] + 8 * [0]
  # 360 images are four batches of 100, three times.
  assert compiled["sums_of_batch"] == [1] + 11 * [0]
  assert set(compiled) == {"train_step", "sums_of_batch"}


def test_a_second_shape_would_be_counted(compilations):
  # That the test above can fail.
  devices = jax.devices()
  program = parallel.per_device(lambda x: x * 2, devices)
  for length in (3, 3, 4):
    program(parallel.replicate(np.ones(length, np.float32), devices))
  assert len(compilations) == 2


# Killed and resumed.


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
  """{validation examples: run that nothing interrupted}."""
  runs_of = {}
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(build, "method", tiny.method)
    for held_out in (0, 40):
      run_dir = tmp_path_factory.mktemp("unbroken")
      _finish(tiny.config(run_dir, validation_examples=held_out))
      runs_of[held_out] = run_dir
  return runs_of


def test_a_run_killed_at_every_step_ends_like_an_unbroken_one(
  tmp_path, monkeypatch, unbroken
):
  config = tiny.config(
    tmp_path, validation_examples=40, checkpoint_minutes=tiny.ALWAYS
  )
  for step in range(1, STEPS + 1):
    with monkeypatch.context() as patch, pytest.raises(Killed):
      # The second step of each start is shown but never saved.
      _kill(patch, ConsoleLog, "step", call=1 if step == 1 else 2)
      tiny.train(config)
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
      assert (checkpoints.latest_step() or 0) == step - 1
    # A line that the kill cut off.
    with open(tmp_path / "metrics.jsonl", "a") as file:
      file.write('{"kind": "step", "epo')
  shown = _finish(config)
  assert f"resuming at step {STEPS - 1} of {STEPS}" in shown
  runs.assert_same_result(tmp_path, unbroken[40])


@pytest.mark.parametrize(
  ("owner", "name", "call", "saved"),
  [
    # In the middle of the second epoch.
    (ConsoleLog, "step", 5, 3),
    # Between an epoch's last step and its means.
    (ConsoleLog, "step", 3, None),
    # Between an epoch's means and its checkpoint.
    (Checkpoints, "save", 1, None),
    (Checkpoints, "save", 2, 3),
    # Between a checkpoint and what its evaluation gave.
    (MetricsLog, "write", 5, 3),
    (MetricsLog, "write", 10, 6),
    # When everything is done but said.
    (Checkpoints, "wait", 3, 6),
  ],
)
def test_a_kill_between_two_things_that_belong_together(
  owner, name, call, saved, tmp_path, monkeypatch, unbroken
):
  config = tiny.config(tmp_path)
  with monkeypatch.context() as patch, pytest.raises(Killed):
    _kill(patch, owner, name, call=call)
    tiny.train(config)
  with Checkpoints(tmp_path, read_only=True) as checkpoints:
    assert checkpoints.latest_step() == saved
  _finish(config)
  runs.assert_same_result(tmp_path, unbroken[0])


def test_means_are_of_the_whole_epoch_after_a_resume_within_it(
  tmp_path, monkeypatch, unbroken
):
  config = tiny.config(tmp_path, checkpoint_minutes=tiny.ALWAYS)
  with monkeypatch.context() as patch, pytest.raises(Killed):
    _kill(patch, ConsoleLog, "step", call=6)
    tiny.train(config)
  tiny.train(config)
  _, mean = _metrics(tmp_path, "epoch")
  steps = [s["loss"] for s in _metrics(tmp_path, "step") if s["epoch"] == 2]
  assert len(steps) == 3
  assert mean["loss"] == pytest.approx(sum(steps) / 3)
  assert mean == _metrics(unbroken[0], "epoch")[1]


def test_how_often_it_was_saved_does_not_matter(tmp_path, unbroken):
  _finish(tiny.config(tmp_path, checkpoint_minutes=tiny.ALWAYS))
  runs.assert_same_result(tmp_path, unbroken[0])


def test_another_seed_gives_another_run(tmp_path, unbroken):
  tiny.train(tiny.config(tmp_path, seed=1))
  other, own = _metrics(unbroken[0], "step"), _metrics(tmp_path, "step")
  assert all(a["loss"] != b["loss"] for a, b in zip(own, other, strict=True))


def test_a_complete_run_is_not_trained_again(tmp_path, monkeypatch, unbroken):
  run_dir = tmp_path / "run"
  shutil.copytree(unbroken[0], run_dir)
  before = runs.contents(run_dir / "checkpoints")

  def refuse(*args, **options):
    raise AssertionError("a step was built")

  monkeypatch.setattr(loop, "make_train_step", refuse)
  assert "finished before, at step 6" in _finish(tiny.config(run_dir))
  assert runs.contents(run_dir / "checkpoints") == before
  runs.assert_same_result(run_dir, unbroken[0])


# Runs that go wrong.


def _broken_at(step, breaks):
  """The tiny method; `breaks` (state, metrics) -> the same, at `step`."""

  def method(config, total_steps):
    inner = tiny.method(config, total_steps)

    def init(rng, batch):
      return {"inner": inner.init(rng, batch), "count": np.zeros((), np.int32)}

    def train_step(state, batch, rng):
      after, metrics = inner.train_step(state["inner"], batch, rng)
      count = state["count"] + 1
      broken = breaks(after, metrics)
      after, metrics = jax.tree.map(
        lambda bad, good: jax.numpy.where(count == step, bad, good),
        broken,
        (after, metrics),
      )
      return {"inner": after, "count": count}, metrics

    return inner._replace(
      init=init,
      train_step=train_step,
      predict=lambda state, images: inner.predict(state["inner"], images),
    )

  return method


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_loss_that_is_not_finite_stops_the_run(value, tmp_path, monkeypatch):
  def breaks(state, metrics):
    return state, metrics | {"label/student_1": value}

  monkeypatch.setattr(build, "method", _broken_at(5, breaks))
  config = tiny.config(tmp_path, checkpoint_minutes=tiny.ALWAYS)
  with pytest.raises(NonFiniteError) as caught:
    tiny.train(config)
  message = str(caught.value)
  assert "step 5" in message
  assert "label/student_1" in message
  assert "student_0" not in message
  assert "the checkpoint of step 4 is kept" in message
  assert "\n" not in message
  assert isinstance(caught.value, UserError)
  # The last good checkpoint is kept, and no number after it.
  assert _kept(tmp_path) == [3, 4]
  assert _metrics(tmp_path)[-1]["step"] == 4


def test_a_non_finite_state_under_a_finite_loss_is_never_saved(
  tmp_path, monkeypatch
):
  def breaks(state, metrics):
    kernel = state["params"]["student_1"]["kernel"]
    spoilt = kernel.at[3, 4].set(np.nan)
    params = state["params"] | {
      "student_1": state["params"]["student_1"] | {"kernel": spoilt}
    }
    return state | {"params": params}, metrics

  monkeypatch.setattr(build, "method", _broken_at(4, breaks))
  config = tiny.config(tmp_path, checkpoint_minutes=tiny.ALWAYS)
  with pytest.raises(NonFiniteError, match="step 4.*student_1") as caught:
    tiny.train(config)
  assert "\n" not in str(caught.value)
  assert _kept(tmp_path) == [2, 3]


def test_a_run_that_diverged_ends_in_the_same_message_again(
  tmp_path, monkeypatch
):
  config = tiny.config(tmp_path, learning_rate=1e30)
  messages = []
  for _ in range(2):
    with pytest.raises(NonFiniteError) as caught:
      tiny.train(config)
    messages.append(str(caught.value))
  assert messages[0] == messages[1]
  assert "--learning-rate" in messages[0]
  assert "no checkpoint yet" in messages[0]


def _with_ensemble(choose):
  """The tiny method, its ensemble chosen by {name: logits} -> logits."""

  def method(config, total_steps):
    inner = tiny.method(config, total_steps)

    def predict(state, images):
      outputs = inner.predict(state, images)
      return outputs | {"ensemble": choose(outputs)}

    return inner._replace(predict=predict)

  return method


def test_an_ensemble_worse_than_its_best_member_is_warned_of(
  tmp_path, monkeypatch
):
  worst = _with_ensemble(lambda outputs: -outputs["ensemble"])
  monkeypatch.setattr(build, "method", worst)
  shown = tiny.train(tiny.config(tmp_path))
  (warning,) = [line for line in shown.splitlines() if "warning" in line]
  last = _metrics(tmp_path, "test")[-1]
  best = max(("student_0", "student_1"), key=lambda n: last[f"top1/{n}"])
  assert f"ensemble ({last['top1/ensemble']:.2f} %)" in warning
  assert f"{best} ({last[f'top1/{best}']:.2f} %)" in warning
  assert shown.splitlines()[-1] == warning


def test_an_ensemble_as_good_as_its_best_member_is_not(tmp_path, monkeypatch):
  # Every member answers as student_0 does.
  def method(config, total_steps):
    inner = tiny.method(config, total_steps)

    def predict(state, images):
      outputs = inner.predict(state, images)
      return dict.fromkeys(outputs, outputs["student_0"])

    return inner._replace(predict=predict)

  monkeypatch.setattr(build, "method", method)
  assert "warning" not in tiny.train(tiny.config(tmp_path))
