"""SVHN's MATLAB files, with few images."""

import numpy as np
import pytest
import scipy.io

from ekd_jax import data
from ekd_jax.data import svhn
from ekd_jax.errors import UserError

COUNTS = {"train": 30, "test": 20}


@pytest.fixture
def files(tmp_path, monkeypatch):
  monkeypatch.setattr(svhn, "TRAIN_EXAMPLES", COUNTS["train"])
  monkeypatch.setattr(svhn, "TEST_EXAMPLES", COUNTS["test"])
  random = np.random.default_rng(0)
  written = {}
  for split, count in COUNTS.items():
    images = random.integers(0, 256, (count, 32, 32, 3), np.uint8)
    labels = np.arange(count) % 10
    # The digit 0 is called 10; images are stacked along the last axis.
    scipy.io.savemat(
      tmp_path / f"{split}_32x32.mat",
      {
        "X": images.transpose(1, 2, 3, 0),
        "y": np.where(labels == 0, 10, labels).reshape(-1, 1),
      },
      do_compression=True,
    )
    written[split] = images, labels
  return tmp_path, written


def message(folder):
  with pytest.raises(UserError) as caught:
    data.load("svhn", folder)
  assert "\n" not in str(caught.value)
  return str(caught.value)


def test_the_official_files(files):
  folder, written = files
  found = data.load("svhn", folder)
  for split, images, labels in (
    ("train", found.train_images, found.train_labels),
    ("test", found.test_images, found.test_labels),
  ):
    np.testing.assert_array_equal(images, written[split][0])
    np.testing.assert_array_equal(labels, written[split][1])
  assert found.train_labels.dtype == np.int32
  assert not found.info.flip


def test_one_file_is_missing(files):
  folder, _ = files
  (folder / "test_32x32.mat").unlink()
  assert "test_32x32.mat is missing" in message(folder)


def test_nothing_is_there(tmp_path):
  assert "has no svhn; looked for" in message(tmp_path)
  assert "needs --data-dir DIR" in message(None)


@pytest.mark.parametrize("cut", [0, 100, 5000])
def test_a_damaged_file(files, cut):
  folder, _ = files
  path = folder / "train_32x32.mat"
  path.write_bytes(path.read_bytes()[:cut])
  assert "train_32x32.mat is not the official file" in message(folder)


@pytest.mark.parametrize(
  ("name", "value"),
  [
    ("X", np.zeros((32, 32, 3, 29), np.uint8)),
    ("X", np.zeros((32, 32, 3, 30), np.float64)),
    ("y", np.zeros((30, 1))),
    ("y", np.full((30, 1), 11)),
    ("y", np.ones((29, 1))),
  ],
)
def test_other_contents(files, name, value):
  folder, written = files
  contents = {
    "X": written["train"][0].transpose(1, 2, 3, 0),
    "y": np.ones((30, 1)),
  }
  scipy.io.savemat(folder / "train_32x32.mat", contents | {name: value})
  assert f"{name} is" in message(folder)
