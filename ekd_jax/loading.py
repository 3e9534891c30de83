"""Finished runs from Python: their students, and the whole of them."""

import dataclasses
import os
from typing import Any, NamedTuple

import flax.linen as nn
import jax

from ekd_jax import build, evaluation, run_directory
from ekd_jax.config import Config
from ekd_jax.data import stream
from ekd_jax.errors import UserError
from ekd_jax.methods import Method, Student
from ekd_jax.training import feeding, parallel
from ekd_jax.training.checkpoint import Checkpoints


class Run(NamedTuple):
  """A run, as its newest checkpoint has it.

  Attributes:
    config: its options.
    method: what was trained; `method.predict(state, images)` gives the logits
      of every member and of the ensemble.
    state: the method's state, as NumPy arrays.
    students: {name: Student}, each with its module and variables.
    step: optimizer steps done.
    metrics: the lines of metrics.jsonl.
    summary: the result, in the shape of summary.json.
  """

  config: Config
  method: Method
  state: Any
  students: dict[str, Student]
  step: int
  metrics: list[dict[str, Any]]
  summary: dict[str, Any]


def load_run(run_dir: str | os.PathLike) -> Run:
  """Loads a run from its newest checkpoint.

  Args:
    run_dir: the run directory of a single training: of several seeds, that
      of one of them.

  Raises:
    UserError: there is no run or no checkpoint.
  """
  config = run_directory.load_config(run_dir)
  if config.seeds is not None:
    raise UserError(
      f"{run_dir} holds one run per seed: name one of them, such as "
      f"{run_directory.seed_directory(run_dir, config.seeds[0])}"
    )
  with Checkpoints(run_dir, read_only=True) as checkpoints:
    restored = checkpoints.restore(build.abstract_state(config))
  for step, reason in restored.damaged.items():
    raise UserError(
      f"{run_dir}: the checkpoint of step {step} is damaged ({reason}): the "
      f"training command goes on from step {restored.step} and makes it again"
    )
  state = restored.state
  # The schedule's length does not matter to a method that only predicts.
  method = build.method(config, total_steps=1)
  return Run(
    config,
    method,
    state["method"],
    method.students(state["method"]),
    int(state["step"]),
    run_directory.read_metrics(run_dir),
    run_directory.summarize(run_dir),
  )


def load_student(
  run_dir: str | os.PathLike, name: str
) -> tuple[nn.Module, dict[str, Any]]:
  """Loads one student of a run, ready to be used alone.

  `module.apply(variables, images).logits` classifies normalised images
  [N, H, W, C]; see `data.info(dataset)` for the mean and std to normalise
  with.

  Args:
    run_dir: see `load_run`.
    name: "student_0" is the full network.

  Returns:
    An ordinary Linen module and its variables.

  Raises:
    UserError: there is no such run or student.
  """
  students = load_run(run_dir).students
  if name not in students:
    raise UserError(
      f"{run_dir} has no {name}: choose one of {', '.join(students)}"
    )
  return students[name]


def evaluate(run: Run, *, data_dir: str | None = None) -> dict[str, float]:
  """Scores a run's newest checkpoint on the whole test set.

  Args:
    run: see `load_run`.
    data_dir: where the data is, if it has moved since the training.

  Returns:
    What `evaluation.make_evaluate` returns.

  Raises:
    UserError: the data is not there any more.
  """
  config = run.config
  if data_dir is not None:
    config = dataclasses.replace(config, data_dir=data_dir)
  dataset = build.load_data(dataclasses.replace(config, download=False))
  devices = jax.devices()
  test = evaluation.splits(dataset)["test"]
  broken = stream.Broken(skip=config.skip_broken)
  score = feeding.evaluator(
    config, dataset.info, test, run.method, devices, broken
  )
  return score(parallel.replicate(run.state, devices))
