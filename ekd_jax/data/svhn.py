"""Street View House Numbers, the cropped digits (Netzer et al. 2011).

The official files are MATLAB's: `train_32x32.mat` and `test_32x32.mat`, each
with "X" uint8 [32, 32, 3, N] and "y" [N, 1], where the digit 0 is called 10.
SciPy reads them; unlike a pickle they run no code. The larger "extra" part is
not used.
"""

import os
import zlib

import numpy as np
from etils import epath

from ekd_jax import storage
from ekd_jax.data import download, prepared
from ekd_jax.errors import UserError

TRAIN_EXAMPLES = 73_257
TEST_EXAMPLES = 26_032
NUM_CLASSES = 10

_ADDRESS = "http://ufldl.stanford.edu/housenumbers/"
# Sizes and checksums are those TensorFlow Datasets holds its downloads to.
_FILES = {
  "train": (
    "train_32x32.mat",
    182_040_794,
    "435e94d69a87fde4fd4d7f3dd208dfc32cb6ae8af2240d066de1df7508d083b8",
  ),
  "test": (
    "test_32x32.mat",
    64_275_384,
    "cdce80dfb2a2c4c6160906d0bd7c68ec5a99d7ca4831afa54f09182025b6a75b",
  ),
}
_PREPARED = "svhn_cropped"

# What SciPy raises for altered files, besides its own error.
_DAMAGE = (OSError, ValueError, TypeError, LookupError, zlib.error)

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def read(data_dir: str | os.PathLike | None, may_download: bool) -> Arrays:
  """Reads a TFDS-prepared set, or the official files, under `data_dir`.

  Args:
    data_dir: directory to look in.
    may_download: whether to fetch the files into it if nothing is there.

  Returns:
    Train images uint8 [N, 32, 32, 3], train labels int32 [N], test images
    and test labels, in the order of the official files.

  Raises:
    UserError: no directory was given, nothing was found in it, or what was
      found cannot be used.
  """
  if data_dir is None:
    raise UserError(
      "--dataset svhn needs --data-dir DIR, the directory that holds "
      "train_32x32.mat and test_32x32.mat; add --download to have them "
      "fetched into DIR, or use --dataset digits, which needs no files"
    )
  root = storage.path(os.path.expanduser(data_dir))
  counts = {"train": TRAIN_EXAMPLES, "test": TEST_EXAMPLES}
  with storage.reached(root, "--data-dir"):
    version = prepared.find(root / _PREPARED)
    found = [name for name, *_ in _FILES.values() if (root / name).exists()]
  if version is not None:
    return prepared.read(version, _PREPARED, counts, NUM_CLASSES)
  if not found and not may_download:
    raise UserError(
      f"--data-dir {root} has no svhn; looked for "
      f"{_PREPARED}/<version>/dataset_info.json, train_32x32.mat and "
      "test_32x32.mat: add --download to fetch them there, or use --dataset "
      "digits, which needs no files"
    )
  arrays: list[np.ndarray] = []
  for split, (name, size, sha256) in _FILES.items():
    if name not in found:
      if not may_download or storage.is_remote(root):
        raise UserError(
          f"{root / name} is missing: fetch {_ADDRESS}{name} and put it there"
        )
      download.fetch(_ADDRESS + name, root / name, size=size, sha256=sha256)
    arrays += _read_file(root / name, counts[split])
  return tuple(arrays)


def _read_file(path: epath.Path, count: int) -> tuple[np.ndarray, np.ndarray]:
  # Takes 0.3 s, and is needed by those who read such a file only.
  import scipy.io

  try:
    with path.open("rb") as file:
      contents = scipy.io.loadmat(file, variable_names=("X", "y"))
    images, labels = contents["X"], contents["y"].reshape(-1)
  except (*_DAMAGE, scipy.io.matlab.MatReadError) as error:
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    raise _not_official(path, reason) from error
  if images.shape != (32, 32, 3, count) or images.dtype != np.uint8:
    raise _not_official(
      path, f"X is {images.dtype}{list(images.shape)}, not [32, 32, 3, {count}]"
    )
  if labels.shape != (count,) or not np.isin(labels, range(1, 11)).all():
    raise _not_official(path, f"y is not {count} numbers from 1 to 10")
  images = np.ascontiguousarray(images.transpose(3, 0, 1, 2))
  return images, (labels % 10).astype(np.int32)


def _not_official(path: epath.Path, reason: str) -> UserError:
  return UserError(
    f"{path} is not the official file ({reason}): delete it, then fetch it "
    "again with --download"
  )
