"""Fetching one file, completely or not at all.

The bytes go to a temporary name in the same directory, their checksum is
verified, and only then does the file get its real name. Whatever interrupts
that, nobody ever finds half a file under the real name, and several processes
that download at once only repeat work.
"""

import hashlib
import http.client
import os
import pathlib
import tempfile
import urllib.request
from typing import BinaryIO

from ekd_jax.errors import UserError

_CHUNK = 1 << 20
# Seconds without a single byte before the attempt counts as failed.
_TIMEOUT = 60


def fetch(url: str, target: pathlib.Path, *, size: int, sha256: str) -> None:
  """Downloads `url` to `target`, creating its directory if needed.

  Args:
    url: where the file is.
    target: where it shall be; replaced if it exists.
    size: how many bytes it has.
    sha256: its checksum, 64 hexadecimal digits.

  Raises:
    UserError: no network, an error from the server, no room or permission on
      disk, or other bytes than expected. Nothing is left behind.
  """
  partial = None
  try:
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(
      prefix=f"{target.name}.", suffix=".part", dir=target.parent
    )
    with os.fdopen(handle, "wb") as file:
      got, digest = _copy(url, file, size)
    if got != size or digest != sha256:
      raise UserError(
        f"{url} gave {got:,} bytes with sha256 {digest} instead of {size:,} "
        f"with {sha256}: the transfer was cut off or altered on the way; try "
        f"again, or place a good copy at {target}"
      )
    # Temporary files are private; this one is as shareable as any other.
    os.chmod(partial, 0o644)
    os.replace(partial, target)
    partial = None
  except (OSError, http.client.HTTPException) as error:
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    raise UserError(
      f"{url} could not be fetched into {target.parent} ({reason}): check the "
      f"network and the directory, or place the file at {target}"
    ) from error
  finally:
    if partial is not None:
      os.unlink(partial)


def _copy(url: str, file: BinaryIO, size: int) -> tuple[int, str]:
  digest = hashlib.sha256()
  got = 0
  with urllib.request.urlopen(url, timeout=_TIMEOUT) as response:
    # A server that sends without end must not fill the disk.
    while got <= size and (piece := response.read(_CHUNK)):
      file.write(piece)
      digest.update(piece)
      got += len(piece)
  return got, digest.hexdigest()
