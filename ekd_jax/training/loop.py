"""The training loop: one run, from a config to a summary.

Resuming is the same path as starting: the state of step 0 is built from the
seed, a newer one is restored over it if there is a checkpoint, and the loop
goes on from its step. Everything random is a function of the roots in the
state and the step's number, so nothing else has a position to restore.
"""

import collections
import contextlib
import math
import signal
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
from ekd_jax.errors import NonFiniteError, UserError
from ekd_jax.evaluation import make_evaluate
from ekd_jax.training import hosts, parallel
from ekd_jax.training.checkpoint import Checkpoints
from ekd_jax.training.logs import ConsoleLog, MetricsLog
from ekd_jax.training.step import STOP, init_state, make_train_step
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
  epoch_steps = len(dataset.train_labels) // config.batch_size
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
    state, progress, started = _start(
      config, method, dataset, checkpoints, screen, total_steps
    )
    if first:
      log = stack.enter_context(
        contextlib.closing(MetricsLog(config.run_dir, resumed_step=started))
      )
    due = hosts.from_first(
      lambda: _not_evaluated(config, dataset, started, epoch_steps)
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


def _start(
  config: Config,
  method: Any,
  dataset: Dataset,
  checkpoints: Checkpoints,
  screen: ConsoleLog,
  total_steps: int,
) -> tuple[Any, dict[str, Any], int]:
  """State, progress and step to go on from, the same in every process."""
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
    return init_state(method, dataset.info, config.seed), _no_progress(), 0
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


def _not_evaluated(
  config: Config, dataset: Dataset, step: int, epoch_steps: int
) -> list[str]:
  """The evaluations after `step` that a stop came before."""
  epoch, rest = divmod(step, epoch_steps)
  if rest or not _evaluates(config, epoch):
    return []
  done = {
    line["kind"]
    for line in run_directory.read_metrics(config.run_dir)
    if line["step"] == step
  }
  return [kind for kind in _splits(dataset) if kind not in done]


def _evaluates(config: Config, epoch: int) -> bool:
  """Whether the epoch, counted from 1, ends with an evaluation."""
  last = epoch == config.epochs
  return epoch > 0 and (last or epoch % config.evaluate_every == 0)


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
  evaluation_due: Sequence[str],
  checkpoints: Checkpoints,
  log: MetricsLog,
  screen: ConsoleLog,
  stop: StopRequest,
) -> None:
  devices = jax.devices()
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
  checkpoints.best_step = _best_step(config)
  last_save = time.monotonic()
  order = None
  pending = collections.deque()
  agreed = _Agreement(stop, devices)

  def record(step: int, metrics: Any) -> None:
    """Fetches and logs the metrics of a step that was dispatched before."""
    nonlocal progress
    values = {k: float(v) for k, v in parallel.unreplicate(metrics).items()}
    agreed.hear(values.pop(STOP, 0.0))
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
    screen.say(_compiling_line(config))
  for done in steps:
    epoch = done // epoch_steps
    if order is None or done % epoch_steps == 0:
      order = parallel.replicate(
        epoch_order(order_key, epoch, len(dataset.train_images)), devices
      )
    state, metrics = train_step(state, examples, order, *agreed.flags())
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
    _check_finite_state(done + 1, host_state, checkpoints)
    log.sync()
    checkpoints.save(done + 1, host_state, progress)
    # Evaluation comes after it: a stop in its midst then costs no step, and
    # the next start makes up for it.
    if agreed.to_stop():
      checkpoints.wait()
      agreed.stop_now()
    stop.saved = jax.process_count() == 1
    stop.check()
    if ends_epoch and _evaluates(config, epoch + 1):
      scores = evaluate(done + 1, list(evaluators))
    last_save = time.monotonic()
    screen.pause(last_save - paused)
  checkpoints.wait()
  stop.saved = True
  if "test" in scores:
    _warn_of_weak_ensemble(config, screen, scores["test"])


class _Agreement:
  """Whether to stop after the step, the same answer in every process.

  A signal reaches the processes at different moments, and each would stop
  after another step, while the rest wait for it in a collective. So with
  several processes a signal only raises the process's flag, an argument of the
  next step; the step sums up the flags, and all see the sum in its metrics.
  """

  def __init__(self, stop: StopRequest, devices: Sequence[jax.Device]):
    self._stop = stop
    self._devices = devices
    self._several = jax.process_count() > 1
    self._heard = False
    self._raised = {
      raised: parallel.replicate(np.float32(raised), devices)
      for raised in (False, True)
      if self._several
    }
    if self._several:
      stop.saved = False  # Nobody leaves alone.

  def flags(self) -> tuple[jax.Array, ...]:
    """What a step of several processes takes as its last argument."""
    if not self._several:
      return ()
    return (self._raised[self._stop.signal is not None],)

  def hear(self, flag: float) -> None:
    """Takes in what a step told of the flags."""
    self._heard |= flag > 0

  def to_stop(self) -> bool:
    """Whether to save and stop."""
    if self._several:
      return self._heard
    return self._stop.signal is not None

  def stop_now(self) -> None:
    """Ends the run, also in a process that has had no signal itself."""
    self._stop.signal = self._stop.signal or signal.SIGTERM
    self._stop.check()


def _best_step(config: Config) -> int | None:
  """The step of the first of the epochs with the best validation top-1."""
  lines = [
    line
    for line in run_directory.read_metrics(config.run_dir)
    if line["kind"] == "validation"
  ]
  best = max(lines, key=lambda line: line["top1/ensemble"], default=None)
  return best["step"] if best else None


def _splits(dataset: Dataset) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """What is evaluated, as images and labels."""
  splits = {"test": (dataset.test_images, dataset.test_labels)}
  if len(dataset.validation_images):
    splits["validation"] = (
      dataset.validation_images,
      dataset.validation_labels,
    )
  return splits


def _evaluators(
  config: Config, dataset: Dataset, method: Any, devices: Sequence[jax.Device]
) -> dict[str, Any]:
  return {
    kind: make_evaluate(
      method,
      dataset.info,
      images,
      labels,
      batch_size=config.evaluation_batch_size,
      devices=devices,
    )
    for kind, (images, labels) in _splits(dataset).items()
  }


def _compiling_line(config: Config) -> str:
  # XLA's time grows with the number of layers over all members.
  layers = config.depth * len(build.members(config))
  return f"compiling, about {5 + 0.15 * layers:.0f} s"


# Which of several values that are not finite tells most of where it began:
# a member's own terms, then what depends on the others, then sums.
_TELLING = ("label", "mutual", "feature", "distill", "gradient_norm")


def _check_finite(
  step: int, values: dict[str, float], checkpoints: Checkpoints
) -> None:
  broken = [k for k, v in values.items() if not math.isfinite(v)]
  if not broken:
    return

  def rank(name: str) -> tuple[int, str]:
    what, _, who = name.partition("/")
    known = what in _TELLING and who != "ensemble"
    return (_TELLING.index(what) if known else len(_TELLING)), name

  telling = sorted(broken, key=rank)
  shown = ", ".join(f"{name} = {values[name]}" for name in telling[:3])
  if len(telling) > 3:
    shown += f" and {len(telling) - 3} others"
  raise _non_finite(step, shown, checkpoints)


def _check_finite_state(
  step: int, state: Any, checkpoints: Checkpoints
) -> None:
  # An update can overflow under a finite gradient: the next loss would show
  # it, but this checkpoint would already be spoilt.
  for path, leaf in jax.tree_util.tree_leaves_with_path(state):
    if leaf.dtype.kind == "f" and not np.isfinite(leaf).all():
      name = jax.tree_util.keystr(path, simple=True, separator="/")
      raise _non_finite(step, name, checkpoints)


def _non_finite(
  step: int, what: str, checkpoints: Checkpoints
) -> NonFiniteError:
  kept = checkpoints.kept() or "the checkpoints are kept"
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
