"""The ensemble as a teacher.

Networks that train side by side make different mistakes, so the mean of their
logits is usually right more often than any one of them. That mean costs
nothing extra to compute and needs no pre-trained teacher. It is a plain
function of the logits; whether gradients may pass through it is decided
where it is used as a target.
"""

import numbers
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from ekd_jax.losses import _checks


def ensemble_logits(
  logits: Sequence[jax.Array],
  *,
  weights: Sequence[float] | jax.Array | None = None,
) -> jax.Array:
  r"""Computes the (weighted) mean of the members' logits.

  .. math::
    z_E = \frac{\sum_i w_i z_i}{\sum_i w_i}

  The weights are divided by their sum, as `numpy.average` does: scaling them
  all leaves the ensemble unchanged, and its logits keep the scale of one
  member's, so one temperature fits both. Gradients flow to every member and
  to array weights; `distillation_loss` stops them by default.

  Args:
    logits: Unnormalised log-probabilities of the S members, S >= 1 arrays of
      shape [..., K]. Finite, of any floating-point type.
    weights: The S members' shares, non-negative and not all zero, in the order
      of `logits`. None gives every member the same. Python and NumPy numbers
      are checked; a `jax.Array` of shape [S] may be traced and is used
      unchecked.

  Returns:
    The ensemble's logits, float32, with shape [..., K].

  Raises:
    AssertionError: If `logits` is not a list or tuple of at least one
      floating-point array, all of one shape, or `weights` is not of length S.
    ValueError: If a weight is negative or not finite, or all are zero.

  References:
    Walawalkar et al, `Online Ensemble Model Compression using Knowledge
    Distillation <https://arxiv.org/abs/2011.07449>`_, 2020: the ensemble
    teacher, with equal constant weights.

  Example:
    >>> import jax.numpy as jnp
    >>> from ekd_jax import losses
    >>> wide = jnp.array([2.0, 0.0, 1.0])
    >>> thin = jnp.array([0.0, 1.0, 1.0])
    >>> print(losses.ensemble_logits([wide, thin]))
    [1.  0.5 1. ]
    >>> print(losses.ensemble_logits([wide, thin], weights=[3, 1]))
    [1.5  0.25 1.  ]
  """
  _checks.assert_members("logits", logits)
  members = jnp.stack([jnp.asarray(z, jnp.float32) for z in logits])
  if weights is None:
    return jnp.mean(members, axis=0)
  _check_member_weights(weights, len(logits))
  shares = jnp.asarray(weights, jnp.float32)
  shares = shares / jnp.sum(shares)
  return jnp.tensordot(shares, members, axes=1, precision="highest")


def _check_member_weights(
  weights: Sequence[float] | jax.Array, num_members: int
) -> None:
  expected = f"weights must be {num_members} numbers, one per member"
  shape = getattr(weights, "shape", None)
  if shape is None:
    _checks.assert_sequence("weights", weights, "numbers, one per member")
    shape = (len(weights),)
  _checks.assert_true(shape == (num_members,), f"{expected}, got shape {shape}")
  if isinstance(weights, jax.Array):
    return
  for i, weight in enumerate(weights):
    _checks.check_weight(f"weights[{i}]", weight)
  # The shares 0 / 0 would make every logit NaN.
  if all(isinstance(w, numbers.Real) and w == 0 for w in weights):
    raise ValueError(f"weights must not all be zero, got {list(weights)}")
