"""What every network is: a stem, then a branch with tapped blocks.

Splitting a network in two is what lets S students share their first layers:
the stem runs once, its output feeds every branch. A family of networks is
anything with these members, see `Family`; the built-in ones are in `families`:

    stem() -> module           images [N, H, W, C] -> hidden maps
    branch(width) -> module    hidden maps -> Outputs
    cost(width) -> Cost        parameters and MACs, without building anything
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import jax_utils

from ekd_jax.compression import Cost
from ekd_jax.models.layers import BatchLast, Maps


class Outputs(NamedTuple):
  """What a branch computes.

  Attributes:
    logits: unnormalised class scores [N, K], float32.
    features: outputs of the compared blocks, B arrays [N, H_b, W_b, C_b] in
      the compute dtype; `BatchLast` of them where layers use that layout.
  """

  logits: jax.Array
  features: tuple[Maps, ...]


class Family(Protocol):
  """A network that can be built at any width.

  Attributes:
    name: what reports call the full-width network, such as "resnet110".
    feature_channels: channels of the compared blocks at full width; what
      adapters map thinner students' features to.
    smallest_side: of the images that it can take, in pixels.
  """

  @property
  def name(self) -> str: ...

  @property
  def feature_channels(self) -> tuple[int, ...]: ...

  @property
  def smallest_side(self) -> int: ...

  def stem(self) -> nn.Module: ...

  def branch(self, width: float) -> nn.Module: ...

  def lower(self, width: float) -> nn.Module:
    """What equal networks can share: the stem, and all stages but the last."""
    ...

  def upper(self, width: float) -> nn.Module:
    """What is left: hidden maps -> `Outputs`, the last maps among them."""
    ...

  def cost(self, width: float) -> Cost: ...

  def width_candidates(self) -> tuple[float, ...]: ...

  def alone(self) -> "Family":
    """The same networks for one device of any kind: what users are given.

    Batch statistics are the device's own, features plain arrays.
    """
    ...


class Lower(nn.Module):
  """A stem and the first stages of a branch as one module.

  Attributes:
    stem: module mapping images to hidden maps.
    stages: module mapping hidden maps to hidden maps.
  """

  stem: nn.Module
  stages: nn.Module

  def __call__(self, images: jax.Array, *, train: bool) -> Maps:
    """Images [N, H, W, C] -> hidden maps."""
    return self.stages(self.stem(images, train=train), train=train)


class Network(nn.Module):
  """A student taken alone: its stem and its branch as one ordinary module.

  Attributes:
    stem: module mapping images to hidden maps.
    branch: module mapping hidden maps to `Outputs`.
  """

  stem: nn.Module
  branch: nn.Module

  def __call__(self, images: jax.Array, *, train: bool = False) -> Outputs:
    """Runs the network.

    Args:
      images: normalised images [N, H, W, C].
      train: whether batch norm uses (and updates) batch statistics.

    Returns:
      `Outputs` with logits [N, K] and the features of the compared blocks.
    """
    return self.branch(self.stem(images, train=train), train=train)


def apply_network(
  module: nn.Module,
  params: Any,
  batch_stats: Any,
  inputs: jax.Array,
  *,
  train: bool,
  rng: jax.Array | None = None,
) -> tuple[Any, Any]:
  """Runs a stem, a branch or a network with its running statistics.

  Args:
    module: what to run.
    params: its parameters.
    batch_stats: its running statistics.
    inputs: what it takes.
    train: whether batch norm uses (and updates) batch statistics, and dropout
      drops.
    rng: key of what is random in training, the same on every device; may be
      None for a network without dropout.

  Returns:
    Its output, and the running statistics afterwards.
  """
  variables = {"params": params, "batch_stats": batch_stats}
  if not train:
    return module.apply(variables, inputs, train=False), batch_stats
  outputs, changed = module.apply(
    variables,
    inputs,
    train=True,
    mutable=["batch_stats"],
    rngs=None if rng is None else {"dropout": rng},
  )
  return outputs, changed.get("batch_stats", {})


def init_network(
  module: nn.Module, rng: jax.Array, inputs: Any
) -> tuple[Any, Any]:
  """Draws the variables of a stem, a branch or a network; runs nothing.

  Args:
    module: whose variables.
    rng: a key.
    inputs: what it takes, as shapes and types.

  Returns:
    Its variables, and its output as shapes and types.
  """
  leaves, structure = jax.tree.flatten(inputs)
  outputs, variables = jax_utils.partial_eval_by_shape(
    lambda *arrays: module.init_with_output(
      rng, structure.unflatten(arrays), train=False
    ),
    [(leaf.shape, leaf.dtype) for leaf in leaves],
  )
  return {"batch_stats": {}, **variables}, outputs


Scan = Literal["auto", "on", "off"]

# Equal modules in a row from which on they are a loop. It takes the least
# memory and starts sooner, but computes the forward pass twice and is slower
# by a quarter: see docs/performance.md.
_SCANNED_MODULES = 24


def scans(scan: Scan, inputs: Maps, count: int) -> bool:
  """Whether `count` equal modules in a row are compiled once.

  Args:
    scan: "on" and "off" decide; "auto" is on for many modules in the split
      formulation. (On a CPU, XLA's own convolutions are slower by far inside
      a loop.)
    inputs: what the first of them is given.
    count: how many there are.

  Returns:
    Whether to use `scan_modules`.
  """
  if scan == "auto":
    return count >= _SCANNED_MODULES and isinstance(inputs, BatchLast)
  return scan == "on" and count > 0


def scan_modules(
  parent: nn.Module,
  module: nn.Module,
  names: Sequence[str],
  inputs: Maps,
  *,
  train: bool,
) -> Maps:
  """Runs equal modules one after the other, as one compiled loop.

  The variables stay those of separate modules: they are stacked for the loop
  inside the compiled program.

  Args:
    parent: the module whose submodules they are.
    module: one of them, without a parent.
    names: their names.
    inputs: what the first is given; of the shape that each returns.
    train: whether batch norm uses (and updates) batch statistics.

  Returns:
    The output of the last.
  """
  variables = [
    (parent.variables["params"][name], parent.variables["batch_stats"][name])
    for name in names
  ]
  stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *variables)

  # Checkpointed: each module's input is kept and the rest computed again,
  # because stacking all that a gradient needs costs more than computing it.
  @jax.checkpoint
  def body(x: Maps, one: Any) -> tuple[Maps, Any]:
    return apply_network(module, *one, x, train=train)

  outputs, batch_stats = jax.lax.scan(body, inputs, stacked)
  if train:
    for index, name in enumerate(names):
      values = jax.tree.map(lambda leaf, i=index: leaf[i], batch_stats)
      parent.put_variable("batch_stats", name, values)
  return outputs
