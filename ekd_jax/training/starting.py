"""Where a run begins: at its first step, or after whatever ended it before.

The newest whole checkpoint says how far it got; metrics.jsonl says whether
that epoch's evaluation, which comes after the checkpoint, is still to be made.
"""

from typing import Any

import jax
import numpy as np

from ekd_jax import build, evaluation, run_directory
from ekd_jax.config import Config
from ekd_jax.data import Dataset
from ekd_jax.training import hosts
from ekd_jax.training.checkpoint import Checkpoints
from ekd_jax.training.logs import ConsoleLog
from ekd_jax.training.step import init_state


def start(
  config: Config,
  method: Any,
  dataset: Dataset,
  checkpoints: Checkpoints,
  screen: ConsoleLog,
  total_steps: int,
) -> tuple[Any, dict[str, Any], int]:
  """State, progress and step to go on from, the same in every process.

  Args:
    config: of the run.
    method: its method.
    dataset: what it trains on.
    checkpoints: those of the run directory; damaged ones are put aside.
    screen: told what it goes on from.
    total_steps: how many the whole training takes.

  Raises:
    UserError: there are checkpoints, and all are damaged.
  """
  restored = None

  def restore() -> dict[str, Any]:
    nonlocal restored
    if checkpoints.latest_step() is None:
      return {"step": None}
    restored = checkpoints.restore(build.abstract_state(config))
    return {
      "step": restored.step,
      "progress": restored.progress,
      "damaged": restored.damaged,
    }

  found = hosts.from_first(restore)
  if found["step"] is None:
    screen.say("drawing the parameters")
    return init_state(method, dataset.info, config.seed), {}, 0
  damaged = found["damaged"]
  for step, reason in damaged.items():
    screen.say(f"the checkpoint of step {step} is damaged ({reason})")
  if damaged:
    lost = max(map(int, damaged)) - found["step"]
    screen.say(f"going on from the one before: {lost} steps are made again")
    checkpoints.put_aside([int(step) for step in damaged])
  if found["step"] < total_steps:
    screen.say(f"resuming at step {found['step']} of {total_steps}")
  if restored is None:  # In another process than the first.
    target = build.abstract_state(config)
    state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), target)
  else:
    state = restored.state
  return hosts.arrays_from_first(state), found["progress"], found["step"]


def missed_evaluations(
  config: Config, dataset: Dataset, step: int, epoch_steps: int
) -> list[str]:
  """The evaluations after `step` that a stop came before."""
  epoch, rest = divmod(step, epoch_steps)
  if rest or not evaluation.is_due(config, epoch):
    return []
  done = {
    line["kind"]
    for line in run_directory.read_metrics(config.run_dir)
    if line["step"] == step
  }
  return [kind for kind in evaluation.splits(dataset) if kind not in done]
