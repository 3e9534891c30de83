"""Wide ResNets for small images (Zagoruyko and Komodakis 2016), at any width.

Three stages of pre-activation blocks: batch norm and ReLU come before each
convolution, and sums are handed on as they are. In the form of the FFSD code:
convolutions have a bias, a block strides in its second convolution, and the
last batch norm moves its running statistics nine tenths of the way in a step.
Compared are the sums after the first two stages and the ReLU after the third.
"""

import dataclasses
import re

import flax.linen as nn
import jax

from ekd_jax.compression import Cost
from ekd_jax.errors import UserError
from ekd_jax.models import costs, layers
from ekd_jax.models.computation import Computation
from ekd_jax.models.network import Lower, Outputs

STEM_CHANNELS = 16
# Times the factor k.
STAGE_CHANNELS = (16, 32, 64)
# Of every block's maps, in the one network that the FFSD code has it in.
_DROPOUT = {"28-10": 0.3}

_INIT = {"kernel_init": layers.fan_out_normal, "use_bias": True}


class _Stem(nn.Module):
  compute: "WideResNet"

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool) -> layers.Maps:
    del train  # There is no batch norm.
    x = layers.enter(images, self.compute.formulation)
    return self.compute.convolution("conv", STEM_CHANNELS, **_INIT)(x)


class _Block(nn.Module):
  compute: "WideResNet"
  channels: int
  stride: int

  @nn.compact
  def __call__(self, x: layers.Maps, *, train: bool) -> layers.Maps:
    conv, norm = self.compute.convolution, self.compute.norm
    shortcut = x
    if self.stride != 1 or layers.channels(x) != self.channels:
      shortcut = conv("shortcut", self.channels, 1, self.stride, **_INIT)(x)
    y = norm("norm_0")(x, train=train)
    y = conv("conv_0", self.channels, **_INIT)(y)
    drop = layers.Dropout(self.compute.dropout, self.compute.noise_axis_name)
    y = drop(y, train=train)
    y = norm("norm_1")(y, train=train)
    y = conv("conv_1", self.channels, 3, self.stride, **_INIT)(y)
    return layers.add(y, shortcut)


class _Branch(nn.Module):
  """Some of the stages, and after the last one the head."""

  compute: "WideResNet"
  stage_channels: tuple[int, int, int]
  stages: tuple[int, ...] = (0, 1, 2)

  @nn.compact
  def __call__(self, x: layers.Maps, *, train: bool) -> Outputs | layers.Maps:
    features = []
    for stage in self.stages:
      for index in range(self.compute.blocks_per_stage):
        block = _Block(
          self.compute,
          self.stage_channels[stage],
          _stride(stage, index),
          name=f"stage_{stage}_block_{index}",
        )
        x = self.compute.run(block, x, train=train)
      features.append(x)
    if self.stages[-1] < len(self.stage_channels) - 1:
      return x
    x = self.compute.norm("norm", momentum=0.1)(x, train=train)
    features[-1] = x
    head = layers.Dense(
      self.compute.num_classes, layers.fan_in_uniform, name="head"
    )
    return Outputs(head(layers.GlobalAveragePool()(x)), tuple(features))


@dataclasses.dataclass(frozen=True)
class WideResNet(Computation):
  """WRN-depth-k, such as 16-2.

  Attributes:
    variant: "DEPTH-K": depth 6n + 4, and what the channels are multiplied by.
    num_classes: K.
    image_shape: (H, W, C) of the images; what MACs are counted for.
  """

  variant: str
  num_classes: int
  image_shape: tuple[int, int, int] = (32, 32, 3)

  def __post_init__(self):
    if not is_variant(self.variant):
      raise ValueError(
        f"variant is {self.variant}: a Wide ResNet is DEPTH-K with a depth of "
        "6n + 4 and n >= 1"
      )

  @property
  def name(self) -> str:
    """What reports call the network."""
    return f"wide_resnet{self.variant}"

  @property
  def blocks_per_stage(self) -> int:
    """n of depth = 6n + 4."""
    return (_numbers(self.variant)[0] - 4) // 6

  @property
  def dropout(self) -> float:
    """What part of the maps inside a block is zeroed in training."""
    return _DROPOUT.get(self.variant, 0.0)

  @property
  def feature_channels(self) -> tuple[int, int, int]:
    """Channels of the three compared maps at full width."""
    return self.stage_channels(1.0)

  @property
  def smallest_side(self) -> int:
    """Of images: what strides leave at least a pixel of."""
    return 4

  def width_candidates(self) -> tuple[float, ...]:
    """Every width up to 1 that gives different channels, thinnest first."""
    _, factor = _numbers(self.variant)
    widest, narrowest = (factor * c for c in (64, 16))
    first = widest // narrowest
    return tuple(k / widest for k in range(first, widest + 1))

  def stage_channels(self, width: float) -> tuple[int, int, int]:
    """Channels of the stages at `width`, truncated.

    Raises:
      UserError: the width leaves a stage without channels.
    """
    _, factor = _numbers(self.variant)
    channels = tuple(costs.truncated(factor * c, width) for c in STAGE_CHANNELS)
    if min(channels) < 1:
      raise UserError(
        f"width {width:g} leaves a stage without channels: the thinnest "
        f"possible width is {1 / (factor * min(STAGE_CHANNELS)):g}"
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
    return Lower(self.stem(), _Branch(self, self.stage_channels(width), (0, 1)))

  def upper(self, width: float) -> nn.Module:
    """The last stage and the head at `width`: -> `Outputs` of this stage."""
    return _Branch(self, self.stage_channels(width), (2,))

  def cost(self, width: float) -> Cost:
    """Parameters and MACs of stem and branch at `width`; see `costs`."""
    height, breadth, image_channels = self.image_shape
    conv = costs.biased_convolution
    total = conv(image_channels, STEM_CHANNELS, 3, height * breadth)
    inputs = STEM_CHANNELS
    for stage, channels in enumerate(self.stage_channels(width)):
      for index in range(self.blocks_per_stage):
        stride = _stride(stage, index)
        total += costs.norm(inputs) + costs.norm(channels)
        total += conv(inputs, channels, 3, height * breadth)
        height, breadth = -(-height // stride), -(-breadth // stride)
        total += conv(channels, channels, 3, height * breadth)
        if stride != 1 or inputs != channels:
          total += conv(inputs, channels, 1, height * breadth)
        inputs = channels
    total += costs.norm(inputs)
    return total + costs.dense(inputs, self.num_classes)


def is_variant(word: str) -> bool:
  """Whether a word is DEPTH-K of a possible network."""
  if not re.fullmatch(r"\d{1,4}-\d{1,3}", word):
    return False
  depth, factor = _numbers(word)
  return depth >= 10 and depth % 6 == 4 and factor >= 1


def _numbers(variant: str) -> tuple[int, int]:
  depth, factor = map(int, variant.split("-"))
  return depth, factor


def _stride(stage: int, index: int) -> int:
  return 2 if stage > 0 and index == 0 else 1
