"""Residual blocks (He et al. 2016), stages of them, and what they cost.

A block whose stride or channels change has a 1x1 convolution with batch norm
as its shortcut ("option B"), any other the identity. A bottleneck strides in
its 3x3 convolution.
"""

from collections.abc import Callable, Sequence

import flax.linen as nn

from ekd_jax.compression import Cost
from ekd_jax.models import costs, layers
from ekd_jax.models.computation import Computation
from ekd_jax.models.network import scan_modules, scans


class BasicBlock(nn.Module):
  """Two 3x3 convolutions.

  Attributes:
    compute: how layers are computed.
    channels: of the output, and between the two.
    stride: of the first convolution.
    kernel_init: how kernels are drawn.
  """

  compute: Computation
  channels: int
  stride: int
  kernel_init: layers.Initializer

  @nn.compact
  def __call__(self, x: layers.Maps, *, train: bool) -> layers.Maps:
    """[N, H, W, C] -> [N, ceil(H / stride), ceil(W / stride), channels]."""
    conv, norm = self.compute.convolution, self.compute.norm
    kind = {"kernel_init": self.kernel_init}
    shortcut = _shortcut(self, x, train=train)
    x = conv("conv_0", self.channels, 3, self.stride, **kind)(x)
    x = norm("norm_0")(x, train=train)
    x = conv("conv_1", self.channels, 3, **kind)(x)
    return norm("norm_1")(x, residual=shortcut, train=train)


class Bottleneck(nn.Module):
  """A 1x1 convolution down, a 3x3 one in groups, a 1x1 one up.

  Attributes:
    compute: how layers are computed.
    channels: of the output.
    stride: of the 3x3 convolution.
    kernel_init: how kernels are drawn.
    inner: channels between the convolutions.
    groups: of the 3x3 convolution; above 1 in ResNeXt.
  """

  compute: Computation
  channels: int
  stride: int
  kernel_init: layers.Initializer
  inner: int
  groups: int

  @nn.compact
  def __call__(self, x: layers.Maps, *, train: bool) -> layers.Maps:
    """[N, H, W, C] -> [N, ceil(H / stride), ceil(W / stride), channels]."""
    conv, norm = self.compute.convolution, self.compute.norm
    kind = {"kernel_init": self.kernel_init}
    shortcut = _shortcut(self, x, train=train)
    x = conv("conv_0", self.inner, 1, **kind)(x)
    x = norm("norm_0")(x, train=train)
    x = conv("conv_1", self.inner, 3, self.stride, groups=self.groups, **kind)(
      x
    )
    x = norm("norm_1")(x, train=train)
    x = conv("conv_2", self.channels, 1, **kind)(x)
    return norm("norm_2")(x, residual=shortcut, train=train)


# (compute, stride, name or None, other arguments of a module) -> a block.
MakeBlock = Callable[..., nn.Module]


def run_stage(
  parent: nn.Module,
  compute: Computation,
  block: MakeBlock,
  names: Sequence[str],
  x: layers.Maps,
  *,
  stride: int,
  train: bool,
) -> layers.Maps:
  """A stage: one block that may stride, then equal ones.

  Args:
    parent: the module whose submodules the blocks are, in its call.
    compute: how layers are computed.
    block: makes one of them.
    names: of all of them.
    x: what the first is given.
    stride: of the first; the others have 1.
    train: see `Network`.

  Returns:
    The output of the last.
  """
  first, *equal = names
  x = compute.run(block(compute, stride, name=first), x, train=train)
  if not parent.is_initializing() and scans(compute.scan, x, len(equal)):
    one = block(compute.looped(), 1, name=None, parent=None)
    return scan_modules(parent, one, equal, x, train=train)
  for name in equal:
    x = compute.run(block(compute, 1, name=name), x, train=train)
  return x


def basic_block_cost(
  inputs: int, channels: int, stride: int, area: int
) -> Cost:
  """Of a `BasicBlock` whose output maps have `area` pixels."""
  total = costs.convolution(inputs, channels, 3, area)
  total += costs.convolution(channels, channels, 3, area)
  total += costs.norm(channels) + costs.norm(channels)
  return total + _shortcut_cost(inputs, channels, stride, area)


def bottleneck_cost(
  inputs: int,
  channels: int,
  stride: int,
  inner: int,
  groups: int,
  input_area: int,
  area: int,
) -> Cost:
  """Of a `Bottleneck` that makes maps of `area` pixels of `input_area`."""
  total = costs.convolution(inputs, inner, 1, input_area)
  total += costs.convolution(inner, inner, 3, area, groups)
  total += costs.convolution(inner, channels, 1, area)
  total += costs.norm(inner) + costs.norm(inner) + costs.norm(channels)
  return total + _shortcut_cost(inputs, channels, stride, area)


def _shortcut(
  block: BasicBlock | Bottleneck, x: layers.Maps, *, train: bool
) -> layers.Maps:
  outputs, stride = block.channels, block.stride
  if not _needs_projection(layers.channels(x), outputs, stride):
    return x
  conv = block.compute.convolution(
    "shortcut_conv", outputs, 1, stride, kernel_init=block.kernel_init
  )
  norm = block.compute.norm("shortcut_norm", relu=False)
  return norm(conv(x), train=train)


def _needs_projection(inputs: int, outputs: int, stride: int) -> bool:
  return stride != 1 or inputs != outputs


def _shortcut_cost(inputs: int, outputs: int, stride: int, area: int) -> Cost:
  if not _needs_projection(inputs, outputs, stride):
    return costs.NOTHING
  projection = costs.convolution(inputs, outputs, 1, area)
  return projection + costs.norm(outputs)
