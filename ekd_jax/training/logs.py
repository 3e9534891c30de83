"""Where a run's numbers go: metrics.jsonl, TensorBoard, the console.

A terminal gets one live line; a pipe gets a plain line per epoch and, in
long epochs, one every half minute.
"""

import json
import os
import pathlib
import shutil
import tempfile
import time
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from ekd_jax import run_directory, storage

_SECONDS_BETWEEN_PLAIN_LINES = 30.0

_EVENTS = "tensorboard"


class MetricsLog:
  """Appends to metrics.jsonl and TensorBoard's event files.

  A bucket has no append: there the files grow in a temporary folder of this
  machine, and `sync` puts them in the bucket whole.
  """

  def __init__(self, run_dir: str | os.PathLike, *, resumed_step: int):
    """Opens the files, without the lines after `resumed_step`."""
    # Imported here: it loads protobuf, which --plan and --help can do without.
    from tensorboardX import event_file_writer, summary
    from tensorboardX.proto import event_pb2

    self._scalar, self._event = summary.scalar, event_pb2.Event
    self._run_dir = storage.path(run_dir)
    self._remote = storage.is_remote(run_dir)
    with storage.failures_told(run_dir):
      run_directory.truncate_metrics(self._run_dir, resumed_step)
      if self._remote:
        self._folder = pathlib.Path(tempfile.mkdtemp(prefix="ekd_jax_"))
        (self._folder / run_directory.METRICS).write_bytes(
          (self._run_dir / run_directory.METRICS).read_bytes()
        )
      else:
        self._folder = pathlib.Path(self._run_dir)
      (self._folder / _EVENTS).mkdir(exist_ok=True)
      # One stream for the whole run: opened once, closed by close().
      self._file = open(  # noqa: SIM115
        self._folder / run_directory.METRICS, "a", encoding="utf-8"
      )
      # Not SummaryWriter: its thread would meet a full disk by itself. The
      # number keeps two starts within a second apart.
      earlier = len(list((self._run_dir / _EVENTS).glob("*")))
      self._events = event_file_writer.EventsWriter(
        str(self._folder / _EVENTS / "events"), f".{earlier}"
      )
      # TensorBoard drops what an earlier start wrote after this step.
      self._events.write_event(
        self._event(
          wall_time=time.time(),
          step=resumed_step + 1,
          session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START),
        )
      )

  def write(
    self, kind: str, *, epoch: int, step: int, values: dict[str, float]
  ) -> None:
    """Writes one line; see `run_directory` for what it holds.

    Raises:
      StorageError: there is no room for it.
    """
    line = {"kind": kind, "epoch": epoch, "step": step, **values}
    with storage.failures_told(self._run_dir):
      self._file.write(json.dumps(line) + "\n")
      self._file.flush()
      for name, value in values.items():
        self._events.write_event(
          self._event(
            wall_time=time.time(),
            step=step,
            summary=self._scalar(f"{kind}/{name}", value),
          )
        )

  def sync(self) -> None:
    """Makes what was written so far outlive a power cut.

    To be called before a checkpoint is saved: no line before it is missing.

    Raises:
      StorageError: there is no room for it.
    """
    with storage.failures_told(self._run_dir):
      os.fsync(self._file.fileno())
      self._events.flush()
      if self._remote:
        self._upload()

  def close(self) -> None:
    """Closes the files.

    Raises:
      StorageError: there is no room for what was written last.
    """
    with storage.failures_told(self._run_dir):
      try:
        self._file.close()
        self._events.close()
        if self._remote:
          self._upload()
      finally:
        if self._remote:
          shutil.rmtree(self._folder)

  def _upload(self) -> None:
    for path in self._folder.rglob("*"):
      if path.is_file():
        target = self._run_dir / path.relative_to(self._folder).as_posix()
        target.write_bytes(path.read_bytes())


class ConsoleLog:
  """Tells a person how the run is doing."""

  def __init__(self, console: Console, title: str, total_steps: int):
    self._console = console
    self._title = title
    self._total_steps = total_steps
    self._live = None
    self._steps_timed = 0
    self._started = None
    self._paused = 0.0
    self._last_line = time.monotonic()
    self._accuracy = ""

  def __enter__(self) -> "ConsoleLog":
    if self._console.is_terminal:
      self._live = Live(
        console=self._console, refresh_per_second=4, transient=True
      )
      self._live.start()
    return self

  def __exit__(self, *exception: object) -> None:
    if self._live is not None:
      self._live.stop()

  def leave(self) -> None:
    """Gives the terminal back; for a process that ends without `__exit__`."""
    if self._live is not None:
      self._console.show_cursor()

  def say(self, line: str) -> None:
    """Prints one line that stays."""
    self._console.print(
      f"{self._title}: {line}", highlight=False, soft_wrap=True, markup=False
    )

  def step(
    self, *, epoch: int, epochs: int, step: int, images: int, loss: float
  ) -> None:
    """Shows a finished step; `images` is the size of its batch."""
    now = time.monotonic()
    if self._started is None:
      # The first step is compilation; speed counts from its end.
      self._started = now
    else:
      self._steps_timed += 1
    rate = left = ""
    if self._steps_timed:
      elapsed = now - self._started
      rate = (elapsed - self._paused) / self._steps_timed
      rate = f", {images / rate:.0f} images/s"
      left = elapsed / self._steps_timed * (self._total_steps - step)
      left = f", {duration(left)} left"
    self._show(
      f"epoch {epoch}/{epochs}, step {step}/{self._total_steps}, "
      f"loss {loss:.3f}{rate}{left}"
    )

  def evaluation(self, done: int, total: int) -> None:
    """Shows how many images of an evaluation have been read."""
    self._show(f"evaluating, {done} of {total} images")

  def _show(self, line: str) -> None:
    """A line that the next one replaces, or, in a pipe, one now and then."""
    now = time.monotonic()
    if self._live is not None:
      self._live.update(
        Text(
          f"{self._title}: {line}{self._accuracy}",
          no_wrap=True,
          overflow="ellipsis",
        )
      )
    elif now - self._last_line >= _SECONDS_BETWEEN_PLAIN_LINES:
      self._last_line = now
      self.say(line)

  def pause(self, seconds: float) -> None:
    """Leaves time that was not training out of the images per second."""
    self._paused += seconds

  def epoch(self, *, epoch: int, epochs: int, scores: dict[str, Any]) -> None:
    """Prints the accuracies after an epoch."""
    top1 = {
      name.removeprefix("top1/"): value
      for name, value in scores.items()
      if name.startswith("top1/")
    }
    ensemble = top1.pop("ensemble")
    names = sorted(top1, key=_member_order)
    students = " ".join(f"{top1[n]:.2f}" for n in names if _is_member(n))
    others = "".join(f", {n} {top1[n]:.2f}" for n in names if not _is_member(n))
    self._accuracy = (
      f"; test top-1 %: students {students}, ensemble {ensemble:.2f}{others}"
    )
    self._last_line = time.monotonic()
    self.say(f"epoch {epoch}/{epochs}{self._accuracy}")


def _is_member(name: str) -> bool:
  return name.startswith("student_")


def _member_order(name: str) -> tuple[int, str]:
  # student_2 before student_10; JAX returns dicts in alphabetical order.
  return len(name), name


def duration(seconds: float) -> str:
  """A length of time: "2 h 05 min", "3 min 10 s"."""
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  if hours:
    return f"{hours} h {minutes:02d} min"
  return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"
