"""Several processes, one training: joining, agreeing, and losing one.

Every process runs the same program on its own devices; a collective in a step
waits for all of them. What only one may do, the first does: it alone reads and
writes the run directory, which therefore need not be shared, and tells the
others what it found (`from_first`). A mistake that it finds ends all of them,
each with the same line.

With one process all of this does nothing.
"""

import contextlib
import json
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from rich.console import Console

from ekd_jax.config import Config
from ekd_jax.errors import ProcessLostError, Stopped, UserError
from ekd_jax.training import parallel
from ekd_jax.training.stopping import StopRequest

# Without a sign of life for so long, a process counts as lost: JAX then aborts
# the others, with a message. Where a collective notices before that, it raises.
HEARTBEAT_SECONDS = 30

# What collectives and the coordination service say of a process that is gone.
_LOST = re.compile(
  r"gloo|nccl|connection (closed|reset|refused)|peer|heartbeat|"
  r"coordination service|another task|socket closed|broken pipe|"
  r"deadline_exceeded|unavailable|aborted",
  re.IGNORECASE,
)


def join(config: Config, console: Console) -> None:
  """Waits for the other processes of the training; before any use of a device.

  Args:
    config: `distributed` asks for it; address, number and id are found by JAX
      (on Cloud TPU VMs, with Slurm or Open MPI) if they are not set.
    console: told that there is waiting to do.

  Raises:
    UserError: where this runs cannot be found out, or not all came in time.
  """
  if not config.distributed:
    return
  count = config.num_processes
  console.print(
    f"waiting for {count if count is not None else 'all'} processes, at most "
    f"{config.join_timeout} s",
    soft_wrap=True,
  )
  # SIGTERM is ours (training/stopping.py).
  jax.config.update("jax_enable_preemption_service", False)
  if jax.config.jax_cpu_collectives_implementation is None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
  came = threading.Event()
  watcher = threading.Thread(target=_give_up, args=(config, came), daemon=True)
  watcher.start()
  try:
    jax.distributed.initialize(
      config.coordinator_address,
      config.num_processes,
      config.process_id,
      # JAX ends the process when its own patience does: ours ends first.
      initialization_timeout=config.join_timeout + 60,
      heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
      # A process that ends early must not hold the others.
      shutdown_timeout_seconds=10,
    )
  except (RuntimeError, ValueError) as error:
    raise UserError(_not_joined(config, str(error))) from error
  finally:
    came.set()
  console.print(
    f"process {jax.process_index()} of {jax.process_count()}, "
    f"{jax.local_device_count()} of {jax.device_count()} devices",
    soft_wrap=True,
  )


def _give_up(config: Config, came: threading.Event) -> None:
  if not came.wait(config.join_timeout):
    print(f"error: {_not_joined(config)}", file=sys.stderr, flush=True)
    os._exit(UserError.exit_code)


def _not_joined(config: Config, reason: str = "") -> str:
  where = config.coordinator_address or "the coordinator that JAX found"
  reason = f" ({' '.join(reason.split())[:200]})" if reason else ""
  return (
    f"--distributed: not all processes came together at {where} within "
    f"{config.join_timeout} s{reason}: start the same command on every host, "
    "let all of them reach that address, and give each its own --process-id; "
    "on Cloud TPU VMs and with Slurm leave the three flags out"
  )


def leave() -> None:
  """Waits until the others are done too: the first may still be saving."""
  if jax.process_count() > 1:
    jax.distributed.shutdown()


def is_first() -> bool:
  """Whether this process is the one that reads and writes the run."""
  return jax.process_index() == 0


def from_first(function: Callable[[], Any]) -> Any:
  """What `function` returns in the first process, in all of them.

  Args:
    function: called in the first process only; returns JSON values.

  Returns:
    Its result.

  Raises:
    UserError: the one it raised, in every process.
  """
  if jax.process_count() == 1:
    return function()
  message = b""
  raised = None
  if is_first():
    try:
      message = json.dumps({"result": function()}).encode()
    except UserError as error:
      raised = error
      message = json.dumps({"error": str(error)}).encode()
  answer = json.loads(_broadcast(message))
  if raised is not None:
    raise raised
  if "error" in answer:
    raise UserError(answer["error"])
  return answer["result"]


def arrays_from_first(tree: Any) -> Any:
  """The first process's NumPy arrays, in all of them, bit for bit.

  Args:
    tree: arrays of the same shapes and types in every process.
  """
  if jax.process_count() == 1:
    return tree
  leaves, structure = jax.tree.flatten(tree)
  payload = b"".join(np.ascontiguousarray(leaf).tobytes() for leaf in leaves)
  payload = _broadcast(payload)
  result, start = [], 0
  for leaf in leaves:
    flat = np.frombuffer(payload, leaf.dtype, leaf.size, start)
    result.append(flat.reshape(leaf.shape).copy())
    start += flat.nbytes
  return jax.tree.unflatten(structure, result)


class Agreement:
  """Whether to stop after the step, the same answer in every process.

  A signal reaches the processes at different moments, and each would stop
  after another step, while the rest wait for it in a collective. So with
  several processes a signal only raises the process's flag, an argument of the
  next step; the step sums up the flags, and all see the sum in its metrics.
  """

  def __init__(self, stop: StopRequest, devices: parallel.Devices):
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


@contextlib.contextmanager
def losses_of_others() -> Iterator[None]:
  """Makes one line of what a collective says when another process is gone.

  The process is then ended without the clean-up of JAX, which would wait for
  the one that is gone.
  """
  try:
    yield
  except Exception as error:
    if jax.process_count() == 1 or isinstance(error, Stopped):
      raise  # All stop together, and wait for the first one's save.
    sys.stdout.flush()
    if isinstance(error, UserError):
      # One of them found a mistake, or all did: nobody waits for another.
      print(f"error: {error}", file=sys.stderr, flush=True)
      os._exit(error.exit_code)
    if isinstance(error, jax.errors.JaxRuntimeError) and _LOST.search(
      str(error)
    ):
      lost = ProcessLostError(
        "another process of this run has ended, see what it said; the same "
        "command on all hosts goes on from the last checkpoint"
      )
      print(f"error: {lost}", file=sys.stderr, flush=True)
      os._exit(lost.exit_code)
    raise


class Silent:
  """Stands for the log, the screen and the checkpoints in other processes.

  Whatever it is asked to do, it does not.
  """

  def __enter__(self) -> "Silent":
    return self

  def __exit__(self, *exception: object) -> None:
    pass

  def __getattr__(self, name: str) -> Callable[..., None]:
    return lambda *arguments, **options: None


def _broadcast(payload: bytes) -> bytes:
  """The first process's bytes, in all of them."""
  size = int(multihost_utils.broadcast_one_to_all(np.int32(len(payload))))
  # A sum over the processes carries it: whole numbers come out as they were.
  words = np.zeros(-(-size // 4), np.uint32)
  if is_first():
    words = np.frombuffer(payload.ljust(4 * len(words), b"\0"), np.uint32)
  words = np.asarray(multihost_utils.broadcast_one_to_all(words))
  return words.astype(np.uint32).tobytes()[:size]
