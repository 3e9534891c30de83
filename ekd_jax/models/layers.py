"""The layers all networks are written with.

This file alone knows how maps are laid out in memory and which formulation
computes a layer; network files only say which layers follow each other. Here
maps are [N, H, W, C] and convolutions are XLA's own.

Parameters have Flax's usual names, shapes and order ("kernel" HWIO, "bias",
"scale"; running "mean" and "var" in the "batch_stats" collection), whatever
formulation computes with them, so checkpoints do not depend on it.

Parameters, statistics and their gradients are float32. Maps have the compute
dtype of the layer (float32 or bfloat16); statistics are always computed in
float32 from them.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

# As torch's BatchNorm, which the published recipe was run with: the running
# value keeps 0.9 of itself at every step.
BATCH_NORM_MOMENTUM = 0.9
BATCH_NORM_EPSILON = 1e-5

Initializer = Callable[[jax.Array, Sequence[int], jnp.dtype], jax.Array]


def xavier_normal(
  rng: jax.Array, shape: Sequence[int], dtype: jnp.dtype
) -> jax.Array:
  """Normal with variance 2 / (fan_in + fan_out), kernel area included.

  As torch's function of this name; JAX's own cuts the tails off.
  """
  area = math.prod(shape[:-2])
  deviation = math.sqrt(2 / (area * (shape[-2] + shape[-1])))
  return _draw_on_host(
    rng, shape, dtype, lambda source: source.normal(0, deviation, shape)
  )


def fan_in_uniform(fan_in: int) -> Initializer:
  """Uniform in +-1/sqrt(fan_in): torch's default for biases."""
  bound = fan_in**-0.5

  def init(rng: jax.Array, shape: Sequence[int], dtype: jnp.dtype) -> jax.Array:
    return _draw_on_host(
      rng, shape, dtype, lambda source: source.uniform(-bound, bound, shape)
    )

  return init


def _draw_on_host(
  rng: jax.Array,
  shape: Sequence[int],
  dtype: jnp.dtype,
  draw: Callable[[np.random.RandomState], np.ndarray],
) -> jax.Array:
  """Draws with NumPy, because XLA would compile a kernel for every shape.

  Compiling those takes longer than training's own program takes to compile.
  `RandomState` is the generator whose numbers NumPy promises not to change.
  """

  def host(key_data: np.ndarray) -> np.ndarray:
    return draw(np.random.RandomState(np.asarray(key_data))).astype(dtype)

  key_data = jax.random.key_data(rng)
  if isinstance(key_data, jax.core.Tracer):
    shape_of = jax.ShapeDtypeStruct(shape, dtype)
    return jax.pure_callback(host, shape_of, key_data)
  return host(key_data)


def _constant(value: float) -> Initializer:
  def init(rng: jax.Array, shape: Sequence[int], dtype: jnp.dtype) -> Any:
    del rng
    return np.full(shape, value, dtype)

  return init


_zeros = _constant(0.0)
_ones = _constant(1.0)


class Convolution(nn.Module):
  """A square convolution with torch's symmetric padding and no bias.

  "SAME" would pad stride-2 convolutions on one side only; the published
  networks pad (size - 1) // 2 on both.

  Attributes:
    channels: output channels.
    size: side of the kernel, odd.
    stride: step in both directions.
    dtype: compute dtype of the result.
  """

  channels: int
  size: int = 3
  stride: int = 1
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """[N, H, W, C] -> [N, ceil(H / stride), ceil(W / stride), channels]."""
    shape = (self.size, self.size, x.shape[-1], self.channels)
    kernel = self.param("kernel", xavier_normal, shape, jnp.float32)
    pad = (self.size - 1) // 2
    return jax.lax.conv_general_dilated(
      x.astype(self.dtype),
      kernel.astype(self.dtype),
      window_strides=(self.stride, self.stride),
      padding=((pad, pad), (pad, pad)),
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


class BatchNormReLU(nn.Module):
  """Batch norm, then an optional residual sum, then an optional ReLU.

  One layer because a formulation may compute the three in one pass.

  In training, statistics are those of the global batch: means are averaged
  over the devices of `axis_name` before they are used, so results do not
  depend on the number of devices. With `axis_name=None` each device
  normalises with its own. The variance is the biased one (divided by the
  count), in the running statistics too: as Flax, and unlike torch, whose
  running variance is divided by the count minus one.

  Attributes:
    axis_name: device axis that statistics are averaged over, or None.
    relu: whether a ReLU follows.
    dtype: compute dtype of the result.
  """

  axis_name: str | None = None
  relu: bool = True
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    residual: jax.Array | None = None,
    *,
    train: bool,
  ) -> jax.Array:
    """[N, H, W, C], optional residual of the same shape -> [N, H, W, C]."""
    channels = x.shape[-1:]
    scale = self.param("scale", _ones, channels, jnp.float32)
    bias = self.param("bias", _zeros, channels, jnp.float32)
    running_mean = self.variable(
      "batch_stats", "mean", np.zeros, channels, np.float32
    )
    running_var = self.variable(
      "batch_stats", "var", np.ones, channels, np.float32
    )
    if self.is_initializing():  # Only shapes matter.
      return x
    x = x.astype(jnp.float32)
    if train:
      mean, var = self._batch_statistics(x)
      for running, batch in ((running_mean, mean), (running_var, var)):
        running.value = (
          BATCH_NORM_MOMENTUM * running.value
          + (1 - BATCH_NORM_MOMENTUM) * batch
        )
    else:
      mean, var = running_mean.value, running_var.value
    factor = scale * jax.lax.rsqrt(var + BATCH_NORM_EPSILON)
    y = x * factor + (bias - mean * factor)
    if residual is not None:
      y = y + residual.astype(jnp.float32)
    if self.relu:
      y = jax.nn.relu(y)
    return y.astype(self.dtype)

  def _batch_statistics(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and biased variance per channel over the (global) batch."""
    # Means of x and x^2 travel in one all-reduce; centring first would be
    # two, one after the other.
    moments = jnp.stack([x.mean((0, 1, 2)), jnp.square(x).mean((0, 1, 2))])
    if self.axis_name is not None:
      moments = jax.lax.pmean(moments, self.axis_name)
    mean, mean_of_squares = moments
    # Rounding can push the difference below zero for a constant channel.
    return mean, jnp.maximum(mean_of_squares - jnp.square(mean), 0.0)


class GlobalAveragePool(nn.Module):
  """The mean of each map, in float32: [N, H, W, C] -> [N, C]."""

  def __call__(self, x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32).mean((1, 2))


class Dense(nn.Module):
  """A linear layer with bias: [N, C] -> [N, channels], in float32.

  Attributes:
    channels: size of the output.
  """

  channels: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    fan_in = x.shape[-1]
    shape = (fan_in, self.channels)
    kernel = self.param("kernel", xavier_normal, shape, jnp.float32)
    bias = self.param(
      "bias", fan_in_uniform(fan_in), (self.channels,), jnp.float32
    )
    return x.astype(jnp.float32) @ kernel + bias


class Adapter(nn.Module):
  """A 1x1 convolution with bias, no norm and no activation.

  Maps a thin student's features to the full network's channel count so that
  the two can be compared. Computes in the type of the features. Initialised
  as torch's default convolution.

  Attributes:
    channels: output channels: those of the full network's block.
  """

  channels: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """[N, H, W, C] -> [N, H, W, channels]."""
    fan_in = x.shape[-1]
    init = fan_in_uniform(fan_in)
    shape = (1, 1, fan_in, self.channels)
    kernel = self.param("kernel", init, shape, jnp.float32)
    bias = self.param("bias", init, (self.channels,), jnp.float32)
    y = jax.lax.conv_general_dilated(
      x,
      kernel.astype(x.dtype),
      window_strides=(1, 1),
      padding="VALID",
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return y + bias.astype(x.dtype)
