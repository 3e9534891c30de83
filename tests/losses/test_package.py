"""The losses stand alone: light to import, with examples that run."""

import doctest
import importlib
import json
import os
import pathlib
import subprocess
import sys

import pytest

import ekd_jax
from ekd_jax import losses

PUBLIC = [
  "attention_loss",
  "attention_map",
  "distillation_loss",
  "diversity_loss",
  "ekd_loss",
  "ensemble_logits",
  "feature_loss",
  "ffl_loss",
  "mutual_learning_loss",
  "normalized_feature_loss",
  "pcl_loss",
  "ramp_up",
  "shifted_features",
]


def test_importing_the_losses_loads_no_trainer_and_no_model():
  root = pathlib.Path(ekd_jax.__file__).parents[1]
  script = "import json, sys, ekd_jax.losses; print(json.dumps([*sys.modules]))"
  result = subprocess.run(
    [sys.executable, "-c", script],
    env=os.environ | {"PYTHONPATH": str(root)},
    capture_output=True,
    text=True,
    check=True,
  )
  loaded = set(json.loads(result.stdout))
  assert {"ekd_jax.losses", "jax", "chex", "optax"} <= loaded
  heavy = {"flax", "orbax", "tensorflow", "tensorflow_datasets", "matplotlib"}
  assert not heavy & loaded
  siblings = {
    name
    for name in loaded
    if name.startswith("ekd_jax.") and not name.startswith("ekd_jax.losses")
  }
  assert not siblings


def test_the_public_names_are_the_documented_ones():
  assert sorted(losses.__all__) == PUBLIC
  assert all(callable(getattr(losses, name)) for name in PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_the_example_in_the_docstring_runs(name):
  function = getattr(losses, name)
  module = importlib.import_module(function.__module__)
  (example,) = doctest.DocTestFinder(recurse=False).find(
    function, name, module=module
  )
  assert example.examples
  assert doctest.DocTestRunner().run(example).failed == 0
