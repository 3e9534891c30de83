"""CIFARs with few records, in the exact formats of the official files."""

import dataclasses
import io
import pathlib
import tarfile
import urllib.request

import numpy as np
import pytest

from ekd_jax.data import cifar


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
  def refuse(*args, **kwargs):
    raise AssertionError("a test reached for the network")

  monkeypatch.setattr(urllib.request, "urlopen", refuse)


@pytest.fixture(params=["cifar100", "cifar10"])
def name(request):
  return request.param


@pytest.fixture
def layouts(monkeypatch):
  """LAYOUTS with 40 or 5 x 8 training records and 20 test records."""
  small = {
    "cifar100": dataclasses.replace(
      cifar.LAYOUTS["cifar100"], train_records=40, test_records=20
    ),
    "cifar10": dataclasses.replace(
      cifar.LAYOUTS["cifar10"], train_records=8, test_records=20
    ),
  }
  monkeypatch.setattr(cifar, "LAYOUTS", small)
  return small


@dataclasses.dataclass
class Small:
  """A small CIFAR: its layout, its files and the arrays they encode."""

  layout: cifar.Layout
  files: dict[str, bytes]
  train_images: np.ndarray
  train_labels: np.ndarray
  test_images: np.ndarray
  test_labels: np.ndarray

  def unpack(self, folder: pathlib.Path) -> pathlib.Path:
    folder.mkdir(parents=True, exist_ok=True)
    for file, contents in self.files.items():
      (folder / file).write_bytes(contents)
    return folder

  def pack(self, data_dir: pathlib.Path, prefix=None) -> pathlib.Path:
    path = data_dir / self.layout.archive
    prefix = self.layout.folder if prefix is None else prefix
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
      folder = tarfile.TarInfo(self.layout.folder)
      folder.type = tarfile.DIRTYPE
      archive.addfile(folder)
      add(archive, f"{self.layout.folder}/readme.txt", b"not data")
      for file, contents in self.files.items():
        add(archive, f"{prefix}/{file}", contents)
    return path

  def assert_equal(self, dataset) -> None:
    for field in (
      "train_images",
      "train_labels",
      "test_images",
      "test_labels",
    ):
      got, wanted = getattr(dataset, field), getattr(self, field)
      assert got.dtype == wanted.dtype
      np.testing.assert_array_equal(got, wanted, err_msg=field)


def add(archive: tarfile.TarFile, name: str, contents: bytes) -> None:
  member = tarfile.TarInfo(name)
  member.size = len(contents)
  archive.addfile(member, io.BytesIO(contents))


@pytest.fixture
def small(layouts, name):
  layout = layouts[name]
  rng = np.random.default_rng(0)
  counts = dict.fromkeys(layout.train_files, layout.train_records)
  counts[layout.test_file] = layout.test_records
  files, images, labels = {}, {}, {}
  for file, count in counts.items():
    pixels = rng.integers(0, 256, (count, 32, 32, 3), np.uint8)
    heads = np.stack(
      [rng.integers(0, limit, count) for _, limit in layout.labels], 1
    )
    # Record by record, as the format's description reads.
    files[file] = b"".join(
      bytes(head.tolist())
      + b"".join(image[:, :, channel].tobytes() for channel in range(3))
      for head, image in zip(heads, pixels, strict=True)
    )
    images[file] = pixels
    labels[file] = heads[:, -1].astype(np.int32)
  return Small(
    layout=layout,
    files=files,
    train_images=np.concatenate([images[f] for f in layout.train_files]),
    train_labels=np.concatenate([labels[f] for f in layout.train_files]),
    test_images=images[layout.test_file],
    test_labels=labels[layout.test_file],
  )
