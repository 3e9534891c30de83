"""A user's network as a family: what the built-in ones do by arithmetic.

Given a stem and a function from a width to a branch, two ordinary Flax
modules, channels, parameters and MACs are found by tracing them; nothing is
compiled or run. docs/your_own_network.md is the tutorial.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Self

import flax.linen as nn
import jax
import jax.numpy as jnp

from ekd_jax.compression import Cost
from ekd_jax.models.layers import channels
from ekd_jax.models.network import Network, Outputs

# Widths that ratios are looked for among, if none are given.
_WIDTHS = tuple(k / 64 for k in range(1, 65))


@dataclasses.dataclass(frozen=True)
class OwnFamily:
  """A network that is not one of ours, at any width.

  Attributes:
    name: what reports call it.
    stem_module: images [N, H, W, C] -> hidden maps; called as stem(images,
      train=...).
    branch_of: width in (0, 1] -> module; called as branch(hidden, train=...)
      and returns `Outputs`, with as many features at every width, each of the
      same height and width.
    image_shape: (H, W, C) of the images.
    smallest_side: of images that it can take.
    widths: those that ratios are looked for among, thinnest first, the last
      one 1. Where `branch_of` fails for lack of channels, leave them out.
  """

  name: str
  stem_module: nn.Module
  branch_of: Callable[[float], nn.Module]
  image_shape: tuple[int, int, int]
  smallest_side: int = 1
  widths: tuple[float, ...] = _WIDTHS

  @functools.cached_property
  def feature_channels(self) -> tuple[int, ...]:
    """Channels of the compared maps at full width."""
    _, outputs = self._traced(1.0)
    return tuple(channels(maps) for maps in outputs.features)

  def width_candidates(self) -> tuple[float, ...]:
    """See `widths`."""
    return self.widths

  def stem(self) -> nn.Module:
    """The common base."""
    return self.stem_module

  def branch(self, width: float) -> nn.Module:
    """The rest at `width`."""
    return self.branch_of(width)

  def lower(self, width: float) -> nn.Module:
    """The stem alone: what else there is, is not known."""
    del width
    return self.stem()

  def upper(self, width: float) -> nn.Module:
    """The rest at `width`."""
    return self.branch(width)

  def alone(self) -> Self:
    """The same: its modules are ordinary ones already."""
    return self

  def cost(self, width: float) -> Cost:
    """Parameters and MACs of stem and branch, counted in the traced network."""
    variables, _ = self._traced(width)
    jaxpr = jax.make_jaxpr(self._network(width).apply)(variables, self._images)
    params = jax.tree.leaves(variables["params"])
    return Cost(
      params=sum(math.prod(array.shape) for array in params),
      macs=count_macs(jaxpr.jaxpr),
    )

  @property
  def _images(self) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((1, *self.image_shape), jnp.float32)

  def _network(self, width: float) -> Network:
    return Network(self.stem(), self.branch(width))

  def _traced(self, width: float) -> tuple[Any, Outputs]:
    """Variables and outputs, as shapes and types."""
    outputs, variables = jax.eval_shape(
      self._network(width).init_with_output, jax.random.key(0), self._images
    )
    return variables, outputs


def count_macs(jaxpr: Any) -> int:
  """Multiply-accumulates of the convolutions and matrix products of a jaxpr."""
  total = 0
  for equation in jaxpr.eqns:
    name = equation.primitive.name
    if name == "conv_general_dilated":
      kernel = equation.invars[1].aval.shape
      outputs = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
      total += equation.outvars[0].aval.size * math.prod(kernel) // outputs
    elif name == "dot_general":
      (contracted, _), _ = equation.params["dimension_numbers"]
      shape = equation.invars[0].aval.shape
      depth = math.prod(shape[axis] for axis in contracted)
      total += equation.outvars[0].aval.size * depth
    else:
      times = equation.params.get("length", 1) if name == "scan" else 1
      total += times * sum(map(count_macs, _inner(equation.params)))
  return total


def _inner(params: dict[str, Any]) -> list[Any]:
  """The jaxprs among an equation's parameters."""
  found = []
  for value in params.values():
    value = getattr(value, "jaxpr", value)  # A closed one holds the open one.
    if hasattr(value, "eqns"):
      found.append(value)
  return found
