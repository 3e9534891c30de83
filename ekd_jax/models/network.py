"""What every network is: a stem, then a branch with tapped blocks.

Splitting a network in two is what lets S students share their first layers:
the stem runs once, its output feeds every branch. A family of networks is
anything with these members, see `Family` and `resnet.CifarResNet`:

    stem() -> module           images [N, H, W, C] -> hidden maps
    branch(width) -> module    hidden maps -> Outputs
    cost(width) -> Cost        parameters and MACs, without building anything
"""

from typing import Any, NamedTuple, Protocol

import flax.linen as nn
import jax

from ekd_jax.compression import Cost


class Outputs(NamedTuple):
  """What a branch computes.

  Attributes:
    logits: unnormalised class scores [N, K], float32.
    features: outputs of the compared blocks, B arrays [N, H_b, W_b, C_b] in
      the compute dtype.
  """

  logits: jax.Array
  features: tuple[jax.Array, ...]


class Family(Protocol):
  """A network that can be built at any width.

  Attributes:
    name: what reports call the full-width network, such as "resnet110".
    feature_channels: channels of the compared blocks at full width; what
      adapters map thinner students' features to.
  """

  @property
  def name(self) -> str: ...

  @property
  def feature_channels(self) -> tuple[int, ...]: ...

  def stem(self) -> nn.Module: ...

  def branch(self, width: float) -> nn.Module: ...

  def cost(self, width: float) -> Cost: ...

  def width_candidates(self) -> tuple[float, ...]: ...

  def alone(self) -> "Family":
    """The same networks for one device: batch statistics of its own."""
    ...


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
) -> tuple[Any, Any]:
  """Runs a stem, a branch or a network with its running statistics.

  Args:
    module: what to run.
    params: its parameters.
    batch_stats: its running statistics.
    inputs: what it takes.
    train: whether batch norm uses (and updates) batch statistics.

  Returns:
    Its output, and the running statistics afterwards.
  """
  variables = {"params": params, "batch_stats": batch_stats}
  if not train:
    return module.apply(variables, inputs, train=False), batch_stats
  outputs, changed = module.apply(
    variables, inputs, train=True, mutable=["batch_stats"]
  )
  return outputs, changed["batch_stats"]
