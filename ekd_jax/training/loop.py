"""The training loop: one run, from a config to a summary.

Resuming is the same path as starting: the state of step 0 is built from the
seed, a newer one is restored over it if there is a checkpoint, and the loop
goes on from its step. Everything random is a function of the roots in the
state and the step's number, so nothing else has a position to restore.
"""

import collections
import math
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from ekd_jax import build, run_directory
from ekd_jax.config import Config
from ekd_jax.data import Dataset, epoch_order
from ekd_jax.errors import UserError
from ekd_jax.evaluation import make_evaluate
from ekd_jax.training import parallel
from ekd_jax.training.checkpoint import Checkpoints
from ekd_jax.training.logs import ConsoleLog, MetricsLog
from ekd_jax.training.step import init_state, make_train_step


class NonFiniteError(UserError):
  """A loss became NaN or infinite; names the step, the term and the member.

  The recipe is at fault, not the code: like every `UserError` it is told in
  one line.
  """


def check_devices(config: Config) -> None:
  """Refuses what the devices of this machine cannot run.

  Raises:
    UserError: a batch that does not divide by the devices, naming the nearest
      sizes that do; a formulation that is not for them.
  """
  platform = jax.default_backend()
  if config.conv == "split" and platform != "cpu":
    raise UserError(
      f"--conv is split, which is for CPUs, and the devices are {platform}: "
      "use auto or lax"
    )
  size, devices = config.batch_size, jax.device_count()
  lower = size // devices * devices
  if lower != size:
    sizes = f"{lower} or {lower + devices}" if lower else f"{devices}"
    raise UserError(
      f"--batch-size is {size}, which does not divide by the {devices} "
      f"devices: use {sizes}"
    )


def train(
  config: Config,
  dataset: Dataset,
  *,
  argv: Sequence[str],
  console: Console,
  title: str,
) -> None:
  """Trains to the last epoch, from the newest checkpoint if there is one.

  Args:
    config: a resolved config that passed `check_devices`.
    dataset: already restricted to the examples that the config asks for.
    argv: the command line, for the record.
    console: where progress is shown.
    title: what progress lines start with.

  Raises:
    NonFiniteError: a loss became NaN or infinite. The last good checkpoint is
      kept.
  """
  run_dir = pathlib.Path(config.run_dir)
  devices = jax.devices()
  # Whole batches only: the last incomplete one of an epoch is dropped.
  epoch_steps = len(dataset.train_labels) // config.batch_size
  total_steps = config.epochs * epoch_steps
  run_directory.open_run(run_dir, config, argv)
  method = build.method(config, total_steps)

  with (
    Checkpoints(run_dir) as checkpoints,
    ConsoleLog(console, title, total_steps) as screen,
  ):
    started = checkpoints.latest_step()
    if started == total_steps:
      screen.say(f"finished before, at step {total_steps}")
      return
    if started is None:
      screen.say("drawing the parameters")
      state = init_state(method, dataset.info, config.seed)
      progress = _no_progress()
      started = 0
    else:
      screen.say(f"resuming at step {started} of {total_steps}")
      state, progress = checkpoints.restore(build.abstract_state(config))
    order_key = jax.random.wrap_key_data(np.asarray(state["keys"]["order"]))
    log = MetricsLog(run_dir, resumed_step=started)
    try:
      _run_epochs(
        config,
        dataset,
        method,
        parallel.replicate(state, devices),
        progress,
        order_key=order_key,
        steps=range(started, total_steps),
        epoch_steps=epoch_steps,
        devices=devices,
        checkpoints=checkpoints,
        log=log,
        screen=screen,
      )
    finally:
      log.close()


def _run_epochs(
  config: Config,
  dataset: Dataset,
  method: Any,
  state: Any,
  progress: dict[str, Any],
  *,
  order_key: jax.Array,
  steps: range,
  epoch_steps: int,
  devices: Sequence[jax.Device],
  checkpoints: Checkpoints,
  log: MetricsLog,
  screen: ConsoleLog,
) -> None:
  train_step = parallel.per_device(
    make_train_step(
      method,
      dataset.info,
      batch_size=config.batch_size,
      steps_per_epoch=epoch_steps,
    ),
    devices,
    donate_argnums=(0,),
  )
  examples = parallel.replicate(
    {"image": dataset.train_images, "label": dataset.train_labels}, devices
  )
  evaluators = _evaluators(config, dataset, method, devices)
  # Evaluated once, here: a call per step would wait for the device.
  rates = np.asarray(
    jax.vmap(build.schedule(config, steps.stop))(jnp.arange(steps.stop))
  )
  last_save = time.monotonic()
  order = None
  pending = collections.deque()

  def record(step: int, metrics: Any) -> None:
    """Fetches and logs the metrics of a step that was dispatched before."""
    nonlocal progress
    values = {k: float(v) for k, v in parallel.unreplicate(metrics).items()}
    _check_finite(step, values, checkpoints)
    progress = _add(progress, values)
    epoch = -(-step // epoch_steps)
    rate = {"learning_rate": float(rates[step - 1])}
    if step % config.log_every == 0:
      log.write("step", epoch=epoch, step=step, values=rate | values)
    if step % epoch_steps == 0:
      means = _means(progress)
      progress = _no_progress()
      log.write("epoch", epoch=epoch, step=step, values=rate | means)
    screen.step(
      epoch=epoch,
      epochs=config.epochs,
      step=step,
      images=config.batch_size,
      loss=values["loss"],
    )

  screen.say(_compiling_line(config))
  for done in steps:
    epoch = done // epoch_steps
    if order is None or done % epoch_steps == 0:
      order = parallel.replicate(
        epoch_order(order_key, epoch, len(dataset.train_images)), devices
      )
    state, metrics = train_step(state, examples, order)
    pending.append((done + 1, metrics))
    while len(pending) > parallel.programs_ahead():
      record(*pending.popleft())

    ends_epoch = (done + 1) % epoch_steps == 0
    save_due = time.monotonic() - last_save >= 60 * config.checkpoint_minutes
    if not (ends_epoch or save_due):
      continue
    while pending:
      record(*pending.popleft())
    paused = time.monotonic()
    scores = {}
    is_last = done + 1 == steps.stop
    if ends_epoch and (is_last or (epoch + 1) % config.evaluate_every == 0):
      for kind, evaluate in evaluators.items():
        scores[kind] = evaluate(state["method"])
        log.write(kind, epoch=epoch + 1, step=done + 1, values=scores[kind])
      screen.epoch(epoch=epoch + 1, epochs=config.epochs, scores=scores["test"])
    host_state = parallel.unreplicate(state)
    _check_finite_state(done + 1, host_state, checkpoints)
    checkpoints.save(
      done + 1,
      host_state,
      progress,
      validation_top1=scores.get("validation", {}).get("top1/ensemble"),
    )
    last_save = time.monotonic()
    screen.pause(last_save - paused)
    if is_last:
      checkpoints.wait()
      _warn_of_weak_ensemble(config, screen, scores["test"])


def _evaluators(
  config: Config, dataset: Dataset, method: Any, devices: Sequence[jax.Device]
) -> dict[str, Any]:
  splits = {"test": (dataset.test_images, dataset.test_labels)}
  if len(dataset.validation_images):
    splits["validation"] = (
      dataset.validation_images,
      dataset.validation_labels,
    )
  return {
    kind: make_evaluate(
      method,
      dataset.info,
      images,
      labels,
      batch_size=config.evaluation_batch_size,
      devices=devices,
    )
    for kind, (images, labels) in splits.items()
  }


def _compiling_line(config: Config) -> str:
  # XLA's time grows with the number of layers over all members.
  layers = config.depth * len(build.members(config))
  return f"compiling, about {5 + 0.15 * layers:.0f} s"


def _check_finite(
  step: int, values: dict[str, float], checkpoints: Checkpoints
) -> None:
  broken = sorted(k for k, v in values.items() if not math.isfinite(v))
  if broken:
    raise _non_finite(step, ", ".join(broken), checkpoints)


def _check_finite_state(
  step: int, state: Any, checkpoints: Checkpoints
) -> None:
  # A gradient can overflow under a finite loss: the next loss would show it,
  # but this checkpoint would already be spoilt.
  for path, leaf in jax.tree_util.tree_leaves_with_path(state):
    if leaf.dtype.kind == "f" and not np.isfinite(leaf).all():
      name = jax.tree_util.keystr(path, simple=True, separator="/")
      raise _non_finite(step, name, checkpoints)


def _non_finite(
  step: int, what: str, checkpoints: Checkpoints
) -> NonFiniteError:
  last = checkpoints.latest_step()
  kept = "there is no checkpoint yet"
  if last is not None:
    kept = f"the checkpoint of step {last} is kept"
  return NonFiniteError(
    f"step {step}: {what} is not finite; {kept}. A lower --learning-rate, in "
    "another --run-dir, usually helps"
  )


def _warn_of_weak_ensemble(
  config: Config, screen: ConsoleLog, scores: dict[str, float]
) -> None:
  members = {
    name.removeprefix("top1/"): value
    for name, value in scores.items()
    if name.startswith("top1/") and name != "top1/ensemble"
  }
  best = max(members, key=members.get)
  if scores["top1/ensemble"] < members[best]:
    teacher = (
      ": as a teacher it holds that member back"
      if config.method == "ekd"
      else ""
    )
    screen.say(
      f"warning: the ensemble ({scores['top1/ensemble']:.2f} %) is worse than "
      f"its best member, {best} ({members[best]:.2f} %){teacher}"
    )


# Means over the steps of the current epoch. Kept on the host in float64 and
# saved with every checkpoint, so that a resumed epoch has the same means.


def _no_progress() -> dict[str, Any]:
  return {"steps": 0, "sums": {}}


def _add(progress: dict[str, Any], values: dict[str, float]) -> dict[str, Any]:
  sums = progress["sums"]
  return {
    "steps": progress["steps"] + 1,
    "sums": {name: sums.get(name, 0.0) + v for name, v in values.items()},
  }


def _means(progress: dict[str, Any]) -> dict[str, float]:
  return {k: v / progress["steps"] for k, v in progress["sums"].items()}
