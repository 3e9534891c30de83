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

from ekd_jax.models import batch_norm, once, split

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


def axes_of(maps: Maps) -> dict[str, int]:
  """Which axes are the batch's and the channels', as losses ask for them."""
  last = isinstance(maps, BatchLast)
  return {"batch_axis": 3 if last else 0, "channel_axis": _channel_axis(maps)}


def like(maps: Maps, values: jax.Array) -> Maps:
  """Values in the layout of `maps`, as maps."""
  return BatchLast(values) if isinstance(maps, BatchLast) else values


def concatenate(maps: Sequence[Maps]) -> Maps:
  """Maps of equal sides, their channels one after the other."""
  values = [_values(each) for each in maps]
  return like(maps[0], jnp.concatenate(values, _channel_axis(maps[0])))


def stop_gradient(maps: Maps) -> Maps:
  """Maps that are constants to whatever uses them."""
  return jax.lax.stop_gradient(maps)


def _values(maps: Maps) -> jax.Array:
  return maps.values if isinstance(maps, BatchLast) else maps


def _channel_axis(maps: Maps) -> int:
  return 0 if isinstance(maps, BatchLast) else 3


def _sides(maps: Maps) -> tuple[int, int]:
  """H and W, which are the middle axes in both layouts."""
  return _values(maps).shape[1:3]


def _cut(maps: Maps, height: int, breadth: int) -> Maps:
  """The first rows and columns."""
  return like(maps, _values(maps)[:, :height, :breadth])


# A deep network has hundreds of layers of a few shapes. As programs within the
# program each shape is traced, differentiated and lowered once; XLA puts them
# back in line.
_split_convolution = jax.jit(split.convolution, static_argnums=(2, 3, 4))
_split_grouped = jax.jit(split.grouped_convolution, static_argnums=(2, 3, 4, 5))
_split_depthwise = jax.jit(split.depthwise_convolution, static_argnums=(2, 3))
_batch_norm_relu = jax.jit(
  batch_norm.batch_norm_relu, static_argnums=(5, 6, 7, 8)
)


def _convolve(
  maps: Maps,
  kernel: jax.Array,
  *,
  stride: int = 1,
  groups: int = 1,
  pad: int | None = None,
  remat: bool = False,
) -> Maps:
  """With a kernel of the maps' type: ceil(H / stride) rows, whatever the pad.

  `pad` zeros come before the first row and column, (size - 1) // 2 by default.
  "SAME" would put those of a stride-2 convolution at the end only; the
  published networks pad on both sides, as torch does.
  """
  size = len(kernel)
  pad = (size - 1) // 2 if pad is None else pad
  if isinstance(maps, BatchLast):
    x = maps.values
    if groups == 1:
      return BatchLast(_split_convolution(x, kernel, stride, pad, remat))
    if groups == len(x) == kernel.shape[-1]:
      return BatchLast(_split_depthwise(x, kernel, stride, pad))
    return BatchLast(_split_grouped(x, kernel, groups, stride, pad, remat))

  def after(length: int) -> int:
    return (-(-length // stride) - 1) * stride + size - pad - length

  return jax.lax.conv_general_dilated(
    maps,
    kernel,
    window_strides=(stride, stride),
    padding=tuple((pad, after(length)) for length in maps.shape[1:3]),
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
    feature_group_count=groups,
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


def fan_out_normal(
  rng: jax.Array, shape: Sequence[int], dtype: jnp.dtype
) -> jax.Array:
  """Normal with variance 2 / fan_out, kernel area included (He et al. 2015).

  As torch, which does not divide the fan of a grouped kernel by the groups.
  """
  deviation = math.sqrt(2 / (math.prod(shape[:-2]) * shape[-1]))
  return _draw_on_host(
    rng, shape, dtype, lambda source: source.normal(0, deviation, shape)
  )


def fan_in_uniform(
  rng: jax.Array, shape: Sequence[int], dtype: jnp.dtype
) -> jax.Array:
  """Uniform in +-1/sqrt(fan_in), kernel area included: torch's default."""
  return uniform(math.prod(shape[:-1]))(rng, shape, dtype)


def normal(deviation: float) -> Initializer:
  """Normal with this standard deviation."""

  def init(rng: jax.Array, shape: Sequence[int], dtype: jnp.dtype) -> jax.Array:
    return _draw_on_host(
      rng, shape, dtype, lambda source: source.normal(0, deviation, shape)
    )

  return init


def uniform(fan: int) -> Initializer:
  """Uniform in +-1/sqrt(fan); with the fan in it is torch's default."""
  bound = fan**-0.5

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


zeros = _constant(0.0)
ones = _constant(1.0)


# --- layers ----------------------------------------------------------------


class Convolution(nn.Module):
  """A square convolution, padded by torch's or TF's custom.

  Attributes:
    channels: output channels.
    size: side of the kernel, odd.
    stride: step in both directions.
    dtype: compute dtype of the result.
    remat: whether less is kept for the gradient, see `split.convolution`; no
      effect on a lax convolution, see `Computation.run`.
    groups: how many equal groups of channels are convolved by themselves.
    padding: "even" is (size - 1) / 2 zeros on all sides; "late" size - stride
      of them, of an odd number one more after than before (EfficientNet).
    kernel_init: how the kernel is drawn.
    use_bias: whether a bias is added, drawn as torch's default.
  """

  channels: int
  size: int = 3
  stride: int = 1
  dtype: jnp.dtype = jnp.float32
  remat: bool = False
  groups: int = 1
  padding: Literal["even", "late"] = "even"
  kernel_init: Initializer = xavier_normal
  use_bias: bool = False

  @nn.compact
  def __call__(self, x: Maps) -> Maps:
    """[N, H, W, C] -> [N, H', W', channels].

    H' is ceil(H / stride), with "late" padding floor(H / stride).
    """
    if self.size % 2 == 0:
      raise ValueError(f"size is {self.size}: a kernel has an odd side")
    inputs = channels(x) // self.groups
    shape = (self.size, self.size, inputs, self.channels)
    kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
    x = like(x, _values(x).astype(self.dtype))
    late = self.padding == "late"
    y = _convolve(
      x,
      kernel.astype(self.dtype),
      stride=self.stride,
      groups=self.groups,
      pad=max(self.size - self.stride, 0) // 2 if late else None,
      remat=self.remat,
    )
    if self.use_bias:
      init = uniform(self.size**2 * inputs)
      bias = self.param("bias", init, (self.channels,), jnp.float32)
      y = _add_bias(y, bias)
    if not late:
      return y
    height, breadth = _sides(x)
    return _cut(y, height // self.stride, breadth // self.stride)


class TransposedConvolution(nn.Module):
  """A 3x3 convolution that doubles the sides; no bias.

  torch's ConvTranspose2d with stride 2, padding 1 and output padding 1, but
  for the kernel, which is turned by 180 degrees: an ordinary convolution of
  the maps with zeros between their pixels.

  Attributes:
    channels: output channels.
    dtype: compute dtype of the result.
    kernel_init: how the kernel is drawn.
  """

  channels: int
  dtype: jnp.dtype = jnp.float32
  kernel_init: Initializer = xavier_normal

  @nn.compact
  def __call__(self, x: Maps) -> Maps:
    """[N, H, W, C] -> [N, 2 H, 2 W, channels]."""
    shape = (3, 3, channels(x), self.channels)
    kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
    values = _values(x).astype(self.dtype)
    # After each row and column one of zeros; H and W are the middle axes.
    spread = [(0, 0, 0), (0, 1, 1), (0, 1, 1), (0, 0, 0)]
    zero = jnp.zeros((), self.dtype)
    spread_out = like(x, jax.lax.pad(values, zero, spread))
    return _convolve(spread_out, kernel.astype(self.dtype))


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
    momentum: what part of the running statistics a step keeps.
  """

  axis_name: str | None = None
  relu: bool = True
  dtype: jnp.dtype = jnp.float32
  keep_gradient: bool = False
  momentum: float = batch_norm.MOMENTUM

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
    scale = self.param("scale", ones, shape, jnp.float32)
    bias = self.param("bias", zeros, shape, jnp.float32)
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
      return like(
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
        self.momentum * running.value + (1 - self.momentum) * batch
      )
    return like(x, y)


def swish(maps: Maps) -> Maps:
  """x sigmoid(x), elementwise."""
  if isinstance(maps, BatchLast):
    return BatchLast(once.swish(maps.values))
  return jax.nn.silu(maps)


def append(maps: Maps, new: Maps) -> Maps:
  """Maps of equal sides, the channels of `new` after those of `maps`.

  For layers that all go on using what the ones before them made: in the
  layout of CPUs the new maps, and the gradient of all of them, are computed
  once and not again in each of those.
  """
  old, new = _values(maps), _values(new)
  if not isinstance(maps, BatchLast):
    return jnp.concatenate([old, new], 3)
  return BatchLast(once.keep_gradient(jnp.concatenate([old, once.keep(new)])))


def add(a: Maps, b: Maps) -> Maps:
  """The sum of maps of the same shape."""
  return like(a, _values(a) + _values(b))


def average_pool(maps: Maps) -> Maps:
  """Means of squares of 2 x 2; an odd last row or column is left out."""
  height, breadth = (side // 2 for side in _sides(maps))
  values = _values(_cut(maps, 2 * height, 2 * breadth))
  first, *_, last = values.shape
  squares = values.reshape(first, height, 2, breadth, 2, last)
  means = squares.mean((2, 4), dtype=jnp.float32)
  return like(maps, means.astype(values.dtype))


def max_pool(maps: Maps, stride: int = 2) -> Maps:
  """Largest of 3 x 3 at every `stride`-th place, one row of padding around.

  [N, H, W, C] -> [N, ceil(H / stride), ceil(W / stride), C]; with a stride of
  2 as ResNets begin on large images.
  """
  values = _values(maps)
  if isinstance(maps, BatchLast):
    # The gradient of reduce_window takes most of a step on a CPU.
    return BatchLast(split.max_pool(values, stride))
  # A constant of NumPy: with one of JAX there is no gradient.
  lowest = np.array(-np.inf, values.dtype)

  def pads(side: int) -> tuple[int, int]:
    return 1, (-(-side // stride) - 1) * stride + 2 - side

  padding = [(0, 0), *map(pads, _sides(maps)), (0, 0)]
  return jax.lax.reduce_window(
    *(values, lowest, jax.lax.max),
    (1, 3, 3, 1),
    (1, stride, stride, 1),
    padding,
  )


def max_pool_squares(maps: Maps) -> Maps:
  """Largest of squares of 2 x 2; an odd last row or column is left out."""
  height, breadth = (side // 2 for side in _sides(maps))
  values = _values(_cut(maps, 2 * height, 2 * breadth))
  first, *_, last = values.shape
  squares = values.reshape(first, height, 2, breadth, 2, last)
  rows = split.larger(squares[:, :, 0], squares[:, :, 1])
  return like(maps, split.larger(rows[:, :, :, 0], rows[:, :, :, 1]))


def relu(maps: Maps) -> Maps:
  """max(x, 0), elementwise."""
  return like(maps, jax.nn.relu(_values(maps)))


class GlobalAveragePool(nn.Module):
  """The mean of each map, in float32: [N, H, W, C] -> [N, C]."""

  def __call__(self, x: Maps) -> jax.Array:
    means = _values(x).astype(jnp.float32).mean((1, 2))
    return means.T if isinstance(x, BatchLast) else means


class Dense(nn.Module):
  """A linear layer with bias: [N, C] -> [N, channels], in float32.

  Attributes:
    channels: size of the output.
    kernel_init: how the kernel is drawn.
    bias_init: how the bias is drawn; None for uniform in +-1/sqrt(C).
  """

  channels: int
  kernel_init: Initializer = xavier_normal
  bias_init: Initializer | None = None

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    fan_in = x.shape[-1]
    shape = (fan_in, self.channels)
    kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
    bias = self.param(
      "bias", self.bias_init or uniform(fan_in), (self.channels,), jnp.float32
    )
    return x.astype(jnp.float32) @ kernel + bias


class SqueezeExcite(nn.Module):
  """Scales each map by a gate computed from the means of all of them.

  Hu et al. 2018, with swish inside as in EfficientNet.

  Attributes:
    hidden: channels between the two dense layers.
  """

  hidden: int

  @nn.compact
  def __call__(self, x: Maps) -> Maps:
    means = GlobalAveragePool()(x)
    inits = {"kernel_init": fan_out_normal, "bias_init": zeros}
    hidden = jax.nn.silu(Dense(self.hidden, name="reduce", **inits)(means))
    gate = Dense(channels(x), name="expand", **inits)(hidden)
    gate = jax.nn.sigmoid(gate).astype(_values(x).dtype)
    if isinstance(x, BatchLast):
      return BatchLast(x.values * gate.T[:, None, None, :])
    return x * gate[:, None, None, :]


class Dropout(nn.Module):
  """Zeroes random elements, and divides the others to keep the mean.

  The mask is drawn for the global batch, of which each device takes its rows:
  it does not depend on the number of devices. Takes the random stream
  "dropout" in training.

  Attributes:
    rate: what part is zeroed, in [0, 1).
    axis_name: the device axis of the step, or None.
  """

  rate: float
  axis_name: str | None = None

  @nn.compact
  def __call__(self, x: Maps, *, train: bool) -> Maps:
    """[N, C] or [N, H, W, C] -> the same shape."""
    if not train or self.rate == 0 or self.is_initializing():
      return x
    values = _values(x)
    last = isinstance(x, BatchLast)
    # Drawn in one order, so that the formulation makes no difference.
    shape = values.shape
    kept = _keep(
      self.make_rng("dropout"),
      self.rate,
      tuple(shape[axis] for axis in (3, 1, 2, 0)) if last else shape,
      self.axis_name,
    )
    kept = kept.transpose(3, 1, 2, 0) if last else kept
    return like(x, values * kept.astype(values.dtype))


class DropConnect(nn.Module):
  """Drops whole images from a residual branch (stochastic depth).

  See `Dropout`, whose attributes it has.
  """

  rate: float
  axis_name: str | None = None

  @nn.compact
  def __call__(self, x: Maps, *, train: bool) -> Maps:
    """[N, H, W, C] -> [N, H, W, C]."""
    if not train or self.rate == 0 or self.is_initializing():
      return x
    values = _values(x)
    axis = 3 if isinstance(x, BatchLast) else 0
    shape = [1, 1, 1, 1]
    shape[axis] = values.shape[axis]
    kept = _keep(
      self.make_rng("dropout"), self.rate, (shape[axis],), self.axis_name
    )
    return like(x, values * kept.reshape(shape).astype(values.dtype))


def _keep(
  rng: jax.Array, rate: float, shape: tuple[int, ...], axis_name: str | None
) -> jax.Array:
  """This device's rows of 0 (with probability `rate`) and 1 / (1 - rate)."""
  rows, *rest = shape
  devices, index = 1, 0
  if axis_name is not None:
    devices = jax.lax.axis_size(axis_name)
    index = jax.lax.axis_index(axis_name)
  kept = jax.random.bernoulli(rng, 1 - rate, (devices * rows, *rest))
  if devices > 1:
    kept = jax.lax.dynamic_slice_in_dim(kept, index * rows, rows)
  return kept.astype(jnp.float32) / (1 - rate)


def _add_bias(maps: Maps, bias: jax.Array) -> Maps:
  """One number per channel."""
  values = _values(maps)
  shape = [1, 1, 1, 1]
  shape[_channel_axis(maps)] = len(bias)
  return like(maps, values + bias.astype(values.dtype).reshape(shape))


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
    init = uniform(fan_in)
    shape = (1, 1, fan_in, self.channels)
    kernel = self.param("kernel", init, shape, jnp.float32)
    bias = self.param("bias", init, (self.channels,), jnp.float32)
    dtype = _values(x).dtype
    return _add_bias(_convolve(x, kernel.astype(dtype)), bias)
