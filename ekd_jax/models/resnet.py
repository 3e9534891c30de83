"""CIFAR ResNets (He et al. 2016) of any depth 6n + 2 and any width.

A stem at full width (one 3x3 convolution to 16 channels) is followed by a
branch of three stages of n basic blocks with 16, 32 and 64 channels times the
width, truncated. A thin branch has a projection in its very first block, 16 ->
trunc(16 width) channels, where the full network has the identity. The outputs
of the three stages are the compared blocks.
"""

import dataclasses
from typing import Any, Literal

import flax.linen as nn
import jax

from ekd_jax.compression import Cost
from ekd_jax.errors import UserError
from ekd_jax.models import costs, layers, residual
from ekd_jax.models.computation import Computation
from ekd_jax.models.network import Lower, Outputs

STEM_CHANNELS = 16
STAGE_CHANNELS = (16, 32, 64)


class _Stem(nn.Module):
  compute: "CifarResNet"

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool) -> layers.Maps:
    x = layers.enter(images, self.compute.formulation)
    init = self.compute.kernel_init
    x = self.compute.convolution("conv", STEM_CHANNELS, kernel_init=init)(x)
    return self.compute.norm("norm")(x, train=train)


class _Branch(nn.Module):
  """Some of the stages, and after the last one the head."""

  compute: "CifarResNet"
  stage_channels: tuple[int, int, int]
  stages: tuple[int, ...] = (0, 1, 2)

  @nn.compact
  def __call__(self, x: layers.Maps, *, train: bool) -> Outputs | layers.Maps:
    features = []
    for stage in self.stages:
      channels = self.stage_channels[stage]

      def block(
        compute: Computation, stride: int, channels: int = channels, **own: Any
      ) -> nn.Module:
        init = self.compute.kernel_init
        return residual.BasicBlock(compute, channels, stride, init, **own)

      x = residual.run_stage(
        self,
        self.compute,
        block,
        [
          f"stage_{stage}_block_{i}"
          for i in range(self.compute.blocks_per_stage)
        ],
        x,
        stride=_stride(stage, 0),
        train=train,
      )
      features.append(x)
    if self.stages[-1] < len(self.stage_channels) - 1:
      return x
    x = layers.GlobalAveragePool()(x)
    head = layers.Dense(
      self.compute.num_classes, self.compute.dense_init, name="head"
    )
    return Outputs(head(x), tuple(features))


@dataclasses.dataclass(frozen=True)
class CifarResNet(Computation):
  """The ResNet-20/32/44/56/110/1202 family.

  Attributes:
    depth: number of weight layers, 6n + 2.
    num_classes: K.
    image_shape: (H, W, C) of the images; what MACs are counted for.
    initialization: "xavier", or "he": normal with variance 2 / fan_out, and
      torch's default for the last layer.
  """

  depth: int
  num_classes: int
  image_shape: tuple[int, int, int] = (32, 32, 3)
  initialization: Literal["xavier", "he"] = "xavier"

  def __post_init__(self):
    if self.depth < 8 or (self.depth - 2) % 6:
      raise ValueError(
        f"depth is {self.depth}: a CIFAR ResNet has 6n + 2 layers with n >= 1"
      )

  @property
  def name(self) -> str:
    """What reports call the network."""
    return f"resnet{self.depth}"

  @property
  def blocks_per_stage(self) -> int:
    """n of depth = 6n + 2."""
    return (self.depth - 2) // 6

  @property
  def kernel_init(self) -> layers.Initializer:
    """How convolutions are drawn."""
    he = self.initialization == "he"
    return layers.fan_out_normal if he else layers.xavier_normal

  @property
  def dense_init(self) -> layers.Initializer:
    """How the last layer is drawn."""
    he = self.initialization == "he"
    return layers.fan_in_uniform if he else layers.xavier_normal

  @property
  def feature_channels(self) -> tuple[int, int, int]:
    """Channels of the three compared blocks at full width."""
    return STAGE_CHANNELS

  @property
  def smallest_side(self) -> int:
    """Of images: what strides leave at least a pixel of."""
    return 4

  def width_candidates(self) -> tuple[float, ...]:
    """Every width up to 1 that gives different channels, thinnest first.

    The widest stage has 64 channels, so channels change at multiples of
    1/64 only; below 4/64 the first stage would be empty.
    """
    widest = max(STAGE_CHANNELS)
    thinnest = widest // min(STAGE_CHANNELS)
    return tuple(k / widest for k in range(thinnest, widest + 1))

  def stage_channels(self, width: float) -> tuple[int, int, int]:
    """Channels of the stages at `width`: truncated, as published.

    Raises:
      UserError: the width leaves a stage without channels.
    """
    channels = tuple(costs.truncated(c, width) for c in STAGE_CHANNELS)
    if min(channels) < 1:
      raise UserError(
        f"width {width:g} leaves a stage without channels: the thinnest "
        f"possible width is {1 / min(STAGE_CHANNELS):g}"
      )
    return channels

  def stem(self) -> nn.Module:
    """The common base: images [N, H, W, C] -> [N, H, W, 16]."""
    return _Stem(self)

  def branch(self, width: float) -> nn.Module:
    """The three stages and the head at `width`: -> `Outputs`."""
    return _Branch(self, self.stage_channels(width))

  def lower(self, width: float) -> nn.Module:
    """The stem and two stages at `width`."""
    stages = _Branch(self, self.stage_channels(width), (0, 1))
    return Lower(self.stem(), stages)

  def upper(self, width: float) -> nn.Module:
    """The last stage and the head at `width`: -> `Outputs` of this stage."""
    return _Branch(self, self.stage_channels(width), (2,))

  def cost(self, width: float) -> Cost:
    """Parameters and MACs of stem and branch at `width`; see `costs`."""
    height, breadth, image_channels = self.image_shape
    area = height * breadth
    total = costs.convolution(image_channels, STEM_CHANNELS, 3, area)
    total += costs.norm(STEM_CHANNELS)
    inputs = STEM_CHANNELS
    for stage, channels in enumerate(self.stage_channels(width)):
      for block in range(self.blocks_per_stage):
        stride = _stride(stage, block)
        height, breadth = -(-height // stride), -(-breadth // stride)
        total += residual.basic_block_cost(
          inputs, channels, stride, height * breadth
        )
        inputs = channels
    return total + costs.dense(inputs, self.num_classes)


def _stride(stage: int, block: int) -> int:
  return 2 if stage > 0 and block == 0 else 1
