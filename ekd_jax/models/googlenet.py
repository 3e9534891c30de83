"""GoogLeNet (Szegedy et al. 2015) for small images, at any width.

As the FFSD code has it: one 3x3 convolution, then nine inception blocks in
three stages, max pooling between them. A block puts the maps of four paths
side by side: 1x1; 1x1 and 3x3; 1x1 and two 3x3, which see 5x5; pooling and 1x1.
Every convolution has a bias, batch norm and ReLU. Compared are the outputs of
the stages.
"""

import dataclasses
from typing import NamedTuple

import flax.linen as nn
import jax

from ekd_jax.compression import Cost
from ekd_jax.errors import UserError
from ekd_jax.models import costs, layers
from ekd_jax.models.computation import Computation
from ekd_jax.models.network import Lower, Outputs

STEM_CHANNELS = 192

_INIT = {"kernel_init": layers.fan_out_normal, "use_bias": True}


class Inception(NamedTuple):
  """Channels of one block's paths, and inside two of them."""

  one: int
  three: int
  five: int
  pool: int
  three_reduced: int
  five_reduced: int

  @property
  def channels(self) -> int:
    """Of the output."""
    return self.one + self.three + self.five + self.pool


STAGES = (
  (
    Inception(64, 128, 32, 32, 96, 16),
    Inception(128, 192, 96, 64, 128, 32),
  ),
  (
    Inception(192, 208, 48, 64, 96, 16),
    Inception(160, 224, 64, 64, 112, 24),
    Inception(128, 256, 64, 64, 128, 24),
    Inception(112, 288, 64, 64, 144, 32),
    Inception(256, 320, 128, 128, 160, 32),
  ),
  (
    Inception(256, 320, 128, 128, 160, 32),
    Inception(384, 384, 128, 128, 192, 48),
  ),
)


class _ConvNorm(nn.Module):
  compute: Computation
  channels: int
  size: int

  @nn.compact
  def __call__(self, x: layers.Maps, *, train: bool) -> layers.Maps:
    conv = self.compute.convolution("conv", self.channels, self.size, **_INIT)
    return self.compute.norm("norm")(conv(x), train=train)


class _Block(nn.Module):
  compute: Computation
  sizes: Inception

  @nn.compact
  def __call__(self, x: layers.Maps, *, train: bool) -> layers.Maps:
    def path(name: str, x: layers.Maps, *steps: tuple[int, int]) -> layers.Maps:
      for index, (channels, size) in enumerate(steps):
        step = _ConvNorm(self.compute, channels, size, name=f"{name}_{index}")
        x = step(x, train=train)
      return x

    sizes = self.sizes
    paths = [
      path("one", x, (sizes.one, 1)),
      path("three", x, (sizes.three_reduced, 1), (sizes.three, 3)),
      path(
        "five",
        x,
        (sizes.five_reduced, 1),
        (sizes.five, 3),
        (sizes.five, 3),
      ),
      path("pool", layers.max_pool(x, 1), (sizes.pool, 1)),
    ]
    return layers.concatenate(paths)


class _Stem(nn.Module):
  compute: Computation

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool) -> layers.Maps:
    x = layers.enter(images, self.compute.formulation)
    return _ConvNorm(self.compute, STEM_CHANNELS, 3, name="first")(
      x, train=train
    )


class _Branch(nn.Module):
  """Some of the stages, and after the last one the head."""

  compute: "GoogLeNet"
  sizes: tuple[tuple[Inception, ...], ...]
  stages: tuple[int, ...] = (0, 1, 2)

  @nn.compact
  def __call__(self, x: layers.Maps, *, train: bool) -> Outputs | layers.Maps:
    features = []
    for stage in self.stages:
      if stage > 0:
        x = layers.max_pool(x)
      for index, sizes in enumerate(self.sizes[stage]):
        name = f"stage_{stage}_block_{index}"
        block = _Block(self.compute, sizes, name=name)
        x = self.compute.run(block, x, train=train)
      features.append(x)
    if self.stages[-1] < len(self.sizes) - 1:
      return x
    head = layers.Dense(
      self.compute.num_classes, layers.fan_in_uniform, name="head"
    )
    return Outputs(head(layers.GlobalAveragePool()(x)), tuple(features))


@dataclasses.dataclass(frozen=True)
class GoogLeNet(Computation):
  """GoogLeNet.

  Attributes:
    num_classes: K.
    image_shape: (H, W, C) of the images; what MACs are counted for.
  """

  num_classes: int
  image_shape: tuple[int, int, int] = (32, 32, 3)

  @property
  def name(self) -> str:
    """What reports call the network."""
    return "googlenet"

  @property
  def feature_channels(self) -> tuple[int, int, int]:
    """Channels of the three compared maps at full width."""
    return tuple(blocks[-1].channels for blocks in STAGES)

  @property
  def smallest_side(self) -> int:
    """Of images: what poolings leave at least a pixel of."""
    return 4

  def width_candidates(self) -> tuple[float, ...]:
    """Widths of which none leaves a path without channels, thinnest first."""
    thinnest = _thinnest_path()
    return tuple(k / 128 for k in range(128 // thinnest, 129))

  def sizes(self, width: float) -> tuple[tuple[Inception, ...], ...]:
    """Channels of all blocks at `width`, truncated.

    Raises:
      UserError: the width leaves a path without channels.
    """
    if costs.truncated(_thinnest_path(), width) < 1:
      raise UserError(
        f"width {width:g} leaves a path without channels: the thinnest "
        f"possible width is {1 / _thinnest_path():g}"
      )
    return tuple(
      tuple(
        Inception(*(costs.truncated(size, width) for size in block))
        for block in blocks
      )
      for blocks in STAGES
    )

  def stem(self) -> nn.Module:
    """The common base: images [N, H, W, C] -> [N, H, W, 192]."""
    return _Stem(self)

  def branch(self, width: float) -> nn.Module:
    """The three stages and the head at `width`: -> `Outputs`."""
    return _Branch(self, self.sizes(width))

  def lower(self, width: float) -> nn.Module:
    """The stem and two stages at `width`."""
    return Lower(self.stem(), _Branch(self, self.sizes(width), (0, 1)))

  def upper(self, width: float) -> nn.Module:
    """The last stage and the head at `width`: -> `Outputs` of this stage."""
    return _Branch(self, self.sizes(width), (2,))

  def cost(self, width: float) -> Cost:
    """Parameters and MACs of stem and branch at `width`; see `costs`."""
    height, breadth, inputs = self.image_shape

    def layer(inputs: int, outputs: int, size: int) -> Cost:
      conv = costs.biased_convolution(inputs, outputs, size, height * breadth)
      return conv + costs.norm(outputs)

    total = layer(inputs, STEM_CHANNELS, 3)
    inputs = STEM_CHANNELS
    for stage, blocks in enumerate(self.sizes(width)):
      if stage > 0:
        height, breadth = -(-height // 2), -(-breadth // 2)
      for block in blocks:
        total += layer(inputs, block.one, 1) + layer(inputs, block.pool, 1)
        total += layer(inputs, block.three_reduced, 1)
        total += layer(block.three_reduced, block.three, 3)
        total += layer(inputs, block.five_reduced, 1)
        total += layer(block.five_reduced, block.five, 3)
        total += layer(block.five, block.five, 3)
        inputs = block.channels
    return total + costs.dense(inputs, self.num_classes)


def _thinnest_path() -> int:
  return min(min(block) for blocks in STAGES for block in blocks)
