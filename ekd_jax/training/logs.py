"""Where a run's numbers go: metrics.jsonl, TensorBoard, the console.

A terminal gets one live line; a pipe gets a plain line per epoch and, in
long epochs, one every half minute.
"""

import json
import pathlib
import time
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from ekd_jax import run_directory

_SECONDS_BETWEEN_PLAIN_LINES = 30.0


class MetricsLog:
  """Appends to metrics.jsonl and TensorBoard's event files."""

  def __init__(self, run_dir: pathlib.Path, *, resumed_step: int):
    # Imported here: it loads protobuf, which --plan and --help can do without.
    import tensorboardX

    run_directory.truncate_metrics(run_dir, resumed_step)
    # One stream for the whole run: opened once, closed by close().
    self._file = open(  # noqa: SIM115
      run_dir / run_directory.METRICS, "a", encoding="utf-8"
    )
    self._events = tensorboardX.SummaryWriter(
      str(run_dir / "tensorboard"), purge_step=resumed_step + 1
    )

  def write(
    self, kind: str, *, epoch: int, step: int, values: dict[str, float]
  ) -> None:
    """Writes one line; see `run_directory` for what it holds."""
    line = {"kind": kind, "epoch": epoch, "step": step, **values}
    self._file.write(json.dumps(line) + "\n")
    self._file.flush()
    for name, value in values.items():
      self._events.add_scalar(f"{kind}/{name}", value, step)

  def close(self) -> None:
    """Closes the files."""
    self._file.close()
    self._events.close()


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
      left = f", {_duration(left)} left"
    line = (
      f"epoch {epoch}/{epochs}, step {step}/{self._total_steps}, "
      f"loss {loss:.3f}{rate}{left}"
    )
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
    students = " ".join(
      f"{top1[name]:.2f}" for name in sorted(top1, key=_member_order)
    )
    self._accuracy = (
      f"; test top-1 %: students {students}, ensemble {ensemble:.2f}"
    )
    self._last_line = time.monotonic()
    self.say(f"epoch {epoch}/{epochs}{self._accuracy}")


def _member_order(name: str) -> tuple[int, str]:
  # student_2 before student_10; JAX returns dicts in alphabetical order.
  return len(name), name


def _duration(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  if hours:
    return f"{hours} h {minutes:02d} min"
  return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"
