"""The official CIFAR binary files, unpacked or still in their archive.

A file is a row of fixed-size records: the label bytes (CIFAR-100 has a coarse
one before the fine one), then 1,024 red, 1,024 green and 1,024 blue pixels of
a 32 x 32 image. There is no header and no checksum, so sizes and label ranges
are what tells a good file from a bad one, and both are checked.

Archives are read as a stream and never unpacked on disk. The other official
form, Python pickles, is not read at all: unpickling a file runs whatever code
its author put there.
"""

import dataclasses
import gzip
import os
import tarfile
import zlib
from typing import BinaryIO

import numpy as np
from etils import epath

from ekd_jax import storage
from ekd_jax.errors import UserError

_PIXELS = 3 * 32 * 32
_CHUNK = 1 << 20

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Layout:
  """What the official files of one data set are called and contain.

  Attributes:
    archive: name of the archive; its address ends in the same name.
    archive_bytes: exact size of the official archive.
    archive_sha256: its checksum. Only downloads are held to these two: the
      same files packed again by somebody else are as good.
    folder: the directory inside the archive.
    train_files: names of the training files, in order.
    test_file: name of the test file.
    train_records: records in EACH training file.
    test_records: records in the test file.
    labels: (name, number of values) of each label byte; the last one is the
      class.
  """

  archive: str
  archive_bytes: int
  archive_sha256: str
  folder: str
  train_files: tuple[str, ...]
  test_file: str
  train_records: int
  test_records: int
  labels: tuple[tuple[str, int], ...]

  @property
  def record_bytes(self) -> int:
    return len(self.labels) + _PIXELS

  @property
  def file_bytes(self) -> dict[str, int]:
    """File name -> exact size, training files first and in order."""
    sizes = dict.fromkeys(
      self.train_files, self.train_records * self.record_bytes
    )
    sizes[self.test_file] = self.test_records * self.record_bytes
    return sizes

  @property
  def counts(self) -> dict[str, int]:
    """Examples of each part."""
    train = self.train_records * len(self.train_files)
    return {"train": train, "test": self.test_records}

  @property
  def num_classes(self) -> int:
    """Values of the label that is the class."""
    return self.labels[-1][1]


# Sizes and checksums are those TensorFlow Datasets holds its downloads to.
LAYOUTS = {
  "cifar100": Layout(
    archive="cifar-100-binary.tar.gz",
    archive_bytes=168_513_733,
    archive_sha256=(
      "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec"
    ),
    folder="cifar-100-binary",
    train_files=("train.bin",),
    test_file="test.bin",
    train_records=50_000,
    test_records=10_000,
    labels=(("coarse label", 20), ("fine label", 100)),
  ),
  "cifar10": Layout(
    archive="cifar-10-binary.tar.gz",
    archive_bytes=170_052_171,
    archive_sha256=(
      "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
    ),
    folder="cifar-10-batches-bin",
    train_files=tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
    test_file="test_batch.bin",
    train_records=10_000,
    test_records=10_000,
    labels=(("label", 10),),
  ),
}


def read_folder(folder: str | os.PathLike, layout: Layout) -> Arrays:
  """Reads the unpacked files.

  Args:
    folder: directory that holds them.
    layout: an entry of `LAYOUTS`.

  Returns:
    Train images uint8 [N, 32, 32, 3], train labels int32 [N], test images
    and test labels, in file order.

  Raises:
    UserError: a file is missing, unreadable or of the wrong size, or a label
      is out of range.
  """
  contents = {}
  for name, size in layout.file_bytes.items():
    path = storage.path(folder) / name
    try:
      found = path.stat().length
      if found != size:
        raise UserError(
          f"{path} has {found:,} bytes instead of {size:,}: unpack "
          f"{layout.archive} again"
        )
      contents[name] = path.read_bytes()
    except FileNotFoundError:
      raise UserError(
        f"{path} is missing although other files of {layout.folder} are "
        f"there: unpack {layout.archive} again"
      ) from None
    except OSError as error:
      raise UserError(
        f"{path} cannot be read: {error.strerror or error}"
      ) from error
  return _assemble(contents, layout, folder)


def read_archive(path: str | os.PathLike, layout: Layout) -> Arrays:
  """Reads the files out of the .tar.gz, without unpacking it on disk.

  Every member is looked at before anything of it is read: absolute names,
  names with "..", links and devices make the whole archive suspect, and it
  is refused. The gzip checksum at the very end is verified too.

  Args:
    path: the archive.
    layout: an entry of `LAYOUTS`.

  Returns:
    As `read_folder`.

  Raises:
    UserError: the archive is truncated, corrupt or suspect, or its files are
      missing, of the wrong size or hold labels out of range.
  """
  path = storage.path(path)
  sizes = layout.file_bytes
  contents = {}
  try:
    with path.open("rb") as file, gzip.open(file) as stream:
      with tarfile.open(fileobj=stream, mode="r|") as archive:
        for member in archive:
          name = _checked_name(member, path, layout)
          if name is None:
            continue
          if name in contents:
            raise _bad_archive(path, layout, f"it holds {name} twice")
          if member.size != sizes[name]:
            raise _bad_archive(
              path,
              layout,
              f"its {member.name} has {member.size:,} bytes instead of "
              f"{sizes[name]:,}",
            )
          contents[name] = _read_member(
            archive.extractfile(member), member, path, layout
          )
      while stream.read(_CHUNK):
        pass
  except (EOFError, zlib.error, tarfile.TarError, gzip.BadGzipFile) as error:
    raise _bad_archive(path, layout, f"damaged: {error}") from error
  except OSError as error:
    raise UserError(
      f"{path} cannot be read: {error.strerror or error}"
    ) from error
  missing = [name for name in sizes if name not in contents]
  if missing:
    raise _bad_archive(path, layout, f"it lacks {', '.join(missing)}")
  return _assemble(contents, layout, path)


def _bad_archive(path: epath.Path, layout: Layout, reason: str) -> UserError:
  return UserError(
    f"{path} ({path.stat().length:,} bytes) is not the official "
    f"{layout.archive} ({reason}): delete it, then fetch it again with "
    "--download"
  )


def _checked_name(
  member: tarfile.TarInfo, path: epath.Path, layout: Layout
) -> str | None:
  """The data file that a member is, or None; UserError if it is unsafe."""
  parts = member.name.replace("\\", "/").split("/")
  if parts[0] == "" or ".." in parts or parts[0].endswith(":"):
    raise _bad_archive(
      path, layout, f"member {member.name!r} points outside of it"
    )
  if member.isdir():
    return None
  if not member.isreg() or member.issparse():
    raise _bad_archive(
      path, layout, f"member {member.name!r} is not a plain file"
    )
  *folder, name = [part for part in parts if part != "."]
  if name in layout.file_bytes and folder in ([], [layout.folder]):
    return name
  return None


def _read_member(
  stream: BinaryIO, member: tarfile.TarInfo, path: epath.Path, layout: Layout
) -> bytearray:
  """Reads in pieces, so that a truncated file can be told how much it had."""
  contents = bytearray()
  try:
    while piece := stream.read(_CHUNK):
      contents += piece
  except (EOFError, zlib.error, tarfile.TarError) as error:
    raise _bad_archive(
      path,
      layout,
      f"{member.name} breaks off after {len(contents):,} of "
      f"{member.size:,} bytes",
    ) from error
  return contents


def _assemble(
  contents: dict[str, bytes | bytearray], layout: Layout, where: epath.Path
) -> Arrays:
  parts = [
    _parse(contents.pop(name), layout, f"{name} of {where}")
    for name in layout.train_files
  ]
  if len(parts) == 1:
    train_images, train_labels = parts[0]
  else:
    train_images = np.concatenate([images for images, _ in parts])
    train_labels = np.concatenate([labels for _, labels in parts])
  test_images, test_labels = _parse(
    contents.pop(layout.test_file), layout, f"{layout.test_file} of {where}"
  )
  return train_images, train_labels, test_images, test_labels


def _parse(
  contents: bytes | bytearray, layout: Layout, where: str
) -> tuple[np.ndarray, np.ndarray]:
  records = np.frombuffer(contents, np.uint8).reshape(-1, layout.record_bytes)
  for column, (label, limit) in enumerate(layout.labels):
    values = records[:, column]
    wrong = np.flatnonzero(values >= limit)
    if wrong.size:
      raise UserError(
        f"{where}: record {wrong[0]} has {label} {values[wrong[0]]}, allowed "
        f"are 0 to {limit - 1}: the file is damaged, delete it and fetch "
        f"{layout.archive} with --download"
      )
  labels = records[:, len(layout.labels) - 1].astype(np.int32)
  planes = records[:, len(layout.labels) :].reshape(-1, 3, 32, 32)
  return np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), labels
