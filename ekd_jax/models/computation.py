"""How a network is computed, whichever network it is.

A family of networks is a frozen dataclass that derives from `Computation`: its
own fields say what the layers are, those here how they are computed. It hands
itself to its modules, which make their layers with it.
"""

import dataclasses
from typing import Any, Self

import flax.linen as nn
import jax
import jax.numpy as jnp

from ekd_jax.models import layers
from ekd_jax.models.network import Scan


@dataclasses.dataclass(frozen=True, kw_only=True)
class Computation:
  """Options that change no parameter and, but for rounding, no result.

  Attributes:
    axis_name: device axis for batch statistics, None for per-device ones.
    noise_axis_name: device axis over which dropout is that of one global
      batch, None on one device.
    dtype: compute dtype of convolutions and maps.
    formulation: how layers are computed; see `layers.enter`.
    scan: whether equal blocks are compiled once; see `network.scans`.
    remat: whether less is kept for the gradient; see `run` and, for the layout
      of CPUs, `split.convolution`.
    in_loop: whether these layers are the body of a compiled loop.
  """

  axis_name: str | None = None
  noise_axis_name: str | None = None
  dtype: jnp.dtype = jnp.float32
  formulation: layers.Formulation = "lax"
  scan: Scan = "off"
  remat: bool = False
  in_loop: bool = False

  def alone(self) -> Self:
    """The same networks for one device of any kind, in the plain layout."""
    return dataclasses.replace(
      self,
      axis_name=None,
      noise_axis_name=None,
      formulation="lax",
      scan="off",
      remat=False,
    )

  def run(self, block: nn.Module, x: layers.Maps, *, train: bool) -> Any:
    """What a block makes of maps; a place where a gradient may start again.

    With `remat`, in the plain layout, only `x` is kept for the gradient and
    the block is computed twice (Chen et al. 2016).
    """
    if not (self.remat and train and isinstance(x, jax.Array)):
      return block(x, train=train)
    again = nn.remat(lambda block, x: block(x, train=train))
    return again(block, x)

  def looped(self) -> Self:
    """For the body of a loop, which computes everything again anyway."""
    return dataclasses.replace(self, in_loop=True, remat=False)

  def convolution(
    self, name: str, channels: int, size: int = 3, stride: int = 1, **kind: Any
  ) -> nn.Module:
    """A `layers.Convolution`; `kind` are its other attributes."""
    return layers.Convolution(
      channels, size, stride, self.dtype, self.remat, name=name, **kind
    )

  def norm(self, name: str, *, relu: bool = True, **kind: Any) -> nn.Module:
    """A `layers.BatchNormReLU`; `kind` are its other attributes."""
    return layers.BatchNormReLU(
      self.axis_name, relu, self.dtype, self.in_loop, name=name, **kind
    )
