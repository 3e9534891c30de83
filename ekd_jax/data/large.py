"""Sets that are streamed: image folders, and ImageNet.

ImageNet is read from what TensorFlow Datasets prepared as array_record, under
DATA/imagenet2012/VERSION, or from folders DATA/train/CLASS, DATA/val/CLASS.
"""

import dataclasses
import functools
import os
from typing import Any

from etils import epath

from ekd_jax import storage
from ekd_jax.data import folder, prepared, stream
from ekd_jax.data.dataset import DatasetInfo, count_training_examples
from ekd_jax.errors import UserError

_PREPARED = "imagenet2012"


@dataclasses.dataclass(frozen=True)
class LargeDataset:
  """The parts of a streamed set.

  Attributes:
    info: facts about it.
    train: what is trained on.
    test: the test part.
    validation: what is held out of training; may be empty.
  """

  info: DatasetInfo
  train: stream.Files
  test: stream.Files
  validation: stream.Files

  @property
  def train_count(self) -> int:
    """Images that are trained on."""
    return len(self.train)


@functools.lru_cache(maxsize=1)
def find(
  name: str, data_dir: str | os.PathLike | None
) -> tuple[stream.Files, stream.Files, int]:
  """Training files, test files and how many classes there are.

  Args:
    name: "folder" or "imagenet".
    data_dir: where they are.

  Raises:
    UserError: there are none, or they are not as they must be.
  """
  if name == "imagenet" and data_dir is not None:
    root = storage.path(os.path.expanduser(data_dir))
    version = prepared.find(root / _PREPARED)
    if version is not None:
      prepared.check_format(version, _PREPARED)
      parts = [_Prepared(version, split) for split in ("train", "validation")]
      try:
        for part in parts:
          len(part)
      except prepared.DAMAGE as error:
        raise prepared.damaged(version, _PREPARED, error) from error
      return *parts, 1000
  found = folder.read(data_dir, name)
  if name == "imagenet" and len(found.classes) != 1000:
    raise UserError(
      f"--data-dir {data_dir} has {len(found.classes)} classes and ImageNet "
      "has 1000: use --dataset folder for other sets"
    )
  return found.train, found.test, len(found.classes)


def load(
  info: DatasetInfo,
  data_dir: str | os.PathLike | None,
  *,
  train_examples: int | None = None,
  validation_examples: int = 0,
) -> LargeDataset:
  """Finds a set and holds out of it, as `dataset.restrict` does.

  Args:
    info: facts about it.
    data_dir: where it is.
    train_examples: images to train on, None for all that are left.
    validation_examples: images to hold out.

  Raises:
    UserError: see `find`; or the two numbers do not fit the set.
  """
  train, test, classes = find(info.name, data_dir)
  if classes != info.num_classes:
    raise UserError(
      f"--data-dir {data_dir} has {classes} classes and --num-classes is "
      f"{info.num_classes}: leave that out, or give the folder it was for"
    )
  total = len(train)
  count = count_training_examples(
    info.name,
    total,
    train_examples=train_examples,
    validation_examples=validation_examples,
  )
  return LargeDataset(
    info,
    stream.Part(train, range(count)),
    test,
    stream.Part(train, range(total - validation_examples, total)),
  )


class _Prepared:
  """One split of a set that TFDS prepared as array_record."""

  def __init__(self, version: epath.Path, split: str):
    self._version = version
    self._split = split

  def __reduce__(self) -> tuple[Any, ...]:
    # A worker opens the files anew.
    return _Prepared, (self._version, self._split)

  def __len__(self) -> int:
    return len(self._source)

  def read(self, index: int) -> tuple[bytes, int]:
    """See `stream.Files`."""
    try:
      example = self._source[index]
      return example["image"], int(example["label"])
    except prepared.DAMAGE as error:
      raise OSError(f"the record cannot be read: {error}") from error

  def name(self, index: int) -> str:
    """See `stream.Files`."""
    try:
      file = self._source[index]["file_name"].decode()
    except prepared.DAMAGE:
      file = f"record {index} of {self._split}"
    return f"{file} in {self._version}"

  @functools.cached_property
  def _source(self) -> Any:
    return prepared.source(self._version, self._split)
