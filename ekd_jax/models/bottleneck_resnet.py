"""ResNets of bottleneck blocks for small images, at any width.

The form in which the PCL code has ResNet-110 and WRN-20-8: a 3x3 convolution
to 16 channels and three stages of bottlenecks, four times as wide outside as
their planes. The outputs of the stages are the compared blocks.
"""

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax

from ekd_jax.compression import Cost
from ekd_jax.errors import UserError
from ekd_jax.models import costs, layers, residual
from ekd_jax.models.computation import Computation
from ekd_jax.models.network import Lower, Outputs

STEM_CHANNELS = 16
PLANES = (16, 32, 64)
EXPANSION = 4


class Variant(NamedTuple):
  """What the networks differ in.

  Attributes:
    blocks: in each stage.
    factor: channels inside a bottleneck, as a multiple of its planes.
  """

  blocks: int
  factor: int


VARIANTS = {"110": Variant(12, 1), "wide20-8": Variant(2, 8)}


class _Stem(nn.Module):
  compute: Computation

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool) -> layers.Maps:
    x = layers.enter(images, self.compute.formulation)
    init = layers.fan_out_normal
    x = self.compute.convolution("conv", STEM_CHANNELS, kernel_init=init)(x)
    return self.compute.norm("norm")(x, train=train)


class _Branch(nn.Module):
  """Some of the stages, and after the last one the head."""

  compute: "BottleneckResNet"
  planes: tuple[int, int, int]
  stages: tuple[int, ...] = (0, 1, 2)

  @nn.compact
  def __call__(self, x: layers.Maps, *, train: bool) -> Outputs | layers.Maps:
    blocks, factor = VARIANTS[self.compute.variant]
    features = []
    for stage in self.stages:
      planes = self.planes[stage]

      def block(
        compute: Computation, stride: int, planes: int = planes, **own: Any
      ) -> nn.Module:
        return residual.Bottleneck(
          compute,
          EXPANSION * planes,
          stride,
          layers.fan_out_normal,
          factor * planes,
          1,
          **own,
        )

      x = residual.run_stage(
        self,
        self.compute,
        block,
        [f"stage_{stage}_block_{index}" for index in range(blocks)],
        x,
        stride=_stride(stage, 0),
        train=train,
      )
      features.append(x)
    if self.stages[-1] < len(self.planes) - 1:
      return x
    head = layers.Dense(
      self.compute.num_classes, layers.fan_in_uniform, name="head"
    )
    return Outputs(head(layers.GlobalAveragePool()(x)), tuple(features))


@dataclasses.dataclass(frozen=True)
class BottleneckResNet(Computation):
  """One of `VARIANTS`.

  Attributes:
    variant: its name.
    num_classes: K.
    image_shape: (H, W, C) of the images; what MACs are counted for.
  """

  variant: str
  num_classes: int
  image_shape: tuple[int, int, int] = (32, 32, 3)

  @property
  def name(self) -> str:
    """What reports call the network."""
    return f"bottleneck_resnet{self.variant}"

  @property
  def feature_channels(self) -> tuple[int, int, int]:
    """Channels of the three compared blocks at full width."""
    return tuple(EXPANSION * planes for planes in PLANES)

  @property
  def smallest_side(self) -> int:
    """Of images: what strides leave at least a pixel of."""
    return 4

  def width_candidates(self) -> tuple[float, ...]:
    """Every width up to 1 that gives different channels, thinnest first."""
    widest = max(PLANES)
    first = widest // min(PLANES)
    return tuple(k / widest for k in range(first, widest + 1))

  def planes(self, width: float) -> tuple[int, int, int]:
    """Planes of the stages at `width`, truncated.

    Raises:
      UserError: the width leaves a stage without channels.
    """
    planes = tuple(costs.truncated(p, width) for p in PLANES)
    if min(planes) < 1:
      raise UserError(
        f"width {width:g} leaves a stage without channels: the thinnest "
        f"possible width is {1 / min(PLANES):g}"
      )
    return planes

  def stem(self) -> nn.Module:
    """The common base: images [N, H, W, C] -> [N, H, W, 16]."""
    return _Stem(self)

  def branch(self, width: float) -> nn.Module:
    """The three stages and the head at `width`: -> `Outputs`."""
    return _Branch(self, self.planes(width))

  def lower(self, width: float) -> nn.Module:
    """The stem and two stages at `width`."""
    return Lower(self.stem(), _Branch(self, self.planes(width), (0, 1)))

  def upper(self, width: float) -> nn.Module:
    """The last stage and the head at `width`: -> `Outputs` of this stage."""
    return _Branch(self, self.planes(width), (2,))

  def cost(self, width: float) -> Cost:
    """Parameters and MACs of stem and branch at `width`; see `costs`."""
    blocks, factor = VARIANTS[self.variant]
    height, breadth, image_channels = self.image_shape
    total = costs.convolution(
      image_channels, STEM_CHANNELS, 3, height * breadth
    )
    total += costs.norm(STEM_CHANNELS)
    inputs = STEM_CHANNELS
    for stage, planes in enumerate(self.planes(width)):
      for index in range(blocks):
        stride = _stride(stage, index)
        before = height * breadth
        height, breadth = -(-height // stride), -(-breadth // stride)
        total += residual.bottleneck_cost(
          *(inputs, EXPANSION * planes, stride, factor * planes, 1),
          *(before, height * breadth),
        )
        inputs = EXPANSION * planes
    return total + costs.dense(inputs, self.num_classes)


def _stride(stage: int, index: int) -> int:
  return 2 if stage > 0 and index == 0 else 1
