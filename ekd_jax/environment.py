"""Where a run ran: what to look at when the same command gave other numbers."""

import importlib.metadata
import os
import pathlib
import platform
import subprocess
from datetime import UTC, datetime
from typing import Any

from ekd_jax import process

_PACKAGES = (
  "ekd-jax",
  "jax",
  "jaxlib",
  "flax",
  "optax",
  "orbax-checkpoint",
  "chex",
  "numpy",
)


def describe() -> dict[str, Any]:
  """One entry of environment.json: JSON values.

  {"started", "versions", "system", "platform", "devices", "processes",
  "variables", "allocator", "compilation_cache", "git_commit"}.
  """
  import jax

  devices = jax.devices()
  return {
    "started": datetime.now(UTC).isoformat(timespec="seconds"),
    "versions": {
      "python": platform.python_version(),
      **{name: importlib.metadata.version(name) for name in _PACKAGES},
    },
    "system": platform.platform(),
    "platform": devices[0].platform,
    "devices": [str(device) for device in devices],
    "processes": jax.process_count(),
    # What changes numbers or speed without being an option of ours.
    "variables": {
      name: value
      for name, value in sorted(os.environ.items())
      if name.startswith(("JAX_", "XLA_", "LIBTPU_", "TF_CPP_", "GLIBC_TUN"))
    },
    "allocator": process.allocator(),
    "compilation_cache": jax.config.jax_compilation_cache_dir,
    "git_commit": git_commit(),
  }


def git_commit() -> str | None:
  """The commit of this source tree; None outside a checkout.

  It ends in "-dirty" if tracked files are not as committed.
  """
  root = pathlib.Path(__file__).parents[1]
  if not (root / ".git").exists():
    return None
  try:
    found = subprocess.run(
      ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40",
       "--exclude=*"],
      capture_output=True,
      text=True,
      check=False,
    )  # fmt: skip
  except FileNotFoundError:  # A checkout on a machine without git.
    return None
  return found.stdout.strip() or None
