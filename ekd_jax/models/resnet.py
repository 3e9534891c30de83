"""CIFAR ResNets (He et al. 2016) of any depth 6n + 2 and any width.

A stem at full width (one 3x3 convolution to 16 channels) is followed by a
branch of three stages of n basic blocks with 16, 32 and 64 channels times the
width, truncated. Where a block changes stride or channels its shortcut is a
1x1 convolution with batch norm ("option B"); so a thin branch has such a
shortcut in its very first block, 16 -> trunc(16 width) channels, and the full
network has none there. The outputs of the three stages are the compared
blocks.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ekd_jax.compression import Cost
from ekd_jax.errors import UserError
from ekd_jax.models import layers
from ekd_jax.models.network import Outputs, Scan, scan_modules, scans

STEM_CHANNELS = 16
STAGE_CHANNELS = (16, 32, 64)


class _Stem(nn.Module):
  axis_name: str | None
  dtype: jnp.dtype
  formulation: layers.Formulation

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool) -> layers.Maps:
    x = layers.enter(images, self.formulation)
    x = layers.Convolution(STEM_CHANNELS, dtype=self.dtype, name="conv")(x)
    return layers.BatchNormReLU(self.axis_name, dtype=self.dtype, name="norm")(
      x, train=train
    )


class _BasicBlock(nn.Module):
  channels: int
  stride: int
  axis_name: str | None
  dtype: jnp.dtype
  remat: bool = False
  in_loop: bool = False

  @nn.compact
  def __call__(self, x: layers.Maps, *, train: bool) -> layers.Maps:
    def conv(name: str, size: int, stride: int) -> layers.Convolution:
      return layers.Convolution(
        self.channels, size, stride, self.dtype, self.remat, name=name
      )

    def norm(name: str, *, relu: bool) -> layers.BatchNormReLU:
      return layers.BatchNormReLU(
        self.axis_name, relu, self.dtype, self.in_loop, name=name
      )

    shortcut = x
    if _needs_projection(layers.channels(x), self.channels, self.stride):
      shortcut = conv("shortcut_conv", 1, self.stride)(x)
      shortcut = norm("shortcut_norm", relu=False)(shortcut, train=train)
    x = conv("conv_0", 3, self.stride)(x)
    x = norm("norm_0", relu=True)(x, train=train)
    x = conv("conv_1", 3, 1)(x)
    return norm("norm_1", relu=True)(x, residual=shortcut, train=train)


class _Branch(nn.Module):
  stage_channels: tuple[int, int, int]
  blocks_per_stage: int
  num_classes: int
  axis_name: str | None
  dtype: jnp.dtype
  scan: Scan
  remat: bool

  @nn.compact
  def __call__(self, x: layers.Maps, *, train: bool) -> Outputs:
    features = []
    for stage, channels in enumerate(self.stage_channels):

      def block(
        stride: int, name: str | None, channels: int = channels, **options: Any
      ) -> nn.Module:
        return _BasicBlock(
          channels, stride, self.axis_name, self.dtype, name=name, **options
        )

      first, *equal = (
        f"stage_{stage}_block_{index}" for index in range(self.blocks_per_stage)
      )
      x = block(1 if stage == 0 else 2, first, remat=self.remat)(x, train=train)
      if not self.is_initializing() and scans(self.scan, x, len(equal)):
        # No `remat`: the loop's body computes everything again anyway.
        one = block(1, None, parent=None, in_loop=True)
        x = scan_modules(self, one, equal, x, train=train)
      else:
        for name in equal:
          x = block(1, name, remat=self.remat)(x, train=train)
      features.append(x)
    x = layers.GlobalAveragePool()(x)
    logits = layers.Dense(self.num_classes, name="head")(x)
    return Outputs(logits, tuple(features))


@dataclasses.dataclass(frozen=True)
class CifarResNet:
  """The ResNet-20/32/44/56/110/1202 family.

  Attributes:
    depth: number of weight layers, 6n + 2.
    num_classes: K.
    image_shape: (H, W, C) of the images; what MACs are counted for.
    axis_name: device axis for batch statistics, None for per-device ones.
    dtype: compute dtype of convolutions and maps.
    formulation: how layers are computed; see `layers.enter`.
    scan: whether equal blocks are compiled once; see `network.scans`.
    remat: whether less is kept for the gradient; see `split.convolution`.
  """

  depth: int
  num_classes: int
  image_shape: tuple[int, int, int] = (32, 32, 3)
  axis_name: str | None = None
  dtype: jnp.dtype = jnp.float32
  formulation: layers.Formulation = "lax"
  scan: Scan = "off"
  remat: bool = False

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
  def feature_channels(self) -> tuple[int, int, int]:
    """Channels of the three compared blocks at full width."""
    return STAGE_CHANNELS

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
    channels = tuple(int(c * width) for c in STAGE_CHANNELS)
    if min(channels) < 1:
      raise UserError(
        f"width {width:g} leaves a stage without channels: the thinnest "
        f"possible width is {1 / min(STAGE_CHANNELS):g}"
      )
    return channels

  def alone(self) -> "CifarResNet":
    """The same networks for one device of any kind, in the plain layout."""
    return dataclasses.replace(
      self, axis_name=None, formulation="lax", scan="off", remat=False
    )

  def stem(self) -> nn.Module:
    """The common base: images [N, H, W, C] -> [N, H, W, 16]."""
    return _Stem(self.axis_name, self.dtype, self.formulation)

  def branch(self, width: float) -> nn.Module:
    """The three stages and the head at `width`: -> `Outputs`."""
    return _Branch(
      self.stage_channels(width),
      self.blocks_per_stage,
      self.num_classes,
      self.axis_name,
      self.dtype,
      self.scan,
      self.remat,
    )

  def cost(self, width: float) -> Cost:
    """Parameters and MACs of stem and branch at `width`, by arithmetic.

    MACs are those of convolutions and the head for one image, taps on the
    zero padding included, as the field counts them.
    """
    height, breadth, image_channels = self.image_shape
    conv = _conv_cost(image_channels, STEM_CHANNELS, 3, height * breadth)
    total = conv + _norm_cost(STEM_CHANNELS)
    inputs = STEM_CHANNELS
    for stage, channels in enumerate(self.stage_channels(width)):
      for block in range(self.blocks_per_stage):
        stride = _stride(stage, block)
        height, breadth = -(-height // stride), -(-breadth // stride)
        area = height * breadth
        total += _conv_cost(inputs, channels, 3, area)
        total += _conv_cost(channels, channels, 3, area)
        total += _norm_cost(channels) + _norm_cost(channels)
        if _needs_projection(inputs, channels, stride):
          total += _conv_cost(inputs, channels, 1, area)
          total += _norm_cost(channels)
        inputs = channels
    weights = inputs * self.num_classes
    return total + Cost(params=weights + self.num_classes, macs=weights)


def _stride(stage: int, block: int) -> int:
  return 2 if stage > 0 and block == 0 else 1


def _needs_projection(inputs: int, outputs: int, stride: int) -> bool:
  return stride != 1 or inputs != outputs


def _conv_cost(inputs: int, outputs: int, size: int, area: int) -> Cost:
  weights = size * size * inputs * outputs
  return Cost(params=weights, macs=weights * area)


def _norm_cost(channels: int) -> Cost:
  return Cost(params=2 * channels, macs=0)
