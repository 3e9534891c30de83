"""DenseNet without bottlenecks and compression (Huang et al. 2017), any width.

As the FFSD code has it: three dense blocks whose layers are one 3x3
convolution, with transitions that halve the sides and keep the channels. A
width multiplies the growth, truncated. Compared are the maps of the first two
blocks as they go into their transitions, and the ReLU after the last.
"""

import dataclasses

import flax.linen as nn
import jax

from ekd_jax.compression import Cost
from ekd_jax.errors import UserError
from ekd_jax.models import costs, layers
from ekd_jax.models.computation import Computation
from ekd_jax.models.network import Lower, Outputs

BLOCKS = 3

_INIT = {"kernel_init": layers.fan_out_normal}


class _Stem(nn.Module):
  compute: Computation
  channels: int

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool) -> layers.Maps:
    del train  # There is no batch norm.
    x = layers.enter(images, self.compute.formulation)
    return self.compute.convolution("conv", self.channels, **_INIT)(x)


class _Layer(nn.Module):
  compute: Computation
  growth: int

  @nn.compact
  def __call__(self, x: layers.Maps, *, train: bool) -> layers.Maps:
    new = self.compute.norm("norm")(x, train=train)
    new = self.compute.convolution("conv", self.growth, **_INIT)(new)
    return layers.append(x, new)


class _Transition(nn.Module):
  compute: Computation

  @nn.compact
  def __call__(self, x: layers.Maps, *, train: bool) -> layers.Maps:
    channels = layers.channels(x)
    x = self.compute.norm("norm")(x, train=train)
    x = self.compute.convolution("conv", channels, 1, **_INIT)(x)
    return layers.average_pool(x)


class _Branch(nn.Module):
  """Some of the blocks, and after the last one the head."""

  compute: "PlainDenseNet"
  growth: int
  blocks: tuple[int, ...] = (0, 1, 2)

  @nn.compact
  def __call__(self, x: layers.Maps, *, train: bool) -> Outputs | layers.Maps:
    features = []
    for block in self.blocks:
      for index in range(self.compute.layers_per_block):
        name = f"block_{block}_layer_{index}"
        layer = _Layer(self.compute, self.growth, name=name)
        x = self.compute.run(layer, x, train=train)
      features.append(x)
      if block < BLOCKS - 1:
        name = f"transition_{block}"
        x = _Transition(self.compute, name=name)(x, train=train)
    if self.blocks[-1] < BLOCKS - 1:
      return x
    x = self.compute.norm("norm")(x, train=train)
    features[-1] = x
    head = layers.Dense(
      self.compute.num_classes, layers.fan_in_uniform, name="head"
    )
    return Outputs(head(layers.GlobalAveragePool()(x)), tuple(features))


@dataclasses.dataclass(frozen=True)
class PlainDenseNet(Computation):
  """DenseNet with a growth rate k and a depth d, such as 12/40.

  Attributes:
    growth: k, channels that a layer adds.
    depth: d, number of weight layers, 3n + 4.
    num_classes: K.
    image_shape: (H, W, C) of the images; what MACs are counted for.
  """

  growth: int
  depth: int
  num_classes: int
  image_shape: tuple[int, int, int] = (32, 32, 3)

  @property
  def name(self) -> str:
    """What reports call the network."""
    return f"plain_densenet_{self.growth}_{self.depth}"

  @property
  def layers_per_block(self) -> int:
    """n."""
    return (self.depth - 4) // BLOCKS

  @property
  def feature_channels(self) -> tuple[int, int, int]:
    """Channels of the three compared maps at full width."""
    added = self.layers_per_block * self.growth
    first = 2 * self.growth + added
    return first, first + added, first + 2 * added

  @property
  def smallest_side(self) -> int:
    """Of images: what strides leave at least a pixel of."""
    return 4

  def width_candidates(self) -> tuple[float, ...]:
    """One width per growth, thinnest first."""
    return tuple(k / self.growth for k in range(1, self.growth + 1))

  def stem(self) -> nn.Module:
    """The common base: images [N, H, W, C] -> [N, H, W, 2 k]."""
    return _Stem(self, 2 * self.growth)

  def branch(self, width: float) -> nn.Module:
    """Blocks, transitions and head with `width` of the growth: -> `Outputs`."""
    return _Branch(self, self.growth_at(width))

  def lower(self, width: float) -> nn.Module:
    """The stem, two blocks and their transitions with `width` of the growth."""
    return Lower(self.stem(), _Branch(self, self.growth_at(width), (0, 1)))

  def upper(self, width: float) -> nn.Module:
    """The last block and the head with `width` of the growth: -> `Outputs`."""
    return _Branch(self, self.growth_at(width), (2,))

  def growth_at(self, width: float) -> int:
    """The growth at `width`, truncated.

    Raises:
      UserError: it is 0.
    """
    growth = costs.truncated(self.growth, width)
    if growth < 1:
      raise UserError(
        f"width {width:g} leaves layers without channels: the thinnest "
        f"possible width is {1 / self.growth:g}"
      )
    return growth

  def cost(self, width: float) -> Cost:
    """Parameters and MACs of stem and branch at `width`; see `costs`."""
    growth = self.growth_at(width)
    height, breadth, image_channels = self.image_shape
    channels = 2 * self.growth
    total = costs.convolution(image_channels, channels, 3, height * breadth)
    for block in range(BLOCKS):
      area = height * breadth
      for _ in range(self.layers_per_block):
        total += costs.norm(channels)
        total += costs.convolution(channels, growth, 3, area)
        channels += growth
      total += costs.norm(channels)
      if block < BLOCKS - 1:
        total += costs.convolution(channels, channels, 1, area)
        height, breadth = height // 2, breadth // 2
    return total + costs.dense(channels, self.num_classes)
