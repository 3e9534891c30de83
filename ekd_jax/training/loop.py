"""The training loop: one run, from a config to a summary.

Resuming is the same path as starting: the state of step 0 is built from the
seed, a newer one is restored over it if there is a checkpoint, and the loop
goes on from its step. Everything random is a function of the roots in the
state and the step's number, so nothing else has a position to restore.
"""

import collections
import contextlib
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from ekd_jax import build, evaluation, run_directory
from ekd_jax.config import Config
from ekd_jax.data import Dataset, LargeDataset, stream
from ekd_jax.errors import UserError
from ekd_jax.training import feeding, finite, hosts, parallel, starting
from ekd_jax.training.checkpoint import Checkpoints
from ekd_jax.training.logs import ConsoleLog, MetricsLog
from ekd_jax.training.step import STOP, make_stream_step, make_train_step
from ekd_jax.training.stopping import StopRequest


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
  parts = devices * config.accumulate
  lower = size // parts * parts
  if lower != size:
    sizes = f"{lower} or {lower + parts}" if lower else f"{parts}"
    each = f" times {config.accumulate} micro-batches"
    raise UserError(
      f"--batch-size is {size}, which does not divide by the {devices} "
      f"devices{each if config.accumulate > 1 else ''}: use {sizes}"
    )


def train(
  config: Config,
  dataset: Dataset | LargeDataset,
  *,
  argv: Sequence[str],
  console: Console,
  title: str,
  stop: StopRequest,
) -> None:
  """Trains to the last epoch, from the newest checkpoint if there is one.

  Args:
    config: a resolved config that passed `check_devices`.
    dataset: already restricted to the examples that the config asks for.
    argv: the command line, for the record.
    console: where progress is shown.
    title: what progress lines start with.
    stop: what a signal asks.

  Raises:
    NonFiniteError: a loss or a gradient became NaN or infinite. The last good
      checkpoint is kept.
    StorageError: the run directory cannot be written to any more. Likewise.
    Stopped: a signal asked for it, and the run was saved.
    UserError: there are checkpoints and all are damaged. Nothing was changed.
  """
  # Whole batches only: the last incomplete one of an epoch is dropped.
  epoch_steps = dataset.train_count // config.batch_size
  total_steps = config.epochs * epoch_steps
  method = build.method(config, total_steps)
  first = hosts.is_first()

  with contextlib.ExitStack() as stack:
    screen = checkpoints = log = hosts.Silent()
    if first:
      run_directory.open_run(config.run_dir, config, argv)
      screen = stack.enter_context(ConsoleLog(console, title, total_steps))
      checkpoints = stack.enter_context(Checkpoints(config.run_dir))
    stop.last_words = lambda: (checkpoints.wait(), screen.leave())
    state, progress, started = starting.start(
      config, method, dataset, checkpoints, screen, total_steps
    )
    if first:
      log = stack.enter_context(
        contextlib.closing(MetricsLog(config.run_dir, resumed_step=started))
      )
    due = hosts.from_first(
      lambda: starting.missed_evaluations(config, dataset, started, epoch_steps)
    )
    if started == total_steps and not due:
      screen.say(f"finished before, at step {total_steps}")
      return
    _run_epochs(
      config,
      dataset,
      method,
      parallel.replicate(state, jax.devices()),
      progress,
      order_key=jax.random.wrap_key_data(np.asarray(state["keys"]["order"])),
      steps=range(started, total_steps),
      epoch_steps=epoch_steps,
      evaluation_due=due,
      checkpoints=checkpoints,
      log=log,
      screen=screen,
      stop=stop,
    )


def _run_epochs(
  config: Config,
  dataset: Dataset | LargeDataset,
  method: Any,
  state: Any,
  progress: dict[str, Any],
  *,
  order_key: jax.Array,
  steps: range,
  epoch_steps: int,
  evaluation_due: Sequence[str],
  checkpoints: Checkpoints,
  log: MetricsLog,
  screen: ConsoleLog,
  stop: StopRequest,
) -> None:
  devices = jax.devices()
  broken = stream.Broken(skip=config.skip_broken)
  if isinstance(dataset, LargeDataset):
    step = make_stream_step(method, dataset.info)
    feed = feeding.from_stream(
      config, dataset, steps, broken, devices, method.views
    )
  else:
    step = make_train_step(
      method,
      dataset.info,
      batch_size=config.batch_size,
      steps_per_epoch=epoch_steps,
    )
    feed = feeding.from_memory(dataset, order_key, steps, epoch_steps, devices)
  train_step = parallel.per_device(step, devices, donate_argnums=(0,))
  evaluators = {
    kind: feeding.evaluator(
      *(config, dataset.info, part, method, devices),
      broken=broken,
      progress=screen.evaluation,
    )
    for kind, part in evaluation.splits(dataset).items()
  }
  # Evaluated once, here: a call per step would wait for the device.
  rates = np.asarray(
    jax.vmap(build.schedule(config, steps.stop))(jnp.arange(steps.stop))
  )
  checkpoints.best_step = _best_step(config)
  last_save = time.monotonic()
  pending = collections.deque()
  agreed = hosts.Agreement(stop, devices)

  def record(step: int, metrics: Any) -> None:
    """Fetches and logs the metrics of a step that was dispatched before."""
    nonlocal progress
    values = {k: float(v) for k, v in parallel.unreplicate(metrics).items()}
    agreed.hear(values.pop(STOP, 0.0))
    finite.check_values(step, values, checkpoints)
    progress = _add(progress, values)
    epoch = -(-step // epoch_steps)
    rate = {"learning_rate": float(rates[step - 1])}
    if step % config.log_every == 0:
      log.write("step", epoch=epoch, step=step, values=rate | values)
    if step % epoch_steps == 0:
      means = _means(progress)
      progress = {}
      log.write("epoch", epoch=epoch, step=step, values=rate | means)
    screen.step(
      epoch=epoch,
      epochs=config.epochs,
      step=step,
      images=config.batch_size,
      loss=values["loss"],
    )

  def evaluate(step: int, kinds: Sequence[str]) -> dict[str, Any]:
    epoch = step // epoch_steps
    scores = {kind: evaluators[kind](state["method"]) for kind in kinds}
    for kind, values in scores.items():
      log.write(kind, epoch=epoch, step=step, values=values)
    if "test" in scores:
      screen.epoch(epoch=epoch, epochs=config.epochs, scores=scores["test"])
    if "validation" in scores:
      checkpoints.best_step = _best_step(config)
    return scores

  scores = evaluate(steps.start, evaluation_due)
  if steps:
    screen.say(_compiling_line(state["method"]))
  with contextlib.closing(feed):
    for done, inputs in zip(steps, feed, strict=True):
      epoch = done // epoch_steps
      state, metrics = train_step(state, *inputs, *agreed.flags())
      pending.append((done + 1, metrics))
      while len(pending) > parallel.programs_ahead():
        stop.saved = False
        record(*pending.popleft())

      ends_epoch = (done + 1) % epoch_steps == 0
      save_due = time.monotonic() - last_save >= 60 * config.checkpoint_minutes
      if not (ends_epoch or save_due or agreed.to_stop()):
        continue
      while pending:
        record(*pending.popleft())
      paused = time.monotonic()
      host_state = parallel.unreplicate(state)
      finite.check_state(done + 1, host_state, checkpoints)
      log.sync()
      checkpoints.save(done + 1, host_state, progress)
      # Evaluation comes after it: a stop in its midst then costs no step, and
      # the next start makes up for it.
      if agreed.to_stop():
        checkpoints.wait()
        agreed.stop_now()
      stop.saved = jax.process_count() == 1
      stop.check()
      if ends_epoch and evaluation.is_due(config, epoch + 1):
        scores = evaluate(done + 1, list(evaluators))
      if ends_epoch and broken.found:
        count = len(broken.found)
        files = f"{count} image file{'s' if count > 1 else ''}"
        screen.say(f"{files} cannot be used: passed over")
      last_save = time.monotonic()
      screen.pause(last_save - paused)
  checkpoints.wait()
  stop.saved = True
  if "test" in scores:
    _warn_of_weak_ensemble(config, screen, scores["test"])


def _best_step(config: Config) -> int | None:
  """The step of the first of the epochs with the best validation top-1."""
  lines = [
    line
    for line in run_directory.read_metrics(config.run_dir)
    if line["kind"] == "validation"
  ]
  best = max(lines, key=lambda line: line["top1/ensemble"], default=None)
  return best["step"] if best else None


def _compiling_line(method_state: Any) -> str:
  # XLA's time grows with the number of layers over all members; a layer is a
  # kernel, a scale and a bias, each with its momentum, a mean and a variance.
  layers = len(jax.tree.leaves(method_state)) / 8
  return f"compiling, about {5 + 0.15 * layers:.0f} s"


def _warn_of_weak_ensemble(
  config: Config, screen: ConsoleLog, scores: dict[str, float]
) -> None:
  members = {
    member.name: scores[f"top1/{member.name}"]
    for member in build.members(config)
  }
  best = max(members, key=members.get)
  if scores["top1/ensemble"] < members[best]:
    teacher = (
      ": as a teacher it holds that member back"
      if config.method not in ("solo", "dml")
      else ""
    )
    screen.say(
      f"warning: the ensemble ({scores['top1/ensemble']:.2f} %) is worse than "
      f"its best member, {best} ({members[best]:.2f} %){teacher}"
    )


# Means over the steps of the current epoch. Kept on the host in float64 and
# saved with every checkpoint, so that a resumed epoch has the same means;
# {} before its first step.


def _add(progress: dict[str, Any], values: dict[str, float]) -> dict[str, Any]:
  sums = progress.get("sums", {})
  return {
    "steps": progress.get("steps", 0) + 1,
    "sums": {name: sums.get(name, 0.0) + v for name, v in values.items()},
  }


def _means(progress: dict[str, Any]) -> dict[str, float]:
  return {k: v / progress["steps"] for k, v in progress["sums"].items()}
