"""What the compiled step is given besides the state, step after step.

A set in memory lives on the devices whole: a step gets all of it and this
epoch's order, and picks its rows itself. A streamed one comes batch by batch
from worker processes (`data.stream`). Both can begin at any step.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax

from ekd_jax import evaluation
from ekd_jax.config import Config
from ekd_jax.data import (
  Dataset,
  DatasetInfo,
  LargeDataset,
  epoch_order,
  stream,
)
from ekd_jax.methods import Method
from ekd_jax.training import parallel

# More would wait for the disk.
_MOST_WORKERS = 16

Progress = Callable[[int, int], None]


def from_memory(
  dataset: Dataset,
  order_key: jax.Array,
  steps: range,
  epoch_steps: int,
  devices: parallel.Devices,
) -> Iterator[tuple[Any, ...]]:
  """Yields (examples, order) of every step.

  Args:
    dataset: what is trained on.
    order_key: the root of all orders.
    steps: those to come, counted from 0.
    epoch_steps: how many make an epoch.
    devices: where the arrays are put.
  """
  examples = parallel.replicate(
    {"image": dataset.train_images, "label": dataset.train_labels}, devices
  )
  order = None
  for step in steps:
    if order is None or step % epoch_steps == 0:
      order = parallel.replicate(
        epoch_order(order_key, step // epoch_steps, dataset.train_count),
        devices,
      )
    yield examples, order


def from_stream(
  config: Config,
  dataset: LargeDataset,
  steps: range,
  broken: stream.Broken,
  devices: parallel.Devices,
  views: int = 1,
) -> Iterator[tuple[Any, ...]]:
  """Yields (batch,) of every step.

  Args:
    config: how images are seen.
    dataset: what is trained on.
    steps: those to come, counted from 0.
    broken: told of files that cannot be used.
    devices: where the batches are put.
    views: of each image; see `Method`.
  """
  source = stream.TrainingBatches(
    dataset.train,
    view_of(config),
    batch_size=config.batch_size,
    rows=parallel.own_rows(config.batch_size, devices),
    total_steps=steps.stop,
    views=views,
  )
  made = stream.batches(source, steps.start, workers=workers(config))
  with contextlib.closing(made):
    for batch in made:
      batch = broken.take(dataset.train, batch)
      yield (parallel.shard_own(batch, devices),)


def pass_over(
  config: Config,
  files: stream.Files,
  broken: stream.Broken,
  devices: parallel.Devices,
  progress: Progress,
) -> Iterator[dict[str, Any]]:
  """Yields this process's rows of the batches of an evaluation."""
  size = min(config.evaluation_batch_size, len(files))
  size = -(-size // len(devices)) * len(devices)
  source = stream.TestBatches(
    files,
    view_of(config),
    batch_size=size,
    rows=parallel.own_rows(size, devices),
  )
  made = stream.batches(source, 0, workers=workers(config))
  with contextlib.closing(made):
    for number, batch in enumerate(made):
      yield broken.take(files, batch)
      progress(min((number + 1) * size, len(files)), len(files))


def evaluator(
  config: Config,
  info: DatasetInfo,
  part: Any,
  method: Method,
  devices: parallel.Devices,
  broken: stream.Broken,
  progress: Progress = lambda done, total: None,
) -> evaluation.Evaluate:
  """The function that scores a split.

  Args:
    config: how many images at a time, and how large ones are seen.
    info: facts about the data.
    part: one of `evaluation.splits`.
    method: whose predictions are scored.
    devices: where it runs.
    broken: told of files that cannot be used.
    progress: told of each batch that was read, as images so far and in all;
      for streamed sets, whose evaluation can take minutes.
  """
  if info.streamed:
    return evaluation.make_stream_evaluate(
      method,
      info,
      lambda: pass_over(config, part, broken, devices, progress),
      devices=devices,
    )
  return evaluation.make_evaluate(
    method,
    info,
    *part,
    batch_size=config.evaluation_batch_size,
    devices=devices,
  )


def view_of(config: Config) -> stream.View:
  """How a config's large images are seen."""
  return stream.View(config.image_size, config.crop, config.seed)


def workers(config: Config) -> int:
  """Processes that read images."""
  if config.workers is not None:
    return config.workers
  return min(os.cpu_count() or 1, _MOST_WORKERS)
