"""Images per second that worker processes read, and what a step consumes.

    python benchmarks/stream.py --data-dir DIR --network imagenet_resnet \\
        --variant 18 --image-size 64

reads an image folder as a training does, without training; then trains on one
batch again and again, without reading. A training waits for its images only if
the first number is smaller than the second.
"""

import dataclasses
import time
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

import command_line
import timing
from ekd_jax import config as configs
from ekd_jax.config import Config


@dataclasses.dataclass(frozen=True)
class Options:
  """Times a stream of images and the step that takes them."""

  # The image folder.
  data_dir: str

  # The network; see the experiments.
  network: str = "imagenet_resnet"

  # Which of them.
  variant: str = "18"

  # Pixels of a side.
  image_size: int = 64

  # Images per step.
  batch_size: int = 128

  # Worker processes, one row of the table each; 0 are threads.
  workers: Annotated[tuple[int, ...], tyro.conf.arg(metavar="N N ...")] = (
    0,
    1,
    2,
  )

  # Batches of each measurement.
  batches: int = 20

  # Where the records are written.
  json: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None


def run(options: Options, console: Console) -> None:
  """Measures what the options ask for.

  Raises:
    UserError: an option that cannot be used.
  """
  command_line.require_at_least_one(options, "batches", "batch_size")
  timing.write_json(options.json, [])
  config = configs.resolve(
    Config(
      dataset="folder",
      data_dir=options.data_dir,
      network=options.network,
      variant=options.variant,
      image_size=options.image_size,
      batch_size=options.batch_size,
      ratios=(0.5, 0.75),
    )
  )
  rows = []
  for workers in options.workers:
    command_line.say(console, f"reading with {workers} workers")
    rate = reading(config, workers, options.batches)
    rows.append({"what": f"stream, {workers} workers", "images_per_s": rate})
    timing.write_json(options.json, rows)
  command_line.say(console, "compiling and training")
  rows.append(
    {"what": "step", "images_per_s": training(config, options.batches)}
  )
  timing.write_json(options.json, rows)
  table = Table(title=f"{options.image_size} pixels, batch {config.batch_size}")
  table.add_column("")
  table.add_column("images/s", justify="right")
  for row in rows:
    table.add_row(row["what"], f"{row['images_per_s']:.0f}")
  console.print(table)


def reading(config: Config, workers: int, batches: int) -> float:
  """Images per second, once the first batch is there."""
  from ekd_jax import build
  from ekd_jax.data import stream
  from ekd_jax.training import feeding

  source = stream.TrainingBatches(
    build.load_data(config).train,
    feeding.view_of(config),
    batch_size=config.batch_size,
    rows=slice(None),
    total_steps=1_000_000,
  )
  found = stream.batches(source, 0, workers=workers)
  next(found)
  begin = time.perf_counter()
  for _ in range(batches):
    next(found)
  seconds = time.perf_counter() - begin
  found.close()
  return batches * config.batch_size / seconds


def training(config: Config, batches: int) -> float:
  """Images per second of the step on one batch that is always the same."""
  import jax
  import numpy as np

  from ekd_jax import build
  from ekd_jax.training import parallel, step

  devices = jax.devices()[:1]
  info = build.dataset_info(config)
  method = build.method(config, batches)
  train_step = parallel.per_device(
    step.make_stream_step(method, info), devices, donate_argnums=(0,)
  )
  random = np.random.default_rng(0)
  shape = (config.batch_size, *info.image_shape)
  batch = parallel.shard(
    {
      "image": random.integers(0, 256, shape, np.uint8),
      "label": random.integers(0, info.num_classes, shape[0], np.int32),
    },
    devices,
  )
  state = parallel.replicate(
    step.init_state(method, info, config.seed), devices
  )
  for _ in range(2):
    state, _ = jax.block_until_ready(train_step(state, batch))
  begin = time.perf_counter()
  for _ in range(batches):
    state, _ = jax.block_until_ready(train_step(state, batch))
  return batches * config.batch_size / (time.perf_counter() - begin)


if __name__ == "__main__":
  command_line.main(Options, run)
