"""Batch norm, the residual sum and the ReLU after it, as one function.

One function, because its gradient is the closed form, written by hand:
automatic differentiation keeps more maps and passes over them more often. This
needs only what came out and what went in, or that less a constant per channel.

Both layouts of maps are served: channels last, [N, H, W, C], and batch last,
[C, H, W, N], that of CPUs, where `once.compute_once` says what goes to memory.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from ekd_jax.models.once import compute_once

# As torch's BatchNorm, which the published recipe was run with: the running
# value keeps 0.9 of itself at every step.
MOMENTUM = 0.9
EPSILON = 1e-5


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7, 8))
def batch_norm_relu(
  x: jax.Array,
  residual: jax.Array | None,
  scale: jax.Array,
  bias: jax.Array,
  center: jax.Array,
  axis_name: str | None,
  relu: bool,
  channel_axis: int,
  keep_gradient: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """relu(batch_norm(x) + residual) with the statistics of the global batch.

  Args:
    x: maps [N, H, W, C] or [C, H, W, N].
    residual: maps of the same shape, or None.
    scale: [C], float32.
    bias: [C], float32.
    center: [C], float32. The variance is the mean square of x - center minus
      the squared mean of it: right for any center, and exact to the last
      digits if it is near the mean, as the running mean is.
    axis_name: device axis that statistics are averaged over, or None.
    relu: whether the sum is clipped at zero.
    channel_axis: 3 or 0.
    keep_gradient: whether the gradient of x is computed once and written to
      memory, not computed in every use of it. In the body of a compiled loop
      that saves a tenth of the time, elsewhere it costs as much as it saves.
      Of values it changes the rounding only. For channel_axis 0; no effect
      in the other layout.

  Returns:
    Maps of the shape and type of x, and their mean and biased variance [C] in
    float32, which are constants to a gradient.
  """
  return _forward(
    x,
    residual,
    scale,
    bias,
    center,
    axis_name,
    relu,
    channel_axis,
    keep_gradient,
  )[0]


def normalize_relu(
  x: jax.Array,
  residual: jax.Array | None,
  scale: jax.Array,
  bias: jax.Array,
  mean: jax.Array,
  var: jax.Array,
  relu: bool,
  channel_axis: int,
) -> jax.Array:
  """`batch_norm_relu` with given statistics: what evaluation computes."""
  factor = scale * jax.lax.rsqrt(var + EPSILON)
  y = x.astype(jnp.float32) * _per_channel(factor, channel_axis)
  y = y + _per_channel(bias - mean * factor, channel_axis)
  if residual is not None:
    y = y + residual.astype(jnp.float32)
  if relu:
    y = jnp.maximum(y, 0)
  return y.astype(x.dtype)


def _forward(
  x: jax.Array,
  residual: jax.Array | None,
  scale: jax.Array,
  bias: jax.Array,
  center: jax.Array,
  axis_name: str | None,
  relu: bool,
  channel_axis: int,
  keep_gradient: bool,
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], tuple[Any, ...]]:
  del keep_gradient
  # With the batch last nothing else uses x, so the compiler subtracts where it
  # adds up the convolution before, and one pass over the maps less is left.
  centered = x.astype(jnp.float32) - _per_channel(center, channel_axis)
  centered = _once(centered, center, channel_axis)
  # Both travel in one all-reduce; centring at the mean would need two, one
  # after the other.
  first, second = _global(
    _mean(centered, channel_axis),
    _mean(jnp.square(centered), channel_axis),
    axis_name,
  )
  # Rounding can push the difference below zero for a constant channel.
  var = jnp.maximum(second - jnp.square(first), 0)
  y = normalize_relu(
    centered, residual, scale, bias, first, var, relu, channel_axis
  ).astype(x.dtype)
  # The same condition as above, so that it is computed once too.
  y = _once(y, center, channel_axis)
  # Whichever of the two is in memory anyway (as a rounded copy in bfloat16).
  kept = centered.astype(x.dtype) if channel_axis == 0 else x
  saved = kept, center, residual is None, y, scale, first, var
  return (y, center + first, var), saved


def _backward(
  axis_name: str | None,
  relu: bool,
  channel_axis: int,
  keep_gradient: bool,
  saved: tuple[Any, ...],
  cotangents: tuple[jax.Array, jax.Array, jax.Array],
) -> tuple[Any, ...]:
  kept, center, no_residual, y, scale, first, var = saved
  dtype = kept.dtype
  centered = kept.astype(jnp.float32)
  if channel_axis != 0:
    centered = centered - _per_channel(center, channel_axis)
  gradient = cotangents[0].astype(jnp.float32)
  if relu:
    gradient = jnp.where(y > 0, gradient, 0)
  inverse = jax.lax.rsqrt(var + EPSILON)
  mean_gradient = _mean(gradient, channel_axis)
  mean_product = _mean(gradient * centered, channel_axis)
  mean_product -= first * mean_gradient
  count = y.size / y.shape[channel_axis]
  d_scale = count * mean_product * inverse
  d_bias = count * mean_gradient
  # The statistics depend on the examples of all devices.
  mean_gradient, mean_product = _global(mean_gradient, mean_product, axis_name)
  slope = jnp.square(inverse) * mean_product
  centered = centered - _per_channel(first, channel_axis)
  d_x = _per_channel(scale * inverse, channel_axis) * (
    gradient
    - _per_channel(mean_gradient, channel_axis)
    - centered * _per_channel(slope, channel_axis)
  )
  d_x = d_x.astype(dtype)
  if keep_gradient:
    d_x = _once(d_x, var, channel_axis)
  d_residual = None if no_residual else gradient.astype(dtype)
  return d_x, d_residual, d_scale, d_bias, None


batch_norm_relu.defvjp(_forward, _backward)


def _once(
  maps: jax.Array, statistic: jax.Array, channel_axis: int
) -> jax.Array:
  """`compute_once` in the layout of CPUs; elsewhere copying work is right."""
  return compute_once(maps, statistic[0]) if channel_axis == 0 else maps


def _global(
  a: jax.Array, b: jax.Array, axis_name: str | None
) -> tuple[jax.Array, jax.Array]:
  """The means of two per-device values over all devices, in one reduction."""
  if axis_name is None or jax.lax.axis_size(axis_name) == 1:
    return a, b
  a, b = jax.lax.pmean(jnp.stack([a, b]), axis_name)
  return a, b


def _mean(x: jax.Array, channel_axis: int) -> jax.Array:
  """The mean of every channel, [C]."""
  if channel_axis != 0:
    return x.mean((0, 1, 2))
  # Two reductions that the compiler must not join: the first adds up runs
  # along the contiguous axis N and so fills the vector registers.
  sums = jax.lax.optimization_barrier(x.sum((1, 2)))
  return sums.sum(1) * (x.shape[0] / x.size)


def _per_channel(values: jax.Array, channel_axis: int) -> jax.Array:
  shape = [1, 1, 1, 1]
  shape[channel_axis] = -1
  return values.reshape(shape)
