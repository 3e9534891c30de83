"""What stands on top of whole networks: their maps joined, spread, taken back.

`Fusion` makes one classifier of the last maps of several networks (Kim et al.
2020, FFL; Li et al. 2021, FFSD). `Spread` and `Decoder` are FFSD's: the one
makes maps of one network as wide as those of all together, the other goes from
the last maps of a network back to the shallower ones.
"""

from collections.abc import Sequence

import flax.linen as nn

from ekd_jax.models import layers
from ekd_jax.models.computation import Computation
from ekd_jax.models.network import Outputs

_INIT = {"kernel_init": layers.fan_out_normal}


class Fusion(nn.Module):
  """A 3x3 convolution of each map, a 1x1 of all, and a classifier.

  Attributes:
    compute: how layers are computed.
    channels: of the fused maps.
    num_classes: K.
  """

  compute: Computation
  channels: int
  num_classes: int

  @nn.compact
  def __call__(self, maps: Sequence[layers.Maps], *, train: bool) -> Outputs:
    """Maps [N, H, W, C_i] of equal sides -> logits [N, K], the fused maps."""
    x = layers.concatenate(maps)
    x = _separable(self.compute, x, self.channels, train=train)
    pooled = layers.GlobalAveragePool()(x)
    head = layers.Dense(self.num_classes, layers.fan_in_uniform, name="head")
    logits = head(pooled)
    return Outputs(logits, (x,))


class Spread(nn.Module):
  """A 3x3 convolution of each map, and a 1x1 to the channels of all networks.

  Attributes:
    compute: how layers are computed.
    channels: of the result.
  """

  compute: Computation
  channels: int

  @nn.compact
  def __call__(self, x: layers.Maps, *, train: bool) -> layers.Maps:
    """[N, H, W, C] -> [N, H, W, channels]."""
    return _separable(self.compute, x, self.channels, train=train)


class Decoder(nn.Module):
  """From the last maps back to the shallower ones, doubling the sides.

  Attributes:
    compute: how layers are computed.
    channels: of the maps to go back to, shallowest first.
  """

  compute: Computation
  channels: tuple[int, ...]

  @nn.compact
  def __call__(self, x: layers.Maps, *, train: bool) -> tuple[layers.Maps, ...]:
    """[N, H, W, C] -> maps of these channels, the shallowest, largest first."""
    found = []
    for index, channels in reversed(list(enumerate(self.channels))):
      x = layers.TransposedConvolution(
        channels, self.compute.dtype, name=f"conv_{index}", **_INIT
      )(x)
      x = self.compute.norm(f"norm_{index}")(x, train=train)
      found.append(x)
    return tuple(reversed(found))


def _separable(
  compute: Computation, x: layers.Maps, channels: int, *, train: bool
) -> layers.Maps:
  """Within the module that calls it: its submodules are conv_0, norm_0, ..."""
  inputs = layers.channels(x)
  x = compute.convolution("conv_0", inputs, groups=inputs, **_INIT)(x)
  x = compute.norm("norm_0")(x, train=train)
  x = compute.convolution("conv_1", channels, 1, **_INIT)(x)
  return compute.norm("norm_1")(x, train=train)
