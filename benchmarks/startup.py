"""Seconds from the start of a process to its first finished training step.

    python benchmarks/startup.py

Until the first step has run, a training imports its libraries, draws the
parameters, traces the step (Python to JAX's own program), lowers it (to
StableHLO, which XLA reads), compiles it, or finds it compiled in the cache,
and runs it. Each start is a process of its own, and its clock is started
before the process is; the phases add up to the total. A cold start has an
empty compilation cache, the warm one that follows has what the cold one left
there. The user's own cache is not touched.

`quick` is the whole product, timed from outside: --quick from the start of
the process to the report, cold and warm, and two commands that have nothing
to compile: --help and `import ekd_jax.losses`.
"""

import dataclasses
import importlib
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

import command_line
import timing
import trainings
import workload
from ekd_jax.config import Config
from ekd_jax.errors import UserError

# What the command line imports before it trains.
IMPORTS = ("ekd_jax.cli", "ekd_jax.report", "ekd_jax.training.loop")

IMPORT_LOSSES = "import ekd_jax.losses"

PHASES = ("imports", "parameters", "trace", "lower", "compile", "first step")
TOTAL = "total"

# JAX measures these three itself, wherever in a call they happen.
EVENTS = {
  "/jax/core/compile/jaxpr_trace_duration": "trace",
  "/jax/core/compile/jaxpr_to_mlir_module_duration": "lower",
  "/jax/core/compile/backend_compile_duration": "compile",
}

# {phase: seconds} of one start.
Start = Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Options(workload.TrainingFlags):
  """Times the start of a training, with and without compiled programs."""

  # What is started.
  case: Literal["resnet20x5", "resnet110x4", "quick", "all"] = "all"

  # Cold starts, each with a warm one after it.
  repeats: int = 3

  # Where the records are written.
  json: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None


def run(options: Options, console: Console) -> None:
  """Measures what the options ask for.

  Raises:
    UserError: an option that cannot be used, or a command that failed.
  """
  command_line.require_at_least_one(options, "repeats")
  timing.write_json(options.json, [])
  # Not measured: afterwards the libraries' files and their bytecode are there,
  # as they are at a user's second start.
  libraries = ["-c", f"import {', '.join(IMPORTS)}"]
  repeated(partial(command, libraries), 1, ["none"])
  records = []
  for case, (start, caches) in cases(options).items():
    command_line.say(console, f"{case}: starting {options.repeats} times")
    starts = repeated(start, options.repeats, caches)
    for cache in caches:
      records += record(case, cache, starts[cache])
    timing.write_json(options.json, records)
  console.print(table(records))


def cases(
  options: Options,
) -> dict[str, tuple[Callable[[str], Start], Sequence[str]]]:
  """{case: (what starts it with a cache directory, its states of the cache)}.

  A case that compiles nothing has the one state "none".
  """
  flags = ["--conv", options.conv, "--scan", options.scan]
  if options.remat:
    flags.append("--remat")
  if not options.tune_allocator:
    flags.append("--no-tune-allocator")
  compiling, other = ("cold", "warm"), ("none",)
  steps = {
    case: (
      partial(first_step, workload.config(case, **options.settings())),
      compiling,
    )
    for case in workload.CASES
  }
  quick = {
    "quick": (partial(quick_run, flags), compiling),
    "--help": (partial(command, [str(trainings.EXPERIMENT), "--help"]), other),
    "import losses": (partial(command, ["-c", IMPORT_LOSSES]), other),
  }
  if options.case in steps:
    return {options.case: steps[options.case]}
  return quick if options.case == "quick" else steps | quick


def repeated(
  start: Callable[[str], Start], repeats: int, caches: Sequence[str]
) -> dict[str, list[Start]]:
  """{state of the cache: its starts}.

  Args:
    start: takes a cache directory.
    repeats: how often an empty directory is made.
    caches: what to call the starts that follow each other in one directory.
  """
  starts = {cache: [] for cache in caches}
  for _ in range(repeats):
    with tempfile.TemporaryDirectory(prefix="ekd_jax_startup_") as folder:
      for cache in caches:
        starts[cache].append(start(folder))
  return starts


def first_step(config: Config, cache: str) -> Start:
  """Seconds of each of `PHASES` in a fresh process, and of all together."""
  # This clock is the machine's, so the process can go on counting.
  return timing.in_worker(_first_step, config, cache, time.monotonic())


def quick_run(flags: Sequence[str], cache: str) -> Start:
  """Seconds of the whole --quick run, from the start to the report."""
  with tempfile.TemporaryDirectory(prefix="ekd_jax_startup_") as folder:
    run_dir = pathlib.Path(folder) / "run"
    arguments = [
      str(trainings.EXPERIMENT),
      "--quick",
      "--run-dir",
      str(run_dir),
    ]
    seconds = command([*arguments, *flags], cache)
    if not (run_dir / "report.html").exists():
      raise UserError("--quick ended without a report")
    return seconds


def command(arguments: Sequence[str], cache: str) -> Start:
  """Seconds of a Python command, from its start to its end.

  Raises:
    UserError: the command failed; says its last line.
  """
  environment = os.environ | {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": cache}
  before = time.monotonic()
  done = subprocess.run(
    [sys.executable, *arguments],
    env=environment,
    capture_output=True,
    text=True,
  )
  seconds = time.monotonic() - before
  if done.returncode:
    last = (done.stderr.strip() or "no message").splitlines()[-1]
    raise UserError(
      f"python {' '.join(arguments)} ended with exit code {done.returncode}: "
      f"{last}"
    )
  return {TOTAL: seconds}


def record(
  case: str, cache: str, starts: Sequence[Start]
) -> list[dict[str, Any]]:
  """Starts with the same state of the cache: a flat JSON object per phase."""
  records = []
  for phase in starts[0]:
    seconds = [start[phase] for start in starts]
    records.append(
      {
        "case": case,
        "cache": cache,
        "phase": phase,
        "seconds_median": statistics.median(seconds),
        "seconds_min": min(seconds),
        "seconds_max": max(seconds),
        "repeats": len(seconds),
      }
    )
  return records


def table(records: Sequence[Mapping[str, Any]]) -> Table:
  """One row per case and state of the cache."""
  headings = [phase.replace(" ", "\n") for phase in PHASES]
  shown = timing.table(
    "seconds from process start, medians of the phases and of the total",
    ["case", "cache", *headings, "total", "min", "max"],
    words=2,
  )
  rows = dict.fromkeys((r["case"], r["cache"]) for r in records)
  for case, cache in rows:
    own = {
      r["phase"]: r for r in records if (r["case"], r["cache"]) == (case, cache)
    }
    shown.add_row(
      *(case, cache),
      *(
        f"{own[phase]['seconds_median']:.2f}" if phase in own else ""
        for phase in PHASES
      ),
      *(f"{own[TOTAL][f'seconds_{s}']:.2f}" for s in ("median", "min", "max")),
    )
  return shown


def _first_step(config: Config, cache: str, started: float) -> Start:
  """What a training does until its first step has finished."""
  os.environ["XDG_CACHE_HOME"] = cache
  workload.prepare_product(config)
  for module in IMPORTS:
    importlib.import_module(module)
  import jax

  import product_step

  imported = time.monotonic()
  train_step, state, inputs = product_step.program(config)
  jax.block_until_ready((state, inputs))
  drawn = time.monotonic()
  seconds = dict.fromkeys(EVENTS.values(), 0.0)

  def listen(event: str, duration: float, **details: Any) -> None:
    if event in EVENTS:
      seconds[EVENTS[event]] += duration

  jax.monitoring.register_event_duration_secs_listener(listen)
  jax.block_until_ready(train_step(state, *inputs))
  finished = time.monotonic()
  return {
    "imports": imported - started,
    "parameters": drawn - imported,
    **seconds,
    "first step": finished - drawn - sum(seconds.values()),
    TOTAL: finished - started,
  }


if __name__ == "__main__":
  command_line.main(Options, run)
