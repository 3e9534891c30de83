"""ResNets for large images, ResNeXts and Wide ResNets, at any width.

He et al. 2016, Xie et al. 2017 and Zagoruyko and Komodakis 2016, in the form of
torchvision. The common base is the 7x7 convolution, the max pooling and the
first stage, never compressed; the branch is stages two to four, whose planes
(128, 256, 512) are multiplied by the width and truncated, and the head. The
outputs of these three are the compared blocks.
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

STEM_CHANNELS = 64
PLANES = (64, 128, 256, 512)
# Output channels of a bottleneck, as a multiple of its planes.
EXPANSION = 4


class Variant(NamedTuple):
  """Which of the networks.

  Attributes:
    name: what reports call it.
    blocks: in each of the four stages.
    bottleneck: whether blocks are bottlenecks.
    groups: of their 3x3 convolutions.
    base_width: 64ths of the planes that each group of those has.
  """

  name: str
  blocks: tuple[int, int, int, int]
  bottleneck: bool = True
  groups: int = 1
  base_width: int = 64


VARIANTS = {
  "18": Variant("resnet18", (2, 2, 2, 2), bottleneck=False),
  "34": Variant("resnet34", (3, 4, 6, 3), bottleneck=False),
  "50": Variant("resnet50", (3, 4, 6, 3)),
  "101": Variant("resnet101", (3, 4, 23, 3)),
  "152": Variant("resnet152", (3, 8, 36, 3)),
  "resnext50": Variant("resnext50_32x4d", (3, 4, 6, 3), True, 32, 4),
  "resnext101": Variant("resnext101_32x8d", (3, 4, 23, 3), True, 32, 8),
  "wide50": Variant("wide_resnet50_2", (3, 4, 6, 3), True, 1, 128),
  "wide101": Variant("wide_resnet101_2", (3, 4, 23, 3), True, 1, 128),
}


class _Stage(NamedTuple):
  """One stage at some width.

  Attributes:
    channels: of its output.
    stride: of its first block.
    blocks: how many.
    inner: channels inside a bottleneck; None for basic blocks.
    groups: of a bottleneck's 3x3 convolutions.
  """

  channels: int
  stride: int
  blocks: int
  inner: int | None
  groups: int

  def run(
    self,
    parent: nn.Module,
    compute: Computation,
    name: str,
    x: layers.Maps,
    *,
    train: bool,
  ) -> layers.Maps:
    """The stage as submodules of `parent`."""

    def block(compute: Computation, stride: int, **own: Any) -> nn.Module:
      what = compute, self.channels, stride, layers.fan_out_normal
      if self.inner is None:
        return residual.BasicBlock(*what, **own)
      return residual.Bottleneck(*what, self.inner, self.groups, **own)

    names = [f"{name}_block_{index}" for index in range(self.blocks)]
    return residual.run_stage(
      parent, compute, block, names, x, stride=self.stride, train=train
    )

  def cost(self, inputs: int, height: int, breadth: int) -> Cost:
    """Of the stage, given maps of so many channels and pixels."""
    total = costs.NOTHING
    for block in range(self.blocks):
      stride = self.stride if block == 0 else 1
      input_area = height * breadth
      height, breadth = -(-height // stride), -(-breadth // stride)
      area = height * breadth
      if self.inner is None:
        total += residual.basic_block_cost(inputs, self.channels, stride, area)
      else:
        total += residual.bottleneck_cost(
          inputs,
          self.channels,
          stride,
          self.inner,
          self.groups,
          input_area,
          area,
        )
      inputs = self.channels
    return total


class _Stem(nn.Module):
  compute: Computation
  stage: _Stage

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool) -> layers.Maps:
    x = layers.enter(images, self.compute.formulation)
    x = self.compute.convolution(
      "conv", STEM_CHANNELS, 7, 2, kernel_init=layers.fan_out_normal
    )(x)
    x = self.compute.norm("norm")(x, train=train)
    x = layers.max_pool(x)
    return self.stage.run(self, self.compute, "stage_0", x, train=train)


class _Branch(nn.Module):
  """Some of the stages, and after the last one the head."""

  compute: Computation
  stages: tuple[_Stage, _Stage, _Stage]
  num_classes: int
  which: tuple[int, ...] = (1, 2, 3)

  @nn.compact
  def __call__(self, x: layers.Maps, *, train: bool) -> Outputs | layers.Maps:
    features = []
    for index in self.which:
      stage = self.stages[index - 1]
      x = stage.run(self, self.compute, f"stage_{index}", x, train=train)
      features.append(x)
    if self.which[-1] < len(self.stages):
      return x
    x = layers.GlobalAveragePool()(x)
    head = layers.Dense(
      self.num_classes, layers.uniform(x.shape[-1]), name="head"
    )
    return Outputs(head(x), tuple(features))


@dataclasses.dataclass(frozen=True)
class ImageNetResNet(Computation):
  """One of `VARIANTS`.

  Attributes:
    variant: which.
    num_classes: K.
    image_shape: (H, W, C) of the images; what MACs are counted for.
  """

  variant: Variant
  num_classes: int
  image_shape: tuple[int, int, int] = (224, 224, 3)

  @property
  def name(self) -> str:
    """What reports call the network."""
    return self.variant.name

  @property
  def feature_channels(self) -> tuple[int, int, int]:
    """Channels of the three compared blocks at full width."""
    return tuple(stage.channels for stage in self._stages(1.0))

  @property
  def smallest_side(self) -> int:
    """Of images: what strides leave at least a pixel of."""
    return 32

  def width_candidates(self) -> tuple[float, ...]:
    """Widths at which a stage's planes change, thinnest first."""
    widest = max(PLANES)
    widths = (k / widest for k in range(1, widest + 1))
    return tuple(width for width in widths if self._is_possible(width))

  def stem(self) -> nn.Module:
    """The common base: images -> [N, ceil(H / 4), ceil(W / 4), 64 or 256]."""
    return _Stem(self, self._stage(0, 1.0))

  def branch(self, width: float) -> nn.Module:
    """Stages two to four and the head at `width`: -> `Outputs`.

    Raises:
      UserError: the width leaves a stage without channels.
    """
    return _Branch(self, self._stages(width), self.num_classes)

  def lower(self, width: float) -> nn.Module:
    """The stem, and stages two and three at `width`."""
    stages = self._stages(width)
    return Lower(self.stem(), _Branch(self, stages, self.num_classes, (1, 2)))

  def upper(self, width: float) -> nn.Module:
    """Stage four and the head at `width`: -> `Outputs`."""
    return _Branch(self, self._stages(width), self.num_classes, (3,))

  def cost(self, width: float) -> Cost:
    """Parameters and MACs of stem and branch at `width`; see `costs`."""
    height, breadth, image_channels = self.image_shape
    height, breadth = -(-height // 2), -(-breadth // 2)
    total = costs.convolution(
      image_channels, STEM_CHANNELS, 7, height * breadth
    )
    total += costs.norm(STEM_CHANNELS)
    height, breadth = -(-height // 2), -(-breadth // 2)
    inputs = STEM_CHANNELS
    for stage in (self._stage(0, 1.0), *self._stages(width)):
      total += stage.cost(inputs, height, breadth)
      height = -(-height // stage.stride)
      breadth = -(-breadth // stage.stride)
      inputs = stage.channels
    return total + costs.dense(inputs, self.num_classes)

  def _stages(self, width: float) -> tuple[_Stage, ...]:
    if not self._is_possible(width):
      thinnest = self.width_candidates()[0]
      raise UserError(
        f"width {width:g} leaves a stage without channels: the thinnest "
        f"possible width is {thinnest:g}"
      )
    return tuple(self._stage(index, width) for index in (1, 2, 3))

  def _is_possible(self, width: float) -> bool:
    stage = self._stage(1, width)
    return stage.channels > 0 and stage.inner != 0

  def _stage(self, index: int, width: float) -> _Stage:
    _, blocks, bottleneck, groups, base_width = self.variant
    planes = costs.truncated(PLANES[index], width)
    inner = planes * base_width // 64 * groups if bottleneck else None
    return _Stage(
      channels=planes * EXPANSION if bottleneck else planes,
      stride=1 if index == 0 else 2,
      blocks=blocks[index],
      inner=inner,
      groups=groups,
    )
