"""The share of a training step's time that is spent on its input.

    python benchmarks/input.py

A step gathers its rows from the data set in device memory, augments and
normalises them, and then trains. Three programs tell what the first part
costs; all are the training's own step around the training's own method, which
is changed in one place:

    step       as it is, on a data set of CIFAR's size, in a random order
    constant   trains on the same prepared batch every time: nothing reads the
               gathered one, so the compiler leaves its preparation out
    input      prepares the batch and returns it: no training

step and constant run in paired runs, see timing.py; the share is
1 - constant / step of each pair. It is a small difference of two large
numbers on a machine that drifts, so input is timed too: as a share of the
step it has no such noise, but counts what the step may hide behind other
work. Between two epochs the host waits for the next order, which is drawn on
the device and copied to all: its seconds are given as a share of the epoch.
"""

import dataclasses
import statistics
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

import command_line
import timing
import workload
from ekd_jax import data
from ekd_jax.config import Config

# Input alone is short: more steps for each turn of it.
INPUT_STEPS = 50

ORDERS = 9


@dataclasses.dataclass(frozen=True)
class Options(workload.TrainingFlags):
  """Times a step's input against the whole step."""

  # What is trained.
  case: Literal["resnet20x5", "resnet110x4", "all"] = "all"

  # How often both run.
  pairs: int = 9

  # Training steps of each run.
  steps: int = 3

  # Where the records are written.
  json: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None


def run(options: Options, console: Console) -> None:
  """Measures what the options ask for.

  Raises:
    UserError: an option that cannot be used.
  """
  command_line.require_at_least_one(options, "pairs", "steps")
  timing.write_json(options.json, [])
  names = list(workload.CASES) if options.case == "all" else [options.case]
  records = []
  for case in names:
    config = workload.config(
      case,
      **options.settings(),
    )
    command_line.say(console, f"{case}: measuring")
    records.append(measure(case, config, options.pairs, options.steps))
    timing.write_json(options.json, records)
  console.print(table(records))


def measure(
  case: str, config: Config, pairs: int, steps: int
) -> dict[str, Any]:
  """Times all that `record` needs."""
  epoch_steps = data.info(config.dataset).train_examples // config.batch_size

  def program(what: str) -> Any:
    prepare = partial(prepared, config, epoch_steps, what)
    return timing.worker(timing.timed(prepare))

  with program("step") as step, program("constant") as constant:
    found = timing.alternate(step, constant, pairs=pairs, steps=steps)
  with program("input") as alone:
    turns = timing.rounds([alone], count=pairs, steps=INPUT_STEPS)
  input_seconds = statistics.median(seconds for (seconds,) in turns)
  order_seconds = timing.in_worker(seconds_of_an_order, config, epoch_steps)
  return record(case, found, input_seconds, order_seconds, epoch_steps)


def prepared(config: Config, batches: int, what: str) -> workload.Run:
  """`run(steps)` of one of the three programs."""
  workload.prepare_product(config)
  import product_step

  changes = {
    "step": None,
    "constant": partial(on_a_constant_batch, config),
    "input": input_alone,
  }
  return product_step.prepare(config, batches=batches, change=changes[what])


def on_a_constant_batch(config: Config, method: Any) -> Any:
  """The method, training on a batch that is part of its state."""
  from ekd_jax.data import augment

  info = data.info(config.dataset)
  examples = workload.examples(config, batches=1)
  images = augment.normalize(examples["image"], mean=info.mean, std=info.std)
  constant = {"image": np.asarray(images), "label": examples["label"]}

  def train_step(state: Any, batch: Any, rng: Any) -> tuple[Any, Any]:
    del batch
    own, metrics = method.train_step(state["own"], state["batch"], rng)
    return {"own": own, "batch": state["batch"]}, metrics

  return method._replace(
    init=lambda rng, batch: {"own": method.init(rng, batch), "batch": constant},
    train_step=train_step,
  )


def input_alone(method: Any) -> Any:
  """A method whose step hands its batch back."""
  return method._replace(
    init=lambda rng, batch: {},
    train_step=lambda state, batch, rng: (state, batch),
  )


def seconds_of_an_order(config: Config, batches: int) -> float:
  """Median seconds in which an epoch's order is drawn and put in place."""
  workload.prepare_product(config)
  import jax

  from ekd_jax.training import parallel
  from ekd_jax.training.step import root_keys

  key = jax.random.wrap_key_data(root_keys(config.seed)["order"])
  devices, count = jax.devices()[:1], batches * config.batch_size
  seconds = []
  for epoch in range(1 + ORDERS):
    before = time.perf_counter()
    order = parallel.replicate(data.epoch_order(key, epoch, count), devices)
    jax.block_until_ready(order)
    seconds.append(time.perf_counter() - before)
  return statistics.median(seconds[1:])  # The first one compiled.


def record(
  case: str,
  pairs: Sequence[timing.Pair],
  input_seconds: float,
  order_seconds: float,
  epoch_steps: int,
) -> dict[str, Any]:
  """The measurements and their shares as one flat JSON object.

  Args:
    case: its name.
    pairs: seconds per step, and per step on a constant batch.
    input_seconds: of preparing a batch.
    order_seconds: of an epoch's order.
    epoch_steps: how many steps an epoch has.

  Returns:
    A comparison as `timing.record` makes it, and shares in [0, 1], those of
    the pairs but for noise.
  """
  compared = timing.record(case, "step", "constant", pairs)
  shares = [1 - pair.b / pair.a for pair in pairs]
  epoch_seconds = epoch_steps * compared["seconds_a"] + order_seconds
  return compared | {
    "share_median": statistics.median(shares),
    "share_min": min(shares),
    "share_max": max(shares),
    "input_seconds": input_seconds,
    "input_share": input_seconds / compared["seconds_a"],
    "order_seconds": order_seconds,
    "order_share": order_seconds / epoch_seconds,
    "epoch_steps": epoch_steps,
  }


def table(records: Sequence[Mapping[str, Any]]) -> Table:
  """All cases; shares in percent."""
  shown = timing.table(
    "seconds per step, and shares spent on input in percent of the step (of "
    "the epoch for its order)",
    [
      *("case", "step s", "constant s"),
      *("share %", "min", "max", "pairs"),
      *("input s", "share %"),
      *("order s", "share %"),
    ],
    words=1,
  )
  for r in records:
    shown.add_row(
      *(r["case"], f"{r['seconds_a']:.3f}", f"{r['seconds_b']:.3f}"),
      *(f"{100 * r[f'share_{what}']:.2f}" for what in ("median", "min", "max")),
      *(str(r["pairs"]), f"{r['input_seconds']:.5f}"),
      f"{100 * r['input_share']:.2f}",
      *(f"{r['order_seconds']:.4f}", f"{100 * r['order_share']:.3f}"),
    )
  return shown


if __name__ == "__main__":
  command_line.main(Options, run)
