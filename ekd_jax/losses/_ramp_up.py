"""Weights that grow.

At the start of an online training the teachers know no more than those they
teach. So what they say is given little weight at first, and more from epoch to
epoch.
"""

import math
import numbers

import jax
import jax.numpy as jnp

from ekd_jax.losses import _checks


def ramp_up(epoch: float | jax.Array, length: float) -> jax.Array:
  r"""Computes a weight that grows from nearly 0 to 1.

  .. math::
    w(e) = \exp\big(-5 (1 - \min(\max(e, 0), L) / L)^2\big)

  Args:
    epoch: e, a number; may be traced. What is below 0 counts as 0.
    length: L, where the weight reaches 1, a finite Python number of at least 0
      in the unit of `epoch`. With 0 the weight is 1 everywhere.

  Returns:
    The weight in [exp(-5), 1], a float32 scalar.

  Raises:
    AssertionError: If `epoch` is not a single number.
    ValueError: If `length` is not a finite Python number >= 0.

  References:
    Laine and Aila, `Temporal Ensembling for Semi-Supervised Learning
    <https://arxiv.org/abs/1610.02242>`_, 2017: over the first 80 epochs.

  Example:
    >>> from ekd_jax import losses
    >>> print([round(losses.ramp_up(e, 80).item(), 4) for e in (0, 40, 80)])
    [0.0067, 0.2865, 1.0]
  """
  _checks.assert_scalar("epoch", epoch)
  if not (isinstance(length, numbers.Real) and 0 <= length < math.inf):
    raise ValueError(f"length must be a finite number >= 0, got {length}")
  if length == 0:
    return jnp.ones((), jnp.float32)
  done = jnp.clip(jnp.asarray(epoch, jnp.float32) / float(length), 0, 1)
  return jnp.exp(-5 * jnp.square(1 - done))
