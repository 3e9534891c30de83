"""The layers all networks are written with.

This file alone knows how maps are laid out in memory and which formulation
computes a layer; network files only say which layers follow each other, the
first being `enter`. There are two:

    lax     maps are plain arrays [N, H, W, C], convolutions are XLA's own:
            right for GPU and TPU, and for a few images at a time
    split   maps are `BatchLast` [C, H, W, N], convolutions are those of
            `split`: faster than the other on a CPU

Parameters have Flax's usual names, shapes and order ("kernel" HWIO, "bias",
"scale"; running "mean" and "var" in the "batch_stats" collection), whatever
formulation computes with them, so checkpoints do not depend on it.

Parameters, statistics and their gradients are float32. Maps have the compute
dtype of the layer (float32 or bfloat16); statistics are always computed in
float32 from them.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ekd_jax.models import batch_norm, split

# --- maps ------------------------------------------------------------------

Formulation = Literal["auto", "lax", "split"]

# The split formulation's inner loops run over the images: with fewer than a
# vector register holds they would be mostly empty.
_SPLIT_IMAGES = 16


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BatchLast:
  """Maps with the batch as the contiguous axis.

  A type of its own because [C, H, W, N] and [N, H, W, C] cannot be told apart
  by shape.

  Attributes:
    values: [C, H, W, N].
  """

  values: jax.Array


Maps = jax.Array | BatchLast


def enter(images: jax.Array, formulation: Formulation) -> Maps:
  """Brings images [N, H, W, C] into the layout of a formulation.

  Args:
    images: what a network is given.
    formulation: "auto" is split for 16 images or more on a CPU, else lax.

  Returns:
    The same images as maps.
  """
  if formulation == "auto":
    wins = jax.default_backend() == "cpu" and len(images) >= _SPLIT_IMAGES
    formulation = "split" if wins else "lax"
  if formulation == "lax":
    return images
  return BatchLast(images.transpose(3, 1, 2, 0))


def channels(maps: Maps) -> int:
  """C."""
  return _values(maps).shape[_channel_axis(maps)]


def arrays_of(features: Sequence[Maps]) -> tuple[list[jax.Array], int]:
  """The arrays of maps and their batch axis, for losses that compare maps."""
  last = any(isinstance(maps, BatchLast) for maps in features)
  return [_values(maps) for maps in features], 3 if last else 0


def _values(maps: Maps) -> jax.Array:
  return maps.values if isinstance(maps, BatchLast) else maps


def _channel_axis(maps: Maps) -> int:
  return 0 if isinstance(maps, BatchLast) else 3


def _like(maps: Maps, values: jax.Array) -> Maps:
  return BatchLast(values) if isinstance(maps, BatchLast) else values


# A deep network has hundreds of layers of a few shapes. As programs within the
# program each shape is traced, differentiated and lowered once; XLA puts them
# back in line.
_split_convolution = jax.jit(split.convolution, static_argnums=(2, 3))
_batch_norm_relu = jax.jit(
  batch_norm.batch_norm_relu, static_argnums=(5, 6, 7, 8)
)


def _convolve(
  maps: Maps, kernel: jax.Array, stride: int, remat: bool = False
) -> Maps:
  """With a kernel of the maps' type, padded (size - 1) // 2 on all sides.

  "SAME" would pad stride-2 convolutions on one side only; the published
  networks pad on both, as torch does.
  """
  if isinstance(maps, BatchLast):
    return BatchLast(_split_convolution(maps.values, kernel, stride, remat))
  pad = (kernel.shape[0] - 1) // 2
  return jax.lax.conv_general_dilated(
    maps,
    kernel,
    window_strides=(stride, stride),
    padding=((pad, pad), (pad, pad)),
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )


# --- initialisation --------------------------------------------------------

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


# --- layers ----------------------------------------------------------------


class Convolution(nn.Module):
  """A square convolution with torch's symmetric padding and no bias.

  Attributes:
    channels: output channels.
    size: side of the kernel, odd.
    stride: step in both directions.
    dtype: compute dtype of the result.
    remat: whether less is kept for the gradient, see `split.convolution`; no
      effect in the lax formulation.
  """

  channels: int
  size: int = 3
  stride: int = 1
  dtype: jnp.dtype = jnp.float32
  remat: bool = False

  @nn.compact
  def __call__(self, x: Maps) -> Maps:
    """[N, H, W, C] -> [N, ceil(H / stride), ceil(W / stride), channels]."""
    if self.size % 2 == 0:
      raise ValueError(f"size is {self.size}: a kernel has an odd side")
    shape = (self.size, self.size, channels(x), self.channels)
    kernel = self.param("kernel", xavier_normal, shape, jnp.float32)
    x = _like(x, _values(x).astype(self.dtype))
    return _convolve(x, kernel.astype(self.dtype), self.stride, self.remat)


class BatchNormReLU(nn.Module):
  """Batch norm, then an optional residual sum, then an optional ReLU.

  One layer because the three have one gradient, see `batch_norm`.

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
    keep_gradient: whether the gradient of its input is computed once only; see
      `batch_norm_relu`. Right in a compiled loop; no effect in the lax
      formulation.
  """

  axis_name: str | None = None
  relu: bool = True
  dtype: jnp.dtype = jnp.float32
  keep_gradient: bool = False

  @nn.compact
  def __call__(
    self,
    x: Maps,
    residual: Maps | None = None,
    *,
    train: bool,
  ) -> Maps:
    """[N, H, W, C], optional residual of the same shape -> [N, H, W, C]."""
    shape = (channels(x),)
    scale = self.param("scale", _ones, shape, jnp.float32)
    bias = self.param("bias", _zeros, shape, jnp.float32)
    mean = self.variable("batch_stats", "mean", np.zeros, shape, np.float32)
    var = self.variable("batch_stats", "var", np.ones, shape, np.float32)
    if self.is_initializing():  # Only shapes matter.
      return x
    values = _values(x).astype(self.dtype)
    if residual is not None:
      residual = _values(residual).astype(self.dtype)
    inputs = values, residual, scale, bias
    axis = _channel_axis(x)
    if not train:
      return _like(
        x,
        batch_norm.normalize_relu(
          *inputs, mean.value, var.value, self.relu, axis
        ),
      )
    y, batch_mean, batch_var = _batch_norm_relu(
      *inputs, mean.value, self.axis_name, self.relu, axis, self.keep_gradient
    )
    for running, batch in ((mean, batch_mean), (var, batch_var)):
      running.value = (
        batch_norm.MOMENTUM * running.value + (1 - batch_norm.MOMENTUM) * batch
      )
    return _like(x, y)


class GlobalAveragePool(nn.Module):
  """The mean of each map, in float32: [N, H, W, C] -> [N, C]."""

  def __call__(self, x: Maps) -> jax.Array:
    means = _values(x).astype(jnp.float32).mean((1, 2))
    return means.T if isinstance(x, BatchLast) else means


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
  def __call__(self, x: Maps) -> Maps:
    """[N, H, W, C] -> [N, H, W, channels]."""
    fan_in = channels(x)
    init = fan_in_uniform(fan_in)
    shape = (1, 1, fan_in, self.channels)
    kernel = self.param("kernel", init, shape, jnp.float32)
    bias = self.param("bias", init, (self.channels,), jnp.float32)
    dtype = _values(x).dtype
    y = _convolve(x, kernel.astype(dtype), stride=1)
    shape = [1, 1, 1, 1]
    shape[_channel_axis(x)] = self.channels
    return _like(x, _values(y) + bias.astype(dtype).reshape(shape))
