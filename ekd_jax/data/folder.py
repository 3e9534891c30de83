"""Any image folder as a data set: one folder per class.

    DATA/train/CLASS/*.jpg      DATA/val/CLASS/*.jpg

as ImageNet and most private sets are kept; Tiny ImageNet's own form
(train/CLASS/images/*, val/images/* with val_annotations.txt) is read too. The
classes are numbered in the order of their names.

Only names are read here. The order of the examples goes round the classes, the
first of each, the second of each, ..., so that "the first N training images"
are of all of them.
"""

import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from etils import epath
from rich.console import Console
from rich.progress import track

from ekd_jax import storage
from ekd_jax.errors import UserError

TRAIN, TEST = "train", "val"
_TEST_NAMES = (TEST, "test", "validation")
_ENDINGS = (
  ".jpg",
  ".jpeg",
  ".png",
  ".bmp",
  ".gif",
  ".webp",
  ".ppm",
  ".tif",
  ".tiff",
)
_LABEL_FILE = "val_annotations.txt"


class Split(NamedTuple):
  """The files of one part.

  Attributes:
    folder: what `files` are relative to.
    files: names.
    labels: int32 [N], the class of each.
  """

  folder: epath.Path
  files: Sequence[str]
  labels: np.ndarray

  def __len__(self) -> int:
    return len(self.files)

  def read(self, index: int) -> tuple[bytes, int]:
    """The bytes of a file, and its class."""
    content = (self.folder / self.files[index]).read_bytes()
    return content, int(self.labels[index])

  def name(self, index: int) -> str:
    """What a message calls it."""
    return str(self.folder / self.files[index])


class Folder(NamedTuple):
  """What is in an image folder.

  Attributes:
    classes: their names, in order.
    train: training files.
    test: test files.
  """

  classes: tuple[str, ...]
  train: Split
  test: Split

  @property
  def counts(self) -> dict[str, int]:
    """Examples of each part."""
    return {"train": len(self.train.files), "test": len(self.test.files)}


def read(data_dir: str | os.PathLike | None, name: str = "folder") -> Folder:
  """Finds the images.

  Args:
    data_dir: the folder that holds train/ and val/.
    name: of the data set, for the message.

  Raises:
    UserError: there is no such folder, a part or a class has no images, or
      the two parts have different classes.
  """
  if data_dir is None:
    raise UserError(
      f"--dataset {name} needs --data-dir DIR, with DIR/train/CLASS/* and "
      "DIR/val/CLASS/*"
    )
  root = storage.path(os.path.expanduser(data_dir))
  with storage.reached(root, "--data-dir"):
    return _read(root)


def _read(root: epath.Path) -> Folder:
  train = root / TRAIN
  test = next((root / n for n in _TEST_NAMES if (root / n).is_dir()), None)
  if not train.is_dir() or test is None:
    missing = TRAIN if not train.is_dir() else "/ or ".join(_TEST_NAMES)
    raise UserError(
      f"--data-dir {root} has no folder {missing}/: give one with "
      f"{TRAIN}/CLASS/* and {TEST}/CLASS/*"
    )
  by_class = _files_by_class(train)
  classes = tuple(sorted(by_class))
  if len(classes) < 2:
    raise UserError(
      f"{train} has {len(classes)} folders: it needs one for each class, and "
      "two of them at least"
    )
  labels = test / _LABEL_FILE
  if labels.is_file():
    test_by_class = _files_by_label(test, labels, classes)
  else:
    test_by_class = _files_by_class(test)
  _check_same(train, by_class, test, test_by_class)
  return Folder(
    classes,
    _in_rounds(train, by_class, classes),
    _in_rounds(test, test_by_class, classes),
  )


def _files_by_class(part: epath.Path) -> dict[str, list[str]]:
  """{class: its files, relative to the part}."""
  folders = [
    folder
    for folder in part.iterdir()
    if folder.is_dir() and not folder.name.startswith(".")
  ]
  # A million names take half a minute. To standard error: it is no result.
  screen = Console(stderr=True)
  return {
    folder.name: _images_below(folder, folder.name)
    for folder in track(
      folders,
      f"looking for images in {part}",
      console=screen,
      transient=True,
      disable=not screen.is_terminal,
    )
  }


def _images_below(folder: epath.Path, prefix: str) -> list[str]:
  names = []
  for entry in folder.iterdir():
    if entry.name.startswith("."):
      continue  # What an operating system or an editor keeps there.
    if entry.is_dir():
      names += _images_below(entry, f"{prefix}/{entry.name}")
    elif entry.name.lower().endswith(_ENDINGS):
      names.append(f"{prefix}/{entry.name}")
  return sorted(names)


def _files_by_label(
  part: epath.Path, labels: epath.Path, classes: Sequence[str]
) -> dict[str, list[str]]:
  """Of a file with "NAME CLASS ..." lines, images beside it in images/."""
  if not (part / "images").is_dir():
    raise UserError(
      f"{labels} is there, and {part / 'images'}/ is not: put the images of "
      "its lines there"
    )
  present = set(_images_below(part / "images", "images"))
  files: dict[str, list[str]] = {name: [] for name in classes}
  try:
    lines = labels.read_text("utf-8").splitlines()
  except (OSError, ValueError) as error:
    raise UserError(f"{labels} cannot be read: {error}") from error
  for number, line in enumerate(lines, 1):
    words = line.split()
    if not words:
      continue
    if len(words) < 2 or words[1] not in files:
      raise UserError(
        f"{labels}, line {number}: {line[:60]!r} does not name a file and one "
        f"of the {len(classes)} classes of {TRAIN}/"
      )
    name = f"images/{words[0]}"
    if name not in present:
      raise UserError(
        f"{labels}, line {number}: there is no image {part / name}"
      )
    present.discard(name)
    files[words[1]].append(name)
  if present:
    raise UserError(
      f"{labels} does not say of what class {part / min(present)} is"
      + (f", nor {len(present) - 1} others" if len(present) > 1 else "")
    )
  return {name: sorted(found) for name, found in files.items()}


def _check_same(
  train: epath.Path,
  by_class: dict[str, list[str]],
  test: epath.Path,
  test_by_class: dict[str, list[str]],
) -> None:
  for here, mine, there, theirs in (
    (train, by_class, test, test_by_class),
    (test, test_by_class, train, by_class),
  ):
    only = sorted(mine.keys() - theirs.keys())
    if only:
      more = f" and {len(only) - 1} others" if len(only) > 1 else ""
      raise UserError(
        f"{here} has a class {only[0]}{more} that {there} has not: both need "
        "the same folders"
      )
    empty = sorted(name for name, files in mine.items() if not files)
    if empty:
      more = f" (and {len(empty) - 1} other classes)" if len(empty) > 1 else ""
      raise UserError(
        f"{here / empty[0]}{more} has no images: files ending in "
        f"{' '.join(_ENDINGS)} are"
      )


def _in_rounds(
  part: epath.Path, by_class: dict[str, list[str]], classes: Sequence[str]
) -> Split:
  found = sorted(
    (position, label, file)
    for label, name in enumerate(classes)
    for position, file in enumerate(by_class[name])
  )
  return Split(
    part,
    [file for _, _, file in found],
    np.array([label for _, label, _ in found], np.int32),
  )
