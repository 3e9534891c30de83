"""EfficientNet-B0 to B7 (Tan and Le 2019), at any width.

A variant multiplies the channels and the repeats of one table; a student's
width multiplies the channels once more, before they are rounded to multiples of
8. The common base is the first convolution, at the variant's own width. The
compared maps are those with 40 channels in the table, those with 112, and those
of the last convolution.

Convolutions are padded as TensorFlow pads them for even sides, one more zero
after than before where they stride. Drop-connect is the same for all blocks.
"""

import dataclasses
import math
from typing import NamedTuple

import flax.linen as nn
import jax

from ekd_jax.compression import Cost
from ekd_jax.models import costs, layers
from ekd_jax.models.computation import Computation
from ekd_jax.models.network import Outputs

STEM_CHANNELS = 32
HEAD_CHANNELS = 1280
DROP_CONNECT = 0.2
# Channels of the squeeze, as a part of those that the block is given.
SQUEEZED = 4


class Variant(NamedTuple):
  """What a variant multiplies the table by.

  Attributes:
    width: of channels.
    depth: of repeats.
    dropout: rate before the head.
  """

  width: float
  depth: float
  dropout: float


VARIANTS = {
  "b0": Variant(1.0, 1.0, 0.2),
  "b1": Variant(1.0, 1.1, 0.2),
  "b2": Variant(1.1, 1.2, 0.3),
  "b3": Variant(1.2, 1.4, 0.3),
  "b4": Variant(1.4, 1.8, 0.4),
  "b5": Variant(1.6, 2.2, 0.4),
  "b6": Variant(1.8, 2.6, 0.5),
  "b7": Variant(2.0, 3.1, 0.5),
}


class _Group(NamedTuple):
  """Equal blocks in a row; the first may stride and change channels."""

  expansion: int
  channels: int
  repeats: int
  stride: int
  size: int


_GROUPS = (
  _Group(1, 16, 1, 1, 3),
  _Group(6, 24, 2, 2, 3),
  _Group(6, 40, 2, 2, 5),
  _Group(6, 80, 3, 2, 3),
  _Group(6, 112, 3, 1, 5),
  _Group(6, 192, 4, 2, 5),
  _Group(6, 320, 1, 1, 3),
)
# The groups after which maps are compared.
_COMPARED = (2, 4)


def rounded(channels: int, multiplier: float) -> int:
  """The multiple of 8 nearest to the product, and not below 0.9 of it."""
  if multiplier == 1.0:
    return channels
  product = channels * multiplier
  nearest = max(8, int(product + 4) // 8 * 8)
  return nearest + 8 if nearest < 0.9 * product else nearest


class _ConvNorm(nn.Module):
  """A convolution, batch norm and swish or nothing."""

  compute: Computation
  channels: int
  size: int
  stride: int = 1
  groups: int = 1
  swish: bool = True

  @nn.compact
  def __call__(self, x: layers.Maps, *, train: bool) -> layers.Maps:
    x = self.compute.convolution(
      "conv",
      self.channels,
      self.size,
      self.stride,
      groups=self.groups,
      padding="late",
      kernel_init=layers.fan_out_normal,
    )(x)
    x = self.compute.norm("norm", relu=False)(x, train=train)
    return layers.swish(x) if self.swish else x


class _Stem(nn.Module):
  compute: Computation
  channels: int

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool) -> layers.Maps:
    x = layers.enter(images, self.compute.formulation)
    layer = _ConvNorm(self.compute, self.channels, 3, 2, name="first")
    return layer(x, train=train)


class _Block(nn.Module):
  """MBConv: expand, depthwise, squeeze and excite, project."""

  compute: Computation
  expansion: int
  channels: int
  stride: int
  size: int

  @nn.compact
  def __call__(self, x: layers.Maps, *, train: bool) -> layers.Maps:
    inputs = layers.channels(x)
    inner = inputs * self.expansion
    y = x
    if self.expansion != 1:
      y = _ConvNorm(self.compute, inner, 1, name="expand")(y, train=train)
    y = _ConvNorm(
      self.compute, inner, self.size, self.stride, inner, name="depthwise"
    )(y, train=train)
    y = layers.SqueezeExcite(_squeezed(inputs), name="squeeze_excite")(y)
    y = _ConvNorm(self.compute, self.channels, 1, swish=False, name="project")(
      y, train=train
    )
    if self.stride != 1 or inputs != self.channels:
      return y
    drop = layers.DropConnect(DROP_CONNECT, self.compute.noise_axis_name)
    return layers.add(x, drop(y, train=train))


class _Branch(nn.Module):
  compute: Computation
  groups: tuple[_Group, ...]
  head_channels: int
  dropout: float
  num_classes: int

  @nn.compact
  def __call__(self, x: layers.Maps, *, train: bool) -> Outputs:
    features = []
    for index, group in enumerate(self.groups):
      for repeat in range(group.repeats):
        block = _Block(
          self.compute,
          group.expansion,
          group.channels,
          group.stride if repeat == 0 else 1,
          group.size,
          name=f"group_{index}_block_{repeat}",
        )
        x = self.compute.run(block, x, train=train)
      if index in _COMPARED:
        features.append(x)
    last = _ConvNorm(self.compute, self.head_channels, 1, name="last")
    x = last(x, train=train)
    features.append(x)
    x = layers.GlobalAveragePool()(x)
    drop = layers.Dropout(self.dropout, self.compute.noise_axis_name)
    x = drop(x, train=train)
    head = layers.Dense(
      self.num_classes,
      layers.uniform(self.num_classes),
      layers.zeros,
      name="head",
    )
    return Outputs(head(x), tuple(features))


@dataclasses.dataclass(frozen=True)
class EfficientNet(Computation):
  """One of `VARIANTS`, at any image size.

  Attributes:
    variant: its name, "b0" to "b7".
    num_classes: K.
    image_shape: (H, W, C) of the images; what MACs are counted for.
  """

  variant: str
  num_classes: int
  image_shape: tuple[int, int, int] = (224, 224, 3)

  @property
  def name(self) -> str:
    """What reports call the network."""
    return f"efficientnet_{self.variant}"

  @property
  def feature_channels(self) -> tuple[int, ...]:
    """Channels of the three compared maps at full width."""
    groups = self._groups(1.0)
    compared = [groups[index].channels for index in _COMPARED]
    return (*compared, self._head_channels(1.0))

  @property
  def smallest_side(self) -> int:
    """Of images: what strides leave at least a pixel of."""
    return 32

  def width_candidates(self) -> tuple[float, ...]:
    """Widths that give different channels, thinnest first."""
    widths = {}
    for k in range(1, HEAD_CHANNELS // 8 + 1):
      width = k * 8 / HEAD_CHANNELS
      channels = [group.channels for group in self._groups(width)]
      widths[*channels, self._head_channels(width)] = width
    return tuple(widths.values())

  def stem(self) -> nn.Module:
    """The common base: images -> [N, H / 2, W / 2, stem channels]."""
    return _Stem(self, rounded(STEM_CHANNELS, self._variant.width))

  def branch(self, width: float) -> nn.Module:
    """All blocks, the last convolution and the head: -> `Outputs`."""
    return _Branch(
      self,
      self._groups(width),
      self._head_channels(width),
      self._variant.dropout,
      self.num_classes,
    )

  def lower(self, width: float) -> nn.Module:
    """The stem alone: there is no natural last stage."""
    del width
    return self.stem()

  def upper(self, width: float) -> nn.Module:
    """The branch at `width`: -> `Outputs`."""
    return self.branch(width)

  def cost(self, width: float) -> Cost:
    """Parameters and MACs of stem and branch at `width`; see `costs`."""
    height, breadth, image_channels = self.image_shape
    height, breadth = height // 2, breadth // 2
    inputs = rounded(STEM_CHANNELS, self._variant.width)
    total = costs.convolution(image_channels, inputs, 3, height * breadth)
    total += costs.norm(inputs)
    for group in self._groups(width):
      for repeat in range(group.repeats):
        stride = group.stride if repeat == 0 else 1
        inner = inputs * group.expansion
        if group.expansion != 1:
          total += costs.convolution(inputs, inner, 1, height * breadth)
          total += costs.norm(inner)
        height, breadth = height // stride, breadth // stride
        area = height * breadth
        total += costs.convolution(inner, inner, group.size, area, inner)
        total += costs.norm(inner) + costs.norm(group.channels)
        total += costs.dense(inner, _squeezed(inputs))
        total += costs.dense(_squeezed(inputs), inner)
        total += costs.convolution(inner, group.channels, 1, area)
        inputs = group.channels
    last = self._head_channels(width)
    total += costs.convolution(inputs, last, 1, height * breadth)
    return total + costs.norm(last) + costs.dense(last, self.num_classes)

  @property
  def _variant(self) -> Variant:
    return VARIANTS[self.variant]

  def _groups(self, width: float) -> tuple[_Group, ...]:
    multiplier = self._variant.width * width
    return tuple(
      group._replace(
        channels=rounded(group.channels, multiplier),
        repeats=math.ceil(self._variant.depth * group.repeats),
      )
      for group in _GROUPS
    )

  def _head_channels(self, width: float) -> int:
    return rounded(HEAD_CHANNELS, self._variant.width * width)


def _squeezed(inputs: int) -> int:
  return max(1, inputs // SQUEEZED)
