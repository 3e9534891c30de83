"""Reading what TensorFlow Datasets (TFDS) prepared, without TensorFlow.

TFDS can store a set as array_record, which is read with a small library and
Pillow, or as TFRecord, its default, which only TensorFlow reads. TensorFlow
is not needed to train here, so array_record it must be. Preparing is another
matter: TFDS encodes CIFAR's pixels as PNG with TensorFlow. That is done once,
by one line of Python, with the `tf` extra installed:

    import tensorflow_datasets as tfds
    tfds.builder(
      "cifar100", data_dir="DATA", file_format="array_record"
    ).download_and_prepare()

It downloads the official archive unless that lies in DATA/downloads/manual.
(The `tfds build` command does the same but imports Apache Beam first.)

TFDS shuffles when it writes, always the same way. Every example keeps an "id"
with its place in the official files ("train_00042"), and `read` puts it back
there, so that a run does not depend on which source its data came from.
"""

import io
import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath
from PIL import Image

from ekd_jax import storage
from ekd_jax.errors import UserError

_FORMAT = "array_record"
# Examples decoded per call: large enough to read ahead, small in memory.
_BATCH = 2000
# What TFDS, array_record and Pillow raise for files that are missing, cut
# short or altered; a SyntaxError is Pillow's word for a broken PNG.
DAMAGE = (OSError, ValueError, LookupError, RuntimeError, SyntaxError)


def find(folder: epath.Path) -> epath.Path | None:
  """Returns the newest prepared version under `folder`, or None.

  Args:
    folder: where TFDS keeps the versions of one data set,
      `data_dir/cifar100`. Unfinished preparations are passed over.
  """
  versions = {}
  for file in folder.glob("*/dataset_info.json"):
    if re.fullmatch(r"\d+\.\d+\.\d+", file.parent.name):
      number = tuple(int(part) for part in file.parent.name.split("."))
      versions[number] = file.parent
  return versions[max(versions)] if versions else None


def read(
  version: epath.Path, name: str, counts: dict[str, int], num_classes: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
  """Reads a prepared set of 32 x 32 images in the order of the official files.

  Args:
    version: a directory that `find` returned.
    name: what TFDS calls it.
    counts: examples of "train" and of "test".
    num_classes: labels run from 0 to num_classes - 1.

  Returns:
    Train images uint8 [N, 32, 32, 3], train labels int32 [N], test images
    and test labels.

  Raises:
    UserError: prepared as TFRecord, incomplete, damaged, or not this set.
  """
  check_format(version, name)
  arrays = []
  try:
    for split, count in counts.items():
      arrays += _in_official_order(
        source(version, split), split, count, num_classes
      )
  except DAMAGE as error:
    raise damaged(version, name, error) from error
  return tuple(arrays)


def damaged(version: epath.Path, name: str, error: Exception) -> UserError:
  """What to do about a prepared set that cannot be read."""
  reason = " ".join(f"{type(error).__name__}: {error}".split())
  return UserError(
    f"{version} cannot be read as the {name} of TFDS ({reason[:300]}): "
    f"delete it, then, with ekd-jax[tf] installed, run "
    f"{_command(version, name)}"
  )


def source(version: epath.Path, split: str) -> Sequence[dict[str, Any]]:
  """The examples of a split, with "image" still encoded.

  Args:
    version: a directory that `find` returned and `check_format` accepted.
    split: its name.
  """
  # Takes 0.6 s, and is needed by those who read such a directory only.
  import tensorflow_datasets as tfds

  # Pillow decodes: TFDS would take OpenCV where that is installed, and log a
  # warning where it is not.
  return tfds.builder_from_directory(version).as_data_source(
    split,
    decoders={"image": tfds.decode.SkipDecoding()},
    file_format=_FORMAT,
  )


def check_format(version: epath.Path, name: str) -> None:
  """Refuses what takes TensorFlow to read.

  Args:
    version: a directory that `find` returned.
    name: what TFDS calls the set.

  Raises:
    UserError: it was not prepared as array_record.
  """
  if storage.is_remote(version):
    raise UserError(
      f"{version} is in a bucket, where array_record cannot be read: copy it "
      "to a disk, or put the official files into the bucket"
    )
  file = version / "dataset_info.json"
  try:
    facts = json.loads(file.read_text("utf-8"))
    formats = [facts["fileFormat"], *facts.get("alternativeFileFormats", [])]
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise UserError(
      f"{file} is not readable as a TFDS description: delete {version}, "
      f"then, with ekd-jax[tf] installed, run {_command(version, name)}"
    ) from error
  if _FORMAT not in formats:
    found = "/".join(str(format_) for format_ in formats)
    raise UserError(
      f"{version} was prepared as {found}, which takes TensorFlow to "
      f"read; only {_FORMAT} is read here: delete it, then, with "
      f"ekd-jax[tf] installed, run {_command(version, name)}"
    )


def _command(version: epath.Path, name: str) -> str:
  # TFDS refuses a second format beside the first one, hence "delete it".
  return (
    'python -c "import tensorflow_datasets as tfds; '
    f"tfds.builder('{name}', data_dir='{version.parent.parent}', "
    f"file_format='{_FORMAT}').download_and_prepare()\""
  )


def _in_official_order(
  examples: Sequence[dict[str, Any]], split: str, count: int, num_classes: int
) -> tuple[np.ndarray, np.ndarray]:
  if len(examples) != count:
    raise ValueError(f"{len(examples):,} examples instead of {count:,}")
  images = np.empty((count, 32, 32, 3), np.uint8)
  labels = np.full((count,), -1, np.int32)
  for start in range(0, count, _BATCH):
    keys = range(start, min(start + _BATCH, count))
    for example in examples.__getitems__(keys):
      place = re.fullmatch(rf"{split}_(\d+)", example["id"].decode())
      index = int(place[1]) if place else count
      if index >= count or labels[index] != -1:
        raise ValueError(f"unexpected or repeated id {example['id']!r}")
      image = Image.open(io.BytesIO(example["image"]), formats=["PNG"])
      if (image.size, image.mode) != ((32, 32), "RGB"):
        raise ValueError(f"an image of {image.size} pixels, {image.mode}")
      if not 0 <= example["label"] < num_classes:
        raise ValueError(f"label {example['label']}")
      images[index] = image
      labels[index] = example["label"]
  return images, labels
