"""ekd_jax: train a whole family of compressed networks at once, in JAX.

ekd_jax.losses          the losses alone, for any JAX code
ekd_jax.load_student    (module, variables) of one student of a run
ekd_jax.load_run        a whole run
"""

import importlib
from typing import Any

__version__ = "0.1.0"

__all__ = ["load_run", "load_student", "losses"]


def __getattr__(name: str) -> Any:
  # Loaded when first named: `import ekd_jax.losses` must not load flax.
  if name in ("load_run", "load_student"):
    return getattr(importlib.import_module("ekd_jax.loading"), name)
  if name == "losses":
    return importlib.import_module("ekd_jax.losses")
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
