"""Peak memory of a training step: ours against eager PyTorch.

    python benchmarks/memory.py

trains ResNet-20 with one to five members, and ResNet-110 with four. Two views
of the same thing: what XLA says the compiled step needs (its arguments, the
results that do not take an argument's place, and the scratch it is given),
and what the operating system saw: the largest resident set of each process,
over its whole life (libraries and compilation are in it) and over a few steps
after the first ones.
"""

import dataclasses
import pathlib
import re
from collections.abc import Callable
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

import command_line
import timing
import workload
from ekd_jax.config import Config
from ekd_jax.errors import UserError

MEBIBYTE = 2**20

_PROCESS = pathlib.Path("/proc/self")


@dataclasses.dataclass(frozen=True)
class Options(workload.TrainingFlags):
  """Compares the peak memory of our step with that of PyTorch's."""

  # What is trained.
  case: Literal["resnet20", "resnet110x4", "all"] = "all"

  # Training steps whose peak is taken.
  steps: int = 3

  # Where the records are written.
  json: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None


def run(options: Options, console: Console) -> None:
  """Measures what the options ask for.

  Raises:
    UserError: PyTorch is missing, or the system does not tell the peak.
  """
  command_line.require_at_least_one(options, "steps")
  workload.require_pytorch("benchmarks/memory.py")
  if not (_PROCESS / "clear_refs").exists():
    raise UserError("benchmarks/memory.py needs Linux: it reads /proc")
  timing.write_json(options.json, [])
  records = []
  for case, config in cases(options.case, **options.settings()).items():
    command_line.say(console, f"{case}: measuring")
    ours = timing.in_worker(product, config, options.steps)
    channels = workload.stage_channels(config)
    theirs = timing.in_worker(pytorch, config, channels, options.steps)
    records.append(record(case, len(channels), ours, theirs))
    timing.write_json(options.json, records)
  console.print(table(records))


def cases(which: str, **settings: Any) -> dict[str, Config]:
  """ResNet-20 with its first one to five members; ResNet-110."""
  full = workload.config("resnet20x5", **settings)
  found = {
    f"resnet20x{count}": dataclasses.replace(full, widths=full.widths[:count])
    for count in range(1, len(full.widths) + 1)
  }
  deep = {"resnet110x4": workload.config("resnet110x4", **settings)}
  return {"resnet20": found, "resnet110x4": deep, "all": found | deep}[which]


def product(config: Config, steps: int) -> dict[str, int]:
  """Our step: bytes that XLA plans with, and resident bytes."""
  workload.prepare_product(config)
  import jax

  import product_step

  train_step, state, inputs = product_step.program(config)
  compiled = train_step.lower(state, *inputs).compile()
  planned = compiled.memory_analysis()

  def train(count: int) -> None:
    nonlocal state
    for _ in range(count):
      state, _ = compiled(state, *inputs)
      jax.block_until_ready(state)  # As a training does on a CPU.

  return resident(train, steps) | {
    "argument_bytes": planned.argument_size_in_bytes,
    "output_bytes": planned.output_size_in_bytes,
    "temp_bytes": planned.temp_size_in_bytes,
    "alias_bytes": planned.alias_size_in_bytes,
  }


def pytorch(
  config: Config, channels: workload.StageChannels, steps: int
) -> dict[str, int]:
  """Eager PyTorch's step: resident bytes."""
  return resident(workload.pytorch(config, channels, "eager"), steps)


def resident(train: Callable[[int], Any], steps: int) -> dict[str, int]:
  """The largest resident set of this process, in bytes.

  Args:
    train: runs a number of training steps.
    steps: how many the second figure is of.

  Returns:
    "peak_bytes" since the process was started, and "step_peak_bytes" of
    `steps` steps, when the first two have already run.
  """
  train(2)
  before = _peak_bytes()
  (_PROCESS / "clear_refs").write_text("5")  # 5 forgets the peak.
  train(steps)
  during = _peak_bytes()
  return {"peak_bytes": max(before, during), "step_peak_bytes": during}


def record(
  case: str, members: int, ours: dict[str, int], theirs: dict[str, int]
) -> dict[str, Any]:
  """A comparison as one flat JSON object."""
  resident_of_both = {
    f"{name}_{side}": values[name]
    for name in ("peak_bytes", "step_peak_bytes")
    for side, values in (("a", ours), ("b", theirs))
  }
  planned = {n: v for n, v in ours.items() if not n.endswith("peak_bytes")}
  return {
    "case": case,
    "members": members,
    "a": "ekd",
    "b": "eager",
    **planned,
    **resident_of_both,
    "peak_ratio": ours["peak_bytes"] / theirs["peak_bytes"],
    "step_peak_ratio": ours["step_peak_bytes"] / theirs["step_peak_bytes"],
  }


def table(records: list[dict[str, Any]]) -> Table:
  """All comparisons, in MiB."""
  shown = timing.table(
    "memory, MiB: A is our ekd step, B is eager PyTorch's",
    [
      "case",
      *("XLA\narguments", "XLA\noutputs", "XLA\naliased", "XLA\nscratch"),
      *("A\nprocess", "B\nprocess", "A / B"),
      *("A\nsteps", "B\nsteps", "A / B"),
    ],
    words=1,
  )
  for r in records:
    shown.add_row(
      r["case"],
      *(
        f"{r[f'{name}_bytes'] / MEBIBYTE:.0f}"
        for name in ("argument", "output", "alias", "temp")
      ),
      *(f"{r[f'peak_bytes_{side}'] / MEBIBYTE:.0f}" for side in "ab"),
      f"{r['peak_ratio']:.2f}",
      *(f"{r[f'step_peak_bytes_{side}'] / MEBIBYTE:.0f}" for side in "ab"),
      f"{r['step_peak_ratio']:.2f}",
    )
  return shown


def _peak_bytes() -> int:
  """VmHWM: the largest resident set since the start or since it was reset."""
  status = (_PROCESS / "status").read_text()
  return 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", status)[1])


if __name__ == "__main__":
  command_line.main(Options, run)
