"""Kill a real training again and again; it must end as if nobody had.

    python benchmarks/faults.py

A training (digits, a small network, with its solo run, a checkpoint after
every step) is killed with SIGKILL at moments drawn from a seed: anywhere,
while XLA compiles, while a checkpoint is being written, while it evaluates,
while the report is written. Each time the same command is started again, until
it gets to its end. Then everything that counts is compared with a run that
nobody interrupted: the final state to the last bit, metrics.jsonl byte for
byte, with no step twice and none missing, and summary.json.
"""

import dataclasses
import json
import pathlib
import random
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import tyro
from rich.console import Console

import command_line
import timing
import trainings
from ekd_jax import run_directory

FLAGS = shlex.split(
  "--dataset digits --depth 8 --ratios .5 --epochs 3 --batch-size 64 "
  "--train-examples 320 --validation-examples 200 --log-every 1 "
  "--checkpoint-minutes 1e-9 --with-solo"
)
EXIT_DIFFERENT = 1

# Where runs are looked at for a moment to come.
_POLL_SECONDS = 0.001


@dataclasses.dataclass(frozen=True)
class Options:
  """Kills a training at random moments and compares how it ends."""

  # How often it is killed, over as many trainings as that takes.
  kills: int = 20

  # Of the moments.
  seed: int = 0

  # Where the records are written.
  json: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None


class Kill(NamedTuple):
  """One kill.

  Attributes:
    run: which training, from 1.
    moment: what it was doing.
    seconds: since its start.
    resumed: what the next start said it goes on from.
  """

  run: int
  moment: str
  seconds: float
  resumed: str


class Child:
  """A training in a process of its own, and what it has said so far."""

  def __init__(self, run_dir: pathlib.Path, flags: list[str]):
    self.run_dir = run_dir
    # What an earlier start left there says nothing of this one.
    self.left_over = {*self.torn(), *self.newest_lines()}
    self.started = time.monotonic()
    self.lines: list[str] = []
    self._process = subprocess.Popen(
      [
        *(sys.executable, str(trainings.EXPERIMENT), *flags),
        *("--run-dir", str(run_dir)),
      ],
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    self._reader = threading.Thread(target=self._read, daemon=True)
    self._reader.start()

  def torn(self) -> list[pathlib.Path]:
    """Checkpoints that are not whole, as orbax calls them until they are."""
    return [
      path
      for part in ("", run_directory.SOLO)
      for path in (self.run_dir / part / "checkpoints").glob(
        "*.orbax-checkpoint-tmp"
      )
    ]

  def newest_lines(self) -> list[tuple[str, bytes]]:
    """The last line of each metrics.jsonl, beside whose it is."""
    found = []
    for part in ("", run_directory.SOLO):
      metrics = self.run_dir / part / run_directory.METRICS
      lines = metrics.read_bytes().splitlines() if metrics.exists() else []
      found += [(part, line) for line in lines[-1:]]
    return found

  @property
  def runs(self) -> bool:
    return self._process.poll() is None

  def kill(self) -> float:
    """SIGKILL; returns the seconds since the start."""
    self._process.kill()
    self.wait()
    return time.monotonic() - self.started

  def wait(self) -> int:
    """Waits for the end; returns the exit code."""
    code = self._process.wait()
    self._reader.join()
    return code

  def said(self, words: str) -> bool:
    return any(words in line for line in self.lines)

  def _read(self) -> None:
    for line in self._process.stdout:
      self.lines.append(line.rstrip())


# Each says when a child has come to the moment. A pause drawn at random
# follows, so that it is not always killed at its very beginning.


def _compiling(child: Child) -> bool:
  return child.said("compiling, about")


def _saving(child: Child) -> bool:
  return bool(set(child.torn()) - child.left_over)


def _evaluating(child: Child) -> bool:
  new = set(child.newest_lines()) - child.left_over
  return any(b'"kind": "epoch"' in line for _, line in new)


def _reporting(child: Child) -> bool:
  # The solo run is the last; after its last epoch come summaries and reports.
  return child.said("solo: epoch 3/3")


MOMENTS: dict[str, tuple[Callable[[Child], bool], float]] = {
  # What it is doing: (has it begun, the longest pause in seconds).
  "anywhere": (lambda child: True, 0.0),
  "compiling": (_compiling, 2.0),
  "saving": (_saving, 0.005),
  "evaluating": (_evaluating, 0.05),
  "reporting": (_reporting, 0.5),
}


def run(options: Options, console: Console) -> None:
  """Kills, compares, prints the tables; exits if anything differs."""
  command_line.require_at_least_one(options, "kills")
  draw = random.Random(options.seed)
  with tempfile.TemporaryDirectory(prefix="ekd_jax_faults_") as folder:
    root = pathlib.Path(folder)
    command_line.say(console, "a training that nobody interrupts")
    unbroken = Child(root / "unbroken", FLAGS)
    _finish(unbroken)
    duration = time.monotonic() - unbroken.started
    kills, differences, number = [], [], 0
    while len(kills) < options.kills:
      number += 1
      command_line.say(console, f"training {number}, {len(kills)} kills so far")
      run_dir = root / f"run_{number}"
      kills += _killed_until_done(
        run_dir, number, options.kills - len(kills), duration, draw
      )
      differences += [
        f"training {number}: {what}"
        for part in ("", run_directory.SOLO)
        for what in compare(unbroken.run_dir / part, run_dir / part)
      ]
  console.print(table(kills))
  if options.json:
    pathlib.Path(options.json).write_text(
      json.dumps([kill._asdict() for kill in kills], indent=2) + "\n"
    )
  if differences:
    for difference in differences:
      print(f"error: {difference}", file=sys.stderr)
    sys.exit(EXIT_DIFFERENT)
  console.print(
    f"{len(kills)} kills in {number} trainings: final states, metrics.jsonl "
    "and summary.json are equal to those of the training that nobody "
    "interrupted, in every bit",
    soft_wrap=True,
  )


def _killed_until_done(
  run_dir: pathlib.Path,
  number: int,
  most: int,
  duration: float,
  draw: random.Random,
) -> list[Kill]:
  """One training, killed at most so often; returns its kills."""
  kills: list[Kill] = []
  pending = None

  def told(child: Child) -> None:
    nonlocal pending
    if pending is None:
      return
    words = [
      line for line in child.lines if "resuming" in line or "finished" in line
    ]
    kills.append(pending._replace(resumed="; ".join(words) or "the start"))
    pending = None

  while len(kills) + (pending is not None) < most:
    moment = draw.choice(list(MOMENTS))
    flags = FLAGS + ["--no-compilation-cache"] * (moment == "compiling")
    child = Child(run_dir, flags)
    begun, pause = MOMENTS[moment]
    longest = duration if moment == "anywhere" else pause
    while child.runs and not begun(child):
      time.sleep(_POLL_SECONDS)
    deadline = time.monotonic() + draw.uniform(0, longest)
    while child.runs and time.monotonic() < deadline:
      time.sleep(_POLL_SECONDS)
    if not child.runs:
      _finish(child)
      told(child)
      return kills
    seconds = child.kill()
    told(child)
    pending = Kill(number, moment, round(seconds, 3), "")
  child = Child(run_dir, FLAGS)
  _finish(child)
  told(child)
  return kills


def _finish(child: Child) -> None:
  code = child.wait()
  if code:
    said = "\n".join(child.lines)
    raise RuntimeError(f"the training ended with exit code {code}:\n{said}")


def compare(unbroken: pathlib.Path, killed: pathlib.Path) -> list[str]:
  """What two runs differ in, in a line each; [] if they are equal."""
  found = []
  for name in (run_directory.METRICS, run_directory.SUMMARY):
    if (unbroken / name).read_bytes() != (killed / name).read_bytes():
      found.append(f"{killed / name} differs")
  steps = [
    line["step"]
    for line in run_directory.read_metrics(killed)
    if line["kind"] == "step"
  ]
  if steps != list(range(1, len(steps) + 1)):
    found.append(f"{killed}: steps twice or missing: {steps}")
  a, b = (trainings.final_arrays(run_dir) for run_dir in (unbroken, killed))
  if a.keys() != b.keys():
    return [*found, f"{killed}: another structure"]
  found += [
    f"{killed}: {name} differs"
    for name in a
    if (a[name].dtype, a[name].shape) != (b[name].dtype, b[name].shape)
    or a[name].tobytes() != b[name].tobytes()
  ]
  return found


def table(kills: list[Kill]) -> Any:
  """The kills, one row each."""
  shown = timing.table(
    "killed with SIGKILL",
    ["kill", "training", "while", "after s", "next start"],
  )
  for number, kill in enumerate(kills, 1):
    shown.add_row(
      str(number),
      str(kill.run),
      kill.moment,
      f"{kill.seconds:.2f}",
      kill.resumed,
    )
  return shown


if __name__ == "__main__":
  command_line.main(Options, run)
