"""Which of two programs is faster, on a machine that drifts.

The clock, a neighbour or the temperature changes a step by 15 % within
minutes, so two programs that are timed one after the other are compared by
the weather as well. Here they take turns, A B A B ...: the two of a pair meet
the same weather, its ratio A / B is what counts, and the median over the
pairs what is reported, with the smallest and the largest.

Each program lives in a process of its own on the same cores. One waits on a
pipe, without a thread that spins, while the other works.
"""

import contextlib
import functools
import json
import multiprocessing
import operator
import pathlib
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from rich import box
from rich.table import Table

from ekd_jax.errors import UserError

# OpenMP's threads go on spinning for up to 0.2 s after their last work, and
# would take a core from the other program's turn.
PAUSE_SECONDS = 0.3

# What a process may use while it waits: answering the pipe, and little more.
IDLE_SECONDS = 0.02
IDLE_SHARE = 0.03


class WorkerError(Exception):
  """A worker failed; the first line says how, the rest is its traceback."""


class PatienceError(WorkerError):
  """A worker has not come to an end in time, and was killed."""


@contextlib.contextmanager
def worker(
  prepare: Callable[[], Callable[..., Any]], *, patience: float | None = None
) -> Iterator[Callable]:
  """Calls `prepare()` in a fresh process; yields the function it returned.

  The yielded function runs over there and returns what it returns. Both ways
  everything is pickled. Nothing else runs meanwhile: the caller waits.

  Args:
    prepare: what is called first.
    patience: seconds that it may take; any number if None.

  Raises:
    WorkerError: something was raised over there, or the process ended.
    PatienceError: `prepare` took longer.
  """
  context = multiprocessing.get_context("spawn")
  pipe, far_end = context.Pipe()
  process = context.Process(target=_serve, args=(far_end, prepare), daemon=True)
  process.start()
  far_end.close()

  def receive(seconds: float | None = None) -> Any:
    if not pipe.poll(seconds):
      process.kill()
      raise PatienceError(f"not ready after {seconds:.0f} s")
    try:
      failure, result = pipe.recv()
    except EOFError:
      process.join()
      raise WorkerError(
        f"the process ended with exit code {process.exitcode}"
      ) from None
    if failure is not None:
      raise WorkerError(failure)
    return result

  def call(*arguments: Any) -> Any:
    pipe.send(arguments)
    return receive()

  try:
    receive(patience)
    yield call
  finally:
    pipe.close()
    process.join()


def in_worker(function: Callable[..., Any], *arguments: Any) -> Any:
  """Calls one function in a fresh process that ends afterwards."""
  with worker(functools.partial(_itself, function)) as call:
    return call(*arguments)


def timed(prepare: Callable[[], Callable[[int], None]]) -> Callable:
  """For `worker`: turns `run(steps)` into `turn(steps) -> Turn`."""
  return functools.partial(_timed, prepare)


class Turn(NamedTuple):
  """One turn of a worker.

  Attributes:
    seconds: per step; 0 for a turn of no steps.
    processor_seconds: what its process has used since it was started.
  """

  seconds: float
  processor_seconds: float


class Pair(NamedTuple):
  """Seconds per step of A and of B, one right after the other."""

  a: float
  b: float


def alternate(
  a: Callable[[int], Turn],
  b: Callable[[int], Turn],
  *,
  pairs: int,
  steps: int,
) -> list[Pair]:
  """Runs A B A B ...

  Args:
    a: one program, in a `worker`.
    b: the other one.
    pairs: how often both run.
    steps: of each turn.

  Raises:
    WorkerError: a worker failed, or worked while it was not its turn.
  """
  return [Pair(*turns) for turns in rounds([a, b], count=pairs, steps=steps)]


def rounds(
  programs: Sequence[Callable[[int], Turn]], *, count: int, steps: int
) -> list[list[float]]:
  """Runs A B C ... A B C ..., so that drift meets all alike.

  Args:
    programs: each in a `worker`.
    count: how often every one of them runs.
    steps: of each turn.

  Returns:
    Seconds per step, [count][program].

  Raises:
    WorkerError: a worker failed, or worked while it was not its turn.
  """
  return [
    [
      _turn(working, steps, idle=[p for p in programs if p is not working])
      for working in programs
    ]
    for _ in range(count)
  ]


def record(case: str, a: str, b: str, pairs: Sequence[Pair]) -> dict[str, Any]:
  """A comparison as one flat JSON object; seconds are medians per step."""
  ratios = [pair.a / pair.b for pair in pairs]
  return {
    "case": case,
    "a": a,
    "b": b,
    "seconds_a": statistics.median(pair.a for pair in pairs),
    "seconds_b": statistics.median(pair.b for pair in pairs),
    "ratio_median": statistics.median(ratios),
    "ratio_min": min(ratios),
    "ratio_max": max(ratios),
    "pairs": len(pairs),
  }


def table(title: str, headings: Sequence[str], *, words: int = 3) -> Table:
  """An empty table whose first `words` columns hold words, not numbers."""
  shown = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
  for index, heading in enumerate(headings):
    shown.add_column(heading, justify="left" if index < words else "right")
  return shown


def comparisons_table(
  records: Sequence[dict[str, Any]],
  skipped: Sequence[tuple[str, str, str, str]],
) -> Table:
  """Comparisons, and (case, a, b, reason) of those that were not made."""
  shown = table(
    "seconds per step, and the ratio A / B of paired runs",
    ["case", "A", "B", "A s", "B s", "A / B", "min", "max", "pairs"],
  )
  for r in records:
    shown.add_row(
      *(r["case"], r["a"], r["b"]),
      *(f"{r[f'seconds_{side}']:.3f}" for side in "ab"),
      *(f"{r[f'ratio_{what}']:.3f}" for what in ("median", "min", "max")),
      str(r["pairs"]),
    )
  for case, a, b, reason in skipped:
    shown.add_row(case, a, b, f"skipped: {reason}")
  return shown


def write_json(path: str | None, records: Sequence[dict[str, Any]]) -> None:
  """Writes the records, if a file was named.

  Raises:
    UserError: the file cannot be written.
  """
  if path is None:
    return
  try:
    pathlib.Path(path).write_text(json.dumps(records, indent=2) + "\n")
  except OSError as error:
    raise UserError(f"--json {path}: {error.strerror}") from error


def _itself(function: Callable[..., Any]) -> Callable[..., Any]:
  return function


def _turn(
  working: Callable[[int], Turn],
  steps: int,
  *,
  idle: Sequence[Callable[[int], Turn]],
) -> float:
  """Seconds per step of `working`, having made sure that the others waited."""
  time.sleep(PAUSE_SECONDS)
  before = [other(0).processor_seconds for other in idle]
  seconds = working(steps).seconds
  after = [other(0).processor_seconds for other in idle]
  for used in map(operator.sub, after, before):
    if used > IDLE_SECONDS + IDLE_SHARE * steps * seconds:
      raise WorkerError(
        f"a process used {used:.2f} s of processor time within {steps} steps "
        "of another one: the comparison is void"
      )
  return seconds


def _timed(prepare: Callable[[], Callable[[int], None]]) -> Callable:
  run = prepare()

  def turn(steps: int) -> Turn:
    start = time.perf_counter()
    run(steps)
    seconds = (time.perf_counter() - start) / max(steps, 1)
    return Turn(seconds, time.process_time())

  return turn


def _serve(pipe: Connection, prepare: Callable[[], Callable[..., Any]]) -> None:
  try:
    function = prepare()
    pipe.send((None, None))
    while True:
      try:
        arguments = pipe.recv()
      except EOFError:
        return
      pipe.send((None, function(*arguments)))
  except Exception as error:
    summary = f"{type(error).__name__}: {error}".strip()
    pipe.send((f"{summary}\n{traceback.format_exc()}", None))
