"""DenseNet-BC (Huang et al. 2017) for small images, at any width.

Three dense blocks, in which every layer adds `growth` channels to those of all
layers before it, with a transition after the first two that halves channels and
sides. The common base is the first convolution alone, without batch norm, to
twice the full growth; a width multiplies the growth, truncated. Compared are
the outputs of the two transitions and of the last block.
"""

import dataclasses

import flax.linen as nn
import jax

from ekd_jax.compression import Cost
from ekd_jax.errors import UserError
from ekd_jax.models import costs, layers
from ekd_jax.models.computation import Computation
from ekd_jax.models.network import Lower, Outputs

# How far members may be from their ratios. Any less, and DenseNet-BC 12/100
# would have no member with half of its parameters: there are only twelve.
RATIO_TOLERANCE = 0.03

BLOCKS = 3
# Channels between the two convolutions of a layer, as a multiple of growth.
BOTTLENECK = 4


class _Stem(nn.Module):
  compute: Computation
  channels: int

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool) -> layers.Maps:
    del train  # There is no batch norm.
    x = layers.enter(images, self.compute.formulation)
    init = layers.uniform(9 * layers.channels(x))
    return self.compute.convolution("conv", self.channels, kernel_init=init)(x)


class _Layer(nn.Module):
  compute: Computation
  growth: int

  @nn.compact
  def __call__(self, x: layers.Maps, *, train: bool) -> layers.Maps:
    conv, norm = self.compute.convolution, self.compute.norm
    kind = {"kernel_init": layers.fan_out_normal}
    new = norm("norm_0")(x, train=train)
    new = conv("conv_0", BOTTLENECK * self.growth, 1, **kind)(new)
    new = norm("norm_1")(new, train=train)
    new = conv("conv_1", self.growth, 3, **kind)(new)
    return layers.append(x, new)


class _Transition(nn.Module):
  compute: Computation

  @nn.compact
  def __call__(self, x: layers.Maps, *, train: bool) -> layers.Maps:
    outputs = layers.channels(x) // 2
    init = layers.fan_out_normal
    x = self.compute.norm("norm")(x, train=train)
    x = self.compute.convolution("conv", outputs, 1, kernel_init=init)(x)
    return layers.average_pool(x)


class _Branch(nn.Module):
  """Some of the blocks, and after the last one the head."""

  compute: "DenseNet"
  growth: int
  layers_per_block: int
  num_classes: int
  blocks: tuple[int, ...] = tuple(range(BLOCKS))

  @nn.compact
  def __call__(self, x: layers.Maps, *, train: bool) -> Outputs | layers.Maps:
    features = []
    for block in self.blocks:
      for index in range(self.layers_per_block):
        name = f"block_{block}_layer_{index}"
        layer = _Layer(self.compute, self.growth, name=name)
        x = self.compute.run(layer, x, train=train)
      if block < BLOCKS - 1:
        name = f"transition_{block}"
        x = _Transition(self.compute, name=name)(x, train=train)
      features.append(x)
    if self.blocks[-1] < BLOCKS - 1:
      return x
    if self.compute.final_norm:
      x = self.compute.norm("norm")(x, train=train)
    else:
      x = layers.relu(x)
    if len(self.blocks) == 1:
      features = [x]
    x = layers.GlobalAveragePool()(x)
    head = layers.Dense(
      self.num_classes,
      layers.uniform(x.shape[-1]),
      layers.zeros,
      name="head",
    )
    return Outputs(head(x), tuple(features))


@dataclasses.dataclass(frozen=True)
class DenseNet(Computation):
  """DenseNet-BC with a growth rate k and a depth d, such as 12/100.

  Attributes:
    growth: k, channels that a layer adds.
    depth: d, number of weight layers, 6n + 4.
    num_classes: K.
    image_shape: (H, W, C) of the images; what MACs are counted for.
    final_norm: whether batch norm comes before the last ReLU; not so in the
      network of the PCL code.
  """

  growth: int
  depth: int
  num_classes: int
  image_shape: tuple[int, int, int] = (32, 32, 3)
  final_norm: bool = True

  @property
  def name(self) -> str:
    """What reports call the network."""
    suffix = "" if self.final_norm else "_unnormalized"
    return f"densenet_bc_{self.growth}_{self.depth}{suffix}"

  @property
  def layers_per_block(self) -> int:
    """n; the two convolutions of each layer count."""
    return (self.depth - 4) // BLOCKS // 2

  @property
  def feature_channels(self) -> tuple[int, int, int]:
    """Channels of the three compared maps at full width."""
    return self._compared_channels(self.growth)

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
    """Blocks, transitions and head with `width` of the growth: -> `Outputs`.

    Raises:
      UserError: the width leaves no growth.
    """
    return self._blocks(width, tuple(range(BLOCKS)))

  def lower(self, width: float) -> nn.Module:
    """The stem, two blocks and their transitions with `width` of the growth."""
    return Lower(self.stem(), self._blocks(width, (0, 1)))

  def upper(self, width: float) -> nn.Module:
    """The last block and the head with `width` of the growth: -> `Outputs`.

    Its maps are those after the last ReLU, of which the head takes the means.
    """
    return self._blocks(width, (2,))

  def _blocks(self, width: float, blocks: tuple[int, ...]) -> nn.Module:
    growth = self.growth_at(width)
    return _Branch(
      self, growth, self.layers_per_block, self.num_classes, blocks
    )

  def growth_at(self, width: float) -> int:
    """The growth at `width`: truncated, as published.

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
    inner = BOTTLENECK * growth
    for block in range(BLOCKS):
      area = height * breadth
      for _ in range(self.layers_per_block):
        total += costs.norm(channels) + costs.norm(inner)
        total += costs.convolution(channels, inner, 1, area)
        total += costs.convolution(inner, growth, 3, area)
        channels += growth
      if block < BLOCKS - 1 or self.final_norm:
        total += costs.norm(channels)
      if block < BLOCKS - 1:
        total += costs.convolution(channels, channels // 2, 1, area)
        channels //= 2
        height, breadth = height // 2, breadth // 2
    return total + costs.dense(channels, self.num_classes)

  def _compared_channels(self, growth: int) -> tuple[int, int, int]:
    added = self.layers_per_block * growth
    first = (2 * self.growth + added) // 2
    second = (first + added) // 2
    return first, second, second + added
