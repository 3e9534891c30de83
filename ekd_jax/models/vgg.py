"""VGG-16 with batch norm (Simonyan and Zisserman 2015) for small images.

Five groups of 3x3 convolutions with bias, batch norm and ReLU, each followed
by a max pooling, then three dense layers; as the PCL code has it. The common
base is the first group. Compared are the maps after the last three poolings,
the last of one pixel for images of 32.
"""

import dataclasses

import flax.linen as nn
import jax

from ekd_jax.compression import Cost
from ekd_jax.errors import UserError
from ekd_jax.models import costs, layers
from ekd_jax.models.computation import Computation
from ekd_jax.models.network import Lower, Outputs

# (channels, convolutions) of each group, and the sizes of two dense layers.
GROUPS = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
HIDDEN = (512, 512)

_INIT = {"kernel_init": layers.fan_out_normal, "use_bias": True}
_DENSE_INIT = layers.normal(0.01), layers.zeros


class _Groups(nn.Module):
  """Some of the groups: maps -> the maps after each pooling."""

  compute: Computation
  channels: tuple[int, ...]
  groups: tuple[int, ...]

  @nn.compact
  def __call__(self, x: layers.Maps, *, train: bool) -> list[layers.Maps]:
    pooled = []
    for group in self.groups:
      for index in range(GROUPS[group][1]):
        name = f"{group}_{index}"
        x = self.compute.convolution(
          f"conv_{name}", self.channels[group], **_INIT
        )(x)
        x = self.compute.norm(f"norm_{name}")(x, train=train)
      x = layers.max_pool_squares(x)
      pooled.append(x)
    return pooled


class _Stem(nn.Module):
  compute: Computation
  channels: tuple[int, ...]

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool) -> layers.Maps:
    x = layers.enter(images, self.compute.formulation)
    group = _Groups(self.compute, self.channels, (0,), name="group")
    return group(x, train=train)[-1]


class _Middle(nn.Module):
  """The groups between the first and the last, as maps -> maps."""

  compute: Computation
  channels: tuple[int, ...]

  @nn.compact
  def __call__(self, x: layers.Maps, *, train: bool) -> layers.Maps:
    groups = _Groups(self.compute, self.channels, (1, 2, 3), name="groups")
    return groups(x, train=train)[-1]


class _Branch(nn.Module):
  """Some of the groups, and the dense layers."""

  compute: "VGG16"
  channels: tuple[int, ...]
  hidden: tuple[int, ...]
  groups: tuple[int, ...]

  @nn.compact
  def __call__(self, x: layers.Maps, *, train: bool) -> Outputs:
    groups = _Groups(self.compute, self.channels, self.groups, name="groups")
    pooled = groups(x, train=train)
    # Of one pixel, for which the published network is made; of more, the mean.
    x = layers.GlobalAveragePool()(pooled[-1])
    for index, size in enumerate(self.hidden):
      x = jax.nn.relu(
        layers.Dense(size, *_DENSE_INIT, name=f"dense_{index}")(x)
      )
    head = layers.Dense(self.compute.num_classes, *_DENSE_INIT, name="head")
    return Outputs(head(x), tuple(pooled[-3:]))


@dataclasses.dataclass(frozen=True)
class VGG16(Computation):
  """VGG-16.

  Attributes:
    num_classes: K.
    image_shape: (H, W, C) of the images; what MACs are counted for.
  """

  num_classes: int
  image_shape: tuple[int, int, int] = (32, 32, 3)

  @property
  def name(self) -> str:
    """What reports call the network."""
    return "vgg16"

  @property
  def feature_channels(self) -> tuple[int, int, int]:
    """Channels of the three compared maps at full width."""
    return self.channels(1.0)[-3:]

  @property
  def smallest_side(self) -> int:
    """Of images: what poolings leave at least a pixel of."""
    return 32

  def width_candidates(self) -> tuple[float, ...]:
    """Every width up to 1 that gives different channels, thinnest first."""
    widest = max(channels for channels, _ in GROUPS)
    first = widest // GROUPS[1][0]
    return tuple(k / widest for k in range(first, widest + 1))

  def channels(self, width: float) -> tuple[int, ...]:
    """Channels of the groups at `width`, truncated, but those of the first.

    Raises:
      UserError: the width leaves a group without channels.
    """
    first, *others = (channels for channels, _ in GROUPS)
    found = first, *(costs.truncated(c, width) for c in others)
    if min(found) < 1:
      raise UserError(
        f"width {width:g} leaves a group without channels: the thinnest "
        f"possible width is {1 / min(others):g}"
      )
    return found

  def hidden(self, width: float) -> tuple[int, ...]:
    """Sizes of the hidden dense layers at `width`, truncated."""
    return tuple(costs.truncated(size, width) for size in HIDDEN)

  def stem(self) -> nn.Module:
    """The common base: images [N, H, W, C] -> [N, H / 2, W / 2, 64]."""
    return _Stem(self, self.channels(1.0))

  def branch(self, width: float) -> nn.Module:
    """Four groups and the dense layers at `width`: -> `Outputs`."""
    return _Branch(self, self.channels(width), self.hidden(width), (1, 2, 3, 4))

  def lower(self, width: float) -> nn.Module:
    """The stem and three groups at `width`."""
    return Lower(self.stem(), _Middle(self, self.channels(width)))

  def upper(self, width: float) -> nn.Module:
    """The last group and the dense layers at `width`: -> `Outputs`."""
    return _Branch(self, self.channels(width), self.hidden(width), (4,))

  def cost(self, width: float) -> Cost:
    """Parameters and MACs of stem and branch at `width`; see `costs`."""
    height, breadth, inputs = self.image_shape
    total = costs.NOTHING
    for channels, (_, count) in zip(self.channels(width), GROUPS, strict=True):
      for _ in range(count):
        total += costs.biased_convolution(inputs, channels, 3, height * breadth)
        total += costs.norm(channels)
        inputs = channels
      height, breadth = height // 2, breadth // 2
    for size in (*self.hidden(width), self.num_classes):
      total += costs.dense(inputs, size)
      inputs = size
    return total
