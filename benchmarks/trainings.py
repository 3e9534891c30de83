"""Trainings by the product's own command line, and what they leave behind."""

import pathlib

import jax
import numpy as np

from ekd_jax import build, run_directory
from ekd_jax.training.checkpoint import Checkpoints

EXPERIMENT = (
  pathlib.Path(__file__).resolve().parents[1]
  / "experiments"
  / "cifar100_resnet.py"
)


def final_arrays(run_dir: pathlib.Path) -> dict[str, np.ndarray]:
  """Every array of the newest checkpoint, by its path in the state."""
  config = run_directory.load_config(run_dir)
  with Checkpoints(run_dir, read_only=True) as checkpoints:
    restored = checkpoints.restore(build.abstract_state(config))
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(restored.state)
  }
