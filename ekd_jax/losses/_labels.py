"""The cross entropy with labels, as every objective here has it."""

from collections.abc import Sequence

import chex
import jax
import jax.numpy as jnp
import optax

from ekd_jax.losses import _checks


def label_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """Cross entropy of each example, float32 [N]; NaN for an impossible label."""
  labels = jnp.asarray(labels, jnp.int32)
  # A label of K or more already selects NaN, but a negative one would count
  # from the last class: padding marked -1 would quietly train that class.
  labels = jnp.where(labels < 0, logits.shape[-1], labels)
  return optax.losses.softmax_cross_entropy_with_integer_labels(
    jnp.asarray(logits, jnp.float32), labels
  )


def batch_means(losses: Sequence[jax.Array]) -> jax.Array:
  """Arrays [N] -> their means, stacked."""
  # Without thinner members or blocks there is no feature loss to stack.
  if not losses:
    return jnp.zeros((0,), jnp.float32)
  return jnp.mean(jnp.stack(losses), axis=1)


def assert_batch(logits: Sequence[jax.Array], labels: jax.Array) -> int:
  """Asserts logits [N, K] of members and their labels [N]; returns N."""
  _checks.assert_members("logits", logits, "[N, K]")
  shape = logits[0].shape
  _checks.assert_true(
    len(shape) == 2 and shape[0] >= 1,
    f"logits must be arrays of shape [N, K] with N >= 1, got {shape}",
  )
  batch_size = shape[0]
  expected = f"labels must be an integer array [N] with N = {batch_size}"
  _checks.assert_true(
    hasattr(labels, "shape") and hasattr(labels, "dtype"),
    f"{expected}, got {type(labels).__name__}",
  )
  chex.assert_type(labels, int, custom_message=expected)
  chex.assert_shape(labels, (batch_size,), custom_message=expected)
  return batch_size


def assert_peers(logits: Sequence[jax.Array]) -> None:
  """Asserts that there are at least two members."""
  _checks.assert_true(
    len(logits) >= 2,
    f"logits must hold at least two members, got {len(logits)}",
  )
