"""Options: what is filled in, what is refused, what a run is called."""

import dataclasses
import json
import math
import pathlib

import pytest

from ekd_jax import config as configs
from ekd_jax.config import Config
from ekd_jax.errors import UserError

DIGITS = Config(dataset="digits", depth=8)


def _change(**options):
  return dataclasses.replace(DIGITS, **options)


def _refusal(**options):
  with pytest.raises(UserError) as caught:
    configs.resolve(_change(**options))
  message = str(caught.value)
  assert "\n" not in message
  return message


@pytest.mark.parametrize(
  ("dataset", "epochs"), [("cifar100", 450), ("cifar10", 350), ("digits", 40)]
)
def test_epochs_are_the_papers_unless_given(dataset, epochs):
  config = Config(dataset=dataset)
  assert configs.resolve(config).epochs == epochs
  given = dataclasses.replace(config, epochs=3)
  assert configs.resolve(given).epochs == 3


def test_ratios_have_a_default_unless_widths_are_given():
  assert configs.resolve(DIGITS).ratios == (0.5, 0.75, 0.97)
  resolved = configs.resolve(_change(widths=(1.0, 0.5)))
  assert resolved.ratios is None
  assert resolved.widths == (1.0, 0.5)


def test_paths_become_absolute(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv("HOME", str(tmp_path / "home"))
  resolved = configs.resolve(_change(run_dir="a/b", data_dir="~/data"))
  assert resolved.run_dir == str(tmp_path / "a" / "b")
  assert resolved.data_dir == str(tmp_path / "home" / "data")
  assert list(tmp_path.iterdir()) == []


def test_a_resolved_config_resolves_to_itself():
  once = configs.resolve(_change(run_dir="x", data_dir="y", seeds=(0, 1)))
  assert configs.resolve(once) == once


def test_another_training_has_another_directory_and_the_same_has_the_same():
  def name(**options):
    return pathlib.Path(configs.resolve(_change(**options)).run_dir).name

  assert name() == name() == name(with_solo=True, log_every=3, data_dir="d")
  others = {
    name(),
    name(seed=1),
    name(seeds=(0, 1)),
    name(epochs=3),
    name(ratios=(0.5,)),
    name(widths=(1.0, 0.5)),
    name(learning_rate=0.2),
  }
  assert len(others) == 7
  assert name(method="dml").startswith("digits-resnet8-dml-")


def test_json_and_back():
  config = _change(
    ratios=(0.1, 1 / 3),
    seeds=(0, 2**32 - 1),
    learning_rate=1e-5,
    learning_rate_drops=(),
  )
  values = json.loads(json.dumps(configs.to_json(config)))
  assert configs.from_json(values) == config


def test_what_is_trained_is_not_where_or_how_often_it_is_saved():
  fields = configs.training_fields(DIGITS)
  for name in ("run_dir", "data_dir", "checkpoint_minutes", "with_solo"):
    assert name not in fields
  # Nor how it is computed.
  for name in (
    *("conv", "scan", "remat"),
    *("compilation_cache", "tune_allocator"),
  ):
    assert name not in fields
  for name in ("method", "ratios", "seed", "seeds", "batch_size", "precision"):
    assert name in fields


NUMBERS = {
  "above 0": [
    "epochs",
    "train_examples",
    "batch_size",
    "evaluation_batch_size",
    "evaluate_every",
    "log_every",
    "learning_rate",
    "temperature",
    "checkpoint_minutes",
  ],
  "0 or more": [
    "validation_examples",
    "seed",
    "weight_decay",
    "label_weight",
    "feature_weight",
    "distill_weight",
    "adapter_learning_rate",
    "momentum",
  ],
}


@pytest.mark.parametrize("name", NUMBERS["above 0"])
def test_a_number_that_must_be_positive(name):
  assert configs.flag(name) in _refusal(**{name: 0})
  assert configs.flag(name) in _refusal(**{name: -1})
  configs.resolve(_change(**{name: 1}))


@pytest.mark.parametrize("name", NUMBERS["0 or more"])
def test_a_number_that_must_not_be_negative(name):
  assert configs.flag(name) in _refusal(**{name: -1})
  configs.resolve(_change(**{name: 0}))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_number_may_be_nan_or_infinite(value):
  names = [
    field.name
    for field in dataclasses.fields(Config)
    if isinstance(getattr(DIGITS, field.name), float)
  ]
  assert len(names) >= 9
  for name in names:
    assert configs.flag(name) in _refusal(**{name: value})
  for name in ("ratios", "widths", "learning_rate_drops"):
    assert configs.flag(name) in _refusal(**{name: (0.5, value)})


@pytest.mark.parametrize(
  ("options", "said"),
  [
    ({"momentum": 1.0}, "[0, 1)"),
    ({"learning_rate_drop_factor": 0.0}, "(0, 1]"),
    ({"learning_rate_drop_factor": 1.1}, "(0, 1]"),
    ({"learning_rate_drops": (0.5, 1.0)}, "(0, 1)"),
    ({"ratios": (0.5, 0.0)}, "above 0"),
    ({"ratios": (1.0,)}, "below 1"),
    ({"widths": (1.0, 0.0)}, "above 0"),
    ({"widths": (1.0, 1.2)}, "at most 1"),
    ({"widths": (0.5, 0.25)}, "must come first"),
    ({"ratios": (0.5, 0.5)}, "once"),
    ({"widths": (1.0, 1.0)}, "once"),
    ({"seeds": (1, 1)}, "once"),
    ({"seeds": (0, -1)}, "at least 0"),
    ({"seeds": (2**32,)}, "2^32"),
    ({"seed": 2**32}, "2^32"),
    ({"ratios": (0.5,), "widths": (1.0, 0.5)}, "both"),
    ({"with_solo": True, "method": "solo"}, "alone already"),
    ({"depth": 21}, "6n + 2"),
    ({"depth": 2}, "6n + 2"),
  ],
)
def test_refusals_say_what_is_allowed(options, said):
  assert said in _refusal(**options)


def test_the_nearest_word():
  assert configs.nearest("--epoch", ["--epochs", "--depth"]) == "--epochs"
  assert configs.nearest("xyz", ["--epochs", "--depth"]) is None
