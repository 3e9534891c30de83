"""A training that diverges is stopped, and what went wrong first is named.

One NaN is soon in every loss: of the ensemble, of the members it teaches, of
all sums. The line that ends the run therefore begins with the values that
tell most of where it began.
"""

import math
from typing import Any

import jax
import numpy as np

from ekd_jax.errors import NonFiniteError
from ekd_jax.training.checkpoint import Checkpoints

# Which of several values that are not finite tells most of where it began:
# a member's own terms, then what depends on the others, then sums.
_TELLING = ("label", "mutual", "feature", "distill", "gradient_norm")


def check_values(
  step: int, values: dict[str, float], checkpoints: Checkpoints
) -> None:
  """Looks at a step's metrics.

  Args:
    step: the step they are of.
    values: {"what/member": value}; see `methods`.
    checkpoints: says what is kept.

  Raises:
    NonFiniteError: one is NaN or infinite.
  """
  broken = [k for k, v in values.items() if not math.isfinite(v)]
  if not broken:
    return

  def rank(name: str) -> tuple[int, str]:
    what, _, who = name.partition("/")
    known = what in _TELLING and who != "ensemble"
    return (_TELLING.index(what) if known else len(_TELLING)), name

  telling = sorted(broken, key=rank)
  shown = ", ".join(f"{name} = {values[name]}" for name in telling[:3])
  if len(telling) > 3:
    shown += f" and {len(telling) - 3} others"
  raise _non_finite(step, shown, checkpoints)


def check_state(step: int, state: Any, checkpoints: Checkpoints) -> None:
  """Looks at what is about to be saved.

  An update can overflow under a finite gradient: the next loss would show it,
  but this checkpoint would already be spoilt.

  Args:
    step: optimizer steps done.
    state: a pytree of NumPy arrays.
    checkpoints: says what is kept.

  Raises:
    NonFiniteError: a number in it is NaN or infinite.
  """
  for path, leaf in jax.tree_util.tree_leaves_with_path(state):
    if leaf.dtype.kind == "f" and not np.isfinite(leaf).all():
      name = jax.tree_util.keystr(path, simple=True, separator="/")
      raise _non_finite(step, name, checkpoints)


def _non_finite(
  step: int, what: str, checkpoints: Checkpoints
) -> NonFiniteError:
  kept = checkpoints.kept() or "the checkpoints are kept"
  return NonFiniteError(
    f"step {step}: {what} is not finite; {kept}. A lower --learning-rate, in "
    "another --run-dir, usually helps"
  )
