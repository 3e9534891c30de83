"""A data set is two pairs of plain arrays and the facts about them.

Images stay uint8 `[N, H, W, C]` until the compiled step normalises them: a
quarter of the memory and of the transfer, and nothing about the pixels is
decided before the device sees them.

The facts (`DatasetInfo`) are constants in this file, so planning a run needs
no data.
"""

import dataclasses
import os

import numpy as np

from ekd_jax.data import cifar, digits, sources, svhn
from ekd_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
  """Facts about a data set, known before any of it is read.

  Attributes:
    name: what the user types.
    image_shape: (height, width, channels) of the stored images; of a streamed
      set those of the views that its workers make.
    num_classes: labels run from 0 to num_classes - 1.
    train_examples: images in the whole training part.
    test_examples: images in the whole test part.
    mean: per channel mean of the training pixels, black = 0 and white = 1.
    std: per channel standard deviation, in the same unit.
    crop_padding: pixels added on each side before the random crop.
    flip: whether a mirrored image is still an image of its class.
    reflect: whether the padding is the image mirrored, and not zeros.
    side: height and width that the step enlarges stored images to before they
      are cropped (and `crop_padding` is added); None leaves them as they are.
    streamed: whether the images do not fit into memory, see `stream`.
  """

  name: str
  image_shape: tuple[int, int, int]
  num_classes: int
  train_examples: int
  test_examples: int
  mean: tuple[float, ...]
  std: tuple[float, ...]
  crop_padding: int
  flip: bool
  reflect: bool = False
  side: int | None = None
  streamed: bool = False

  @property
  def input_shape(self) -> tuple[int, int, int]:
    """(height, width, channels) of what the network is given."""
    height, width, channels = self.image_shape
    return (self.side or height, self.side or width, channels)


_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)
# The CIFAR means and deviations are the published statistics of the training
# images, in the four digits that the distillation literature uses. The
# CIFAR-10 deviations among them are the customary ones: means of per-image
# deviations, smaller than that of all pixels together (.247, .243, .262).
# Everybody's numbers depend on them, so they are kept.
_INFO = {
  "cifar100": DatasetInfo(
    name="cifar100",
    image_shape=(32, 32, 3),
    num_classes=100,
    train_examples=50_000,
    test_examples=10_000,
    mean=(0.5071, 0.4865, 0.4409),
    std=(0.2673, 0.2564, 0.2762),
    crop_padding=4,
    flip=True,
  ),
  "cifar10": DatasetInfo(
    name="cifar10",
    image_shape=(32, 32, 3),
    num_classes=10,
    train_examples=50_000,
    test_examples=10_000,
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2023, 0.1994, 0.2010),
    crop_padding=4,
    flip=True,
  ),
  # No flip: a mirrored digit is not a digit. Mean and deviation are the
  # customary ones of the training images.
  "svhn": DatasetInfo(
    name="svhn",
    image_shape=(32, 32, 3),
    num_classes=svhn.NUM_CLASSES,
    train_examples=svhn.TRAIN_EXAMPLES,
    test_examples=svhn.TEST_EXAMPLES,
    mean=(0.4377, 0.4438, 0.4728),
    std=(0.1980, 0.2010, 0.1970),
    crop_padding=4,
    flip=False,
  ),
  # Cropped and mirrored by the workers. The statistics are ImageNet's, which
  # are customary for any photographs.
  "imagenet": DatasetInfo(
    name="imagenet",
    image_shape=(224, 224, 3),
    num_classes=1000,
    train_examples=1_281_167,
    test_examples=50_000,
    mean=_IMAGENET_MEAN,
    std=_IMAGENET_STD,
    crop_padding=0,
    flip=False,
    streamed=True,
  ),
  # Classes and examples are counted when the folder is read.
  "folder": DatasetInfo(
    name="folder",
    image_shape=(224, 224, 3),
    num_classes=0,
    train_examples=0,
    test_examples=0,
    mean=_IMAGENET_MEAN,
    std=_IMAGENET_STD,
    crop_padding=0,
    flip=False,
    streamed=True,
  ),
  # Statistics computed from the 1,437 training images. One pixel of padding
  # is to 8 pixels what four are to 32. No flip: a mirrored 2 is not a 2.
  "digits": DatasetInfo(
    name="digits",
    image_shape=(8, 8, 1),
    num_classes=10,
    train_examples=digits.TRAIN_EXAMPLES,
    test_examples=digits.TEST_EXAMPLES,
    mean=(0.3054,),
    std=(0.3753,),
    crop_padding=1,
    flip=False,
  ),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
  """The arrays of one data set, in host memory.

  Attributes:
    info: facts about the whole published set; after `restrict` the arrays
      are shorter than it says, so count examples with `len(train_labels)`.
    train_images: uint8 [N, H, W, C].
    train_labels: int32 [N], each in [0, num_classes).
    test_images: uint8 [M, H, W, C].
    test_labels: int32 [M].
    validation_images: uint8 [V, H, W, C], V = 0 unless `restrict` held out
      some.
    validation_labels: int32 [V].
  """

  info: DatasetInfo
  train_images: np.ndarray
  train_labels: np.ndarray
  test_images: np.ndarray
  test_labels: np.ndarray
  validation_images: np.ndarray
  validation_labels: np.ndarray

  @property
  def train_count(self) -> int:
    """Images that are trained on."""
    return len(self.train_labels)


def info(name: str) -> DatasetInfo:
  """Returns the facts about a data set, without reading any data.

  Args:
    name: "cifar100", "cifar10", "svhn", "imagenet", "folder" or "digits".

  Raises:
    UserError: there is no data set of that name.
  """
  if name not in _INFO:
    raise UserError(
      f"--dataset {name} is not known: choose one of {', '.join(_INFO)}"
    )
  return _INFO[name]


def load(
  name: str,
  data_dir: str | os.PathLike | None = None,
  *,
  download: bool = False,
) -> Dataset:
  """Reads a data set into memory.

  `digits` comes with scikit-learn and needs no files. For the CIFARs the
  first of these that exists under `data_dir` is read, and if it is damaged
  that is an error, never a reason to try the next:

  1. a set prepared by TensorFlow Datasets as array_record,
     `data_dir/cifar100/<version>/`;
  2. the official archive `cifar-100-binary.tar.gz` (it is not unpacked on
     disk);
  3. its unpacked folder `cifar-100-binary/`, or that folder's files lying in
     `data_dir` itself;
  4. with `download=True`, the official archive, fetched into `data_dir`.

  The order of the images is that of the official files, whichever source is
  read (TensorFlow Datasets shuffles when it writes; `prepared` undoes that).
  It matters: "the first N training images" and the images behind a batch
  number are the same wherever the data came from.

  Args:
    name: "cifar100", "cifar10", "svhn" or "digits".
    data_dir: directory to look in; required for all but digits.
    download: whether the network may be used. Nothing is ever fetched
      otherwise.

  Returns:
    The whole data set, with an empty validation part.

  Raises:
    UserError: unknown name, nothing found (the message lists the places),
      damaged or unreadable files, or a failed download.
    ValueError: a streamed set.
  """
  facts = info(name)
  if facts.streamed:
    raise ValueError(f"{name} is streamed: use large.load")
  if name == "digits":
    arrays = digits.read()
  elif name == "svhn":
    arrays = svhn.read(data_dir, download)
  else:
    arrays = sources.read(name, cifar.LAYOUTS[name], data_dir, download)
  train_images, train_labels, test_images, test_labels = arrays
  return Dataset(
    info=facts,
    train_images=train_images,
    train_labels=train_labels,
    test_images=test_images,
    test_labels=test_labels,
    validation_images=train_images[:0],
    validation_labels=train_labels[:0],
  )


def restrict(
  dataset: Dataset,
  *,
  train_examples: int | None = None,
  validation_examples: int = 0,
) -> Dataset:
  """Holds out validation images, then shortens the training part.

  The LAST `validation_examples` training images become the validation part;
  of those left, the FIRST `train_examples` are trained on. So the validation
  images stay the same when fewer are trained on. The test part is not
  touched. Nothing is copied: the arrays are views.

  Args:
    dataset: as `load` gave it.
    train_examples: images to train on, at least 1; None for all that are
      left.
    validation_examples: images to hold out, at least 0.

  Raises:
    UserError: the two numbers overlap or are out of range, or validation
      images have been held out before.
  """
  total = len(dataset.train_labels)
  name = dataset.info.name
  if validation_examples and len(dataset.validation_labels):
    raise UserError(
      f"--validation-examples {validation_examples} of {name}: "
      f"{len(dataset.validation_labels)} images are held out already; hold "
      "out once, from the data set as it was loaded"
    )
  train_examples = count_training_examples(
    name,
    total,
    train_examples=train_examples,
    validation_examples=validation_examples,
  )
  left = total - validation_examples
  changes = {
    "train_images": dataset.train_images[:train_examples],
    "train_labels": dataset.train_labels[:train_examples],
  }
  if validation_examples:
    changes["validation_images"] = dataset.train_images[left:]
    changes["validation_labels"] = dataset.train_labels[left:]
  return dataclasses.replace(dataset, **changes)


def count_training_examples(
  name: str,
  total: int,
  *,
  train_examples: int | None = None,
  validation_examples: int = 0,
) -> int:
  """How many images `restrict` leaves to train on; needs no data.

  Args:
    name: of the data set, for the message.
    total: training images before anything is held out.
    train_examples: see `restrict`.
    validation_examples: see `restrict`.

  Raises:
    UserError: the two numbers overlap or are out of range.
  """
  if not 0 <= validation_examples < total:
    raise UserError(
      f"--validation-examples {validation_examples} of {name} is out of "
      f"range: give 0 to {total - 1}, so that an image is left to train on"
    )
  left = total - validation_examples
  if train_examples is None:
    return left
  if not 1 <= train_examples <= left:
    raise UserError(
      f"--train-examples {train_examples} of {name} is out of range: give 1 "
      f"to {left} ({total} training images less {validation_examples} held "
      "out by --validation-examples)"
    )
  return train_examples
