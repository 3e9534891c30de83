"""Which of the files under the data directory are read, and in what order.

One rule: the first source that exists is the one that is read. If it turns
out to be damaged the user is told so; trying the next one silently would make
a run depend on files that nobody looked at.
"""

import os

from etils import epath

from ekd_jax import storage
from ekd_jax.data import cifar, download, prepared
from ekd_jax.errors import UserError

_ADDRESS = "https://www.cs.toronto.edu/~kriz/"


def read(
  name: str,
  layout: cifar.Layout,
  data_dir: str | os.PathLike | None,
  may_download: bool,
) -> cifar.Arrays:
  """Finds and reads one of the CIFARs.

  Args:
    name: "cifar100" or "cifar10".
    layout: what its official files look like.
    data_dir: directory to look in.
    may_download: whether to fetch the archive into it if nothing is there.

  Returns:
    Train images uint8 [N, 32, 32, 3], train labels int32 [N], test images
    and test labels, in the order of the official files.

  Raises:
    UserError: no directory was given, nothing was found in it, or what was
      found cannot be used.
  """
  if data_dir is None:
    raise UserError(
      f"--dataset {name} needs --data-dir DIR, the directory that holds "
      f"{layout.archive}; add --download to have it fetched into DIR, or use "
      "--dataset digits (or --quick), which needs no files"
    )
  root = storage.path(os.path.expanduser(data_dir))
  with storage.reached(root, "--data-dir"):
    names = _names_in(root)

  version = prepared.find(root / name)
  if version is not None:
    return prepared.read(version, name, layout.counts, layout.num_classes)
  archive = root / layout.archive
  if layout.archive in names:
    return cifar.read_archive(archive, layout)
  if layout.folder in names:
    return cifar.read_folder(root / layout.folder, layout)
  if any(file in names for file in layout.file_bytes):
    return cifar.read_folder(root, layout)
  if may_download:
    if storage.is_remote(root):
      raise UserError(
        f"--download cannot fetch into a bucket ({root}): fetch "
        f"{_ADDRESS}{layout.archive} and put it there"
      )
    download.fetch(
      _ADDRESS + layout.archive,
      archive,
      size=layout.archive_bytes,
      sha256=layout.archive_sha256,
    )
    return cifar.read_archive(archive, layout)
  raise UserError(_nothing_found(name, layout, root))


def _names_in(root: epath.Path) -> set[str]:
  """The names in a directory; none if there is no directory.

  Raises:
    UserError: it is a file, or may not be read.
  """
  try:
    return {path.name for path in root.iterdir()}
  except FileNotFoundError:
    return set()
  except NotADirectoryError:
    raise UserError(
      f"--data-dir {root} is a file, or inside one: give a directory"
    ) from None
  except OSError as error:
    raise UserError(
      f"--data-dir {root} cannot be read ({error.strerror or error}): give a "
      "directory that can"
    ) from error


def _nothing_found(name: str, layout: cifar.Layout, root: epath.Path) -> str:
  places = [
    f"{name}/<version>/dataset_info.json",
    layout.archive,
    f"{layout.folder}/{layout.test_file}",
    layout.test_file,
  ]
  state = "" if root.exists() else " (which does not exist)"
  message = (
    f"--data-dir {root}{state} has no {name}; looked for {', '.join(places)}"
  )
  pickles = layout.archive.replace("binary", "python")
  if (root / pickles).exists():
    message += f" ({pickles} is not read: pickles can run code)"
  return (
    f"{message}: add --download to fetch it there, or use --dataset digits "
    "(or --quick), which needs no files"
  )
