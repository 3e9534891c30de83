"""Sets too large for a device's memory: batches made by worker processes.

The n-th batch of a training is a function of the seed and n alone: which
examples it holds (`epoch_order`'s counterpart for the host) and how each is
cropped. So there is no iterator to save: a resumed run asks for the batches
from its step on, and a run on another number of processes or workers gets the
same images. Each process decodes its own rows of a batch only.

grain runs the workers and keeps what they return in order.
"""

import functools
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np

from ekd_jax.data import images
from ekd_jax.errors import UserError

# Batches that each worker has ready before they are asked for.
_AHEAD = 2


class Files(Protocol):
  """Encoded images that can be read in any order, also in another process."""

  def __len__(self) -> int: ...

  def read(self, index: int) -> tuple[bytes, int]:
    """The bytes of an encoded image, and its class."""

  def name(self, index: int) -> str:
    """What a message calls it."""


class Part(NamedTuple):
  """Some of the images, next to each other; `Files` themselves.

  Attributes:
    files: all of them.
    numbers: which.
  """

  files: Files
  numbers: range

  def __len__(self) -> int:
    return len(self.numbers)

  def read(self, index: int) -> tuple[bytes, int]:
    """See `Files`."""
    return self.files.read(self.numbers[index])

  def name(self, index: int) -> str:
    """See `Files`."""
    return self.files.name(self.numbers[index])


class View(NamedTuple):
  """How images are seen.

  Attributes:
    side: of what the network is given, in pixels.
    crop: see `images`.
    seed: of all crops and orders.
  """

  side: int
  crop: images.Crop
  seed: int


class TrainingBatches:
  """The batches of a training, by number; what grain reads from.

  Attributes of a batch: "image" uint8 [n, side, side, 3], of several views
  [n, views, side, side, 3], "label" int32 [n], "broken" int32 [n], the index
  of a file that could not be used, or -1.
  """

  def __init__(
    self,
    files: Files,
    view: View,
    *,
    batch_size: int,
    rows: slice,
    total_steps: int,
    views: int = 1,
  ):
    """Reads nothing yet.

    Args:
      files: the training images.
      view: how they are seen.
      batch_size: of the global batch.
      rows: those of it that this process trains on.
      total_steps: how many batches there are.
      views: how many times an image is cropped, each differently.
    """
    self._files = files
    self._view = view
    self._batch_size = batch_size
    self._rows = range(batch_size)[rows]
    self._total_steps = total_steps
    self._views = views
    self._epoch_steps = len(files) // batch_size

  def __len__(self) -> int:
    return self._total_steps

  def __getitem__(self, step: int) -> dict[str, np.ndarray]:
    epoch, position = divmod(step, self._epoch_steps)
    order = _order(self._view.seed, epoch, len(self._files))
    made = []
    for row in self._rows:
      index = order[position * self._batch_size + row]
      source = _random(self._view.seed, 1 + step, row)
      made.append(
        _example(
          self._files,
          int(index),
          lambda image, source=source: self._seen(image, source),
        )
      )
    return _stacked(made)

  def _seen(self, image: Any, source: np.random.Generator) -> np.ndarray:
    seen = [
      images.for_training(image, self._view.side, self._view.crop, source)
      for _ in range(self._views)
    ]
    return np.stack(seen) if self._views > 1 else seen[0]


class TestBatches:
  """The batches of one pass over all examples in order, the last one padded.

  As `TrainingBatches`; "counted" float32 [n] is 0 for padding.
  """

  __test__ = False  # Not a test, whatever pytest thinks of the name.

  def __init__(self, files: Files, view: View, *, batch_size: int, rows: slice):
    self._files = files
    self._view = view
    self._batch_size = batch_size
    self._rows = range(batch_size)[rows]

  def __len__(self) -> int:
    return -(-len(self._files) // self._batch_size)

  def __getitem__(self, number: int) -> dict[str, np.ndarray]:
    view = self._view
    first = number * self._batch_size
    made = []
    for row in self._rows:
      # Padding repeats the last image, which is decoded again: it is rare.
      index = min(first + row, len(self._files) - 1)
      example = _example(
        self._files,
        index,
        lambda image: images.for_testing(image, view.side, view.crop),
      )
      counted = first + row < len(self._files) and example["broken"] < 0
      made.append({**example, "counted": np.float32(counted)})
    return _stacked(made)


def batches(
  source: TrainingBatches | TestBatches, start: int, *, workers: int
) -> Iterator[dict[str, np.ndarray]]:
  """Yields the batches from number `start` on, made ahead by workers.

  Args:
    source: what makes a batch; it is sent to the workers.
    start: number of the first.
    workers: processes; 0 for threads of this one.
  """
  # Takes 0.5 s, and is needed for large sets only.
  import grain
  from absl import flags

  if not flags.FLAGS.is_parsed():  # grain asks them; there are none to parse.
    flags.FLAGS.mark_as_parsed()
  wanted = grain.MapDataset.source(source).slice(slice(start, None))
  threads = grain.ReadOptions(num_threads=1, prefetch_buffer_size=_AHEAD)
  ahead = wanted.to_iter_dataset(threads)
  if workers:
    # Through a pipe, not shared memory: of that a container has 64 MB by
    # default, and what a process that dies holds of it stays.
    ahead = grain.experimental.WithOptionsIterDataset(
      ahead, grain.experimental.DatasetOptions(min_shm_size=2**40)
    )
    ahead = ahead.mp_prefetch(
      grain.MultiprocessingOptions(workers, per_worker_buffer_size=_AHEAD),
      worker_init_fn=_live_with_the_training,
    )
  made = iter(ahead)
  try:
    yield from made
  finally:
    made.close()


def _live_with_the_training(index: int, count: int) -> None:
  """In a worker: signals are the training's business, its death is ours.

  A terminal sends Ctrl-C, and a machine that is taken away SIGTERM, to all
  processes alike; the training still needs batches for the step it is in.
  Killed, it could not tell its workers, which would wait for ever.
  """
  del index, count
  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)

  def follow() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)

  threading.Thread(target=follow, daemon=True).start()


class Broken:
  """What is done about files that cannot be used.

  Attributes:
    found: names of those that were passed over.
  """

  def __init__(self, *, skip: bool):
    self._skip = skip
    self.found: set[str] = set()

  def take(
    self, files: Files, batch: dict[str, np.ndarray]
  ) -> dict[str, np.ndarray]:
    """A batch of these files without its "broken".

    Raises:
      UserError: there is one, and it is not to be skipped.
    """
    batch = dict(batch)
    for index in batch.pop("broken"):
      if index < 0:
        continue
      name = files.name(index)
      if not self._skip:
        raise UserError(
          f"{name} cannot be used: {_reason(files, index)}; repair or "
          "remove it, or add --skip-broken, which counts such files"
        )
      self.found.add(name)
    return batch


def _reason(files: Files, index: int) -> str:
  try:
    images.decode(files.read(index)[0])
  except (images.BrokenImageError, OSError) as error:
    return str(error)
  return "it could not be read before"


def _example(files: Files, index: int, view: Any) -> dict[str, Any]:
  """One example; another one in the place of a file that is broken."""
  broken = -1
  for offset in range(len(files)):
    candidate = (index + offset) % len(files)
    try:
      content, label = files.read(candidate)
      image = images.decode(content)
    except (images.BrokenImageError, OSError):
      broken = index if broken < 0 else broken
      continue
    return {
      "image": view(image),
      "label": np.int32(label),
      "broken": np.int32(broken),
    }
  raise UserError(f"none of the {len(files)} images can be used")


def _stacked(examples: list[dict[str, Any]]) -> dict[str, np.ndarray]:
  return {
    name: np.stack([example[name] for example in examples])
    for name in examples[0]
  }


@functools.lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
  return _random(seed, 0, epoch).permutation(count)


def _random(seed: int, *what: int) -> np.random.Generator:
  """Random numbers that depend on these numbers (two of `what`) only."""
  numbers = np.random.Philox(key=(seed, 0), counter=(0, 0, *what))
  return np.random.Generator(numbers)
