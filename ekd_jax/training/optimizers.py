"""The published recipes: Nesterov SGD, and RMSProp for EfficientNets.

Weight decay is added to the gradient before momentum, for ALL parameters:
kernels, biases, batch norm's scale and bias, and adapters. That is what the
reference does (torch's SGD with weight_decay), and the published accuracies
were measured with it.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

# Parameters of these top-level entries are trained differently.
ADAPTERS = "adapters"
FUSION = "fusion"
DECODERS = "decoders"


def step_schedule(
  learning_rate: float,
  *,
  drops: Sequence[float],
  drop_factor: float,
  total_steps: int,
) -> optax.Schedule:
  """A learning rate that is multiplied at fractions of the training.

  Args:
    learning_rate: at the first step, > 0.
    drops: fractions of `total_steps` in (0, 1) at which it drops.
    drop_factor: what each drop multiplies it by.
    total_steps: optimizer steps of the whole training.

  Returns:
    step -> learning rate.
  """
  factors: dict[int, float] = {}
  for drop in drops:
    # In a very short training drops can meet on one step, or on the first.
    step = max(1, round(drop * total_steps))
    factors[step] = factors.get(step, 1.0) * drop_factor
  # optax.piecewise_constant_schedule has no product in the end, and XLA for
  # CPUs then computes it anew in the update of every parameter: an eighth of
  # all the instructions of a deep network's step.
  steps = np.asarray(list(factors), np.int32)
  values = np.asarray(list(factors.values()), np.float32)
  return lambda step: (
    learning_rate * jnp.prod(jnp.where(step >= steps, values, 1))
  )


def nesterov_sgd(
  schedule: optax.Schedule,
  *,
  momentum: float,
  weight_decay: float,
  adapter_multiplier: float,
) -> optax.GradientTransformation:
  """Nesterov SGD with coupled weight decay; adapters learn more slowly.

  Args:
    schedule: step -> learning rate.
    momentum: in [0, 1).
    weight_decay: times the parameters, added to the gradients; >= 0.
    adapter_multiplier: learning rate of the parameters under "adapters", as a
      multiple of everything else's.

  Returns:
    The optimizer.
  """
  return optax.chain(
    optax.add_decayed_weights(weight_decay),
    optax.sgd(schedule, momentum=momentum, nesterov=True),
    optax.masked(optax.scale(adapter_multiplier), _adapter_mask),
  )


def rmsprop(
  schedule: optax.Schedule,
  *,
  momentum: float,
  weight_decay: float,
  adapter_multiplier: float,
) -> optax.GradientTransformation:
  """RMSProp as EfficientNets are trained with (Tan and Le 2019).

  Decay 0.9, epsilon 0.001 inside the root and squares that start at 1, which
  are TensorFlow's; see `nesterov_sgd` for the arguments.
  """
  return optax.chain(
    optax.add_decayed_weights(weight_decay),
    optax.rmsprop(
      schedule,
      decay=0.9,
      eps=1e-3,
      initial_scale=1.0,
      eps_in_sqrt=True,
      momentum=momentum,
    ),
    optax.masked(optax.scale(adapter_multiplier), _adapter_mask),
  )


def sgd_and_adam(
  schedule: optax.Schedule,
  *,
  momentum: float,
  weight_decay: float,
  fusion_weight_decay: float,
  decoder_schedule: optax.Schedule,
) -> optax.GradientTransformation:
  """Nesterov SGD, with exceptions for what stands on top of the networks.

  Fusion modules have a weight decay of their own (FFL, FFSD), and decoders are
  trained by Adam, with the weight decay of the networks added to the gradient
  (FFSD).

  Args:
    schedule: step -> learning rate.
    momentum: in [0, 1).
    weight_decay: of everything but fusion modules; >= 0.
    fusion_weight_decay: of the parameters under "fusion"; >= 0.
    decoder_schedule: step -> learning rate of the parameters under "decoders".

  Returns:
    The optimizer.
  """

  def nesterov(decay: float) -> optax.GradientTransformation:
    return nesterov_sgd(
      schedule, momentum=momentum, weight_decay=decay, adapter_multiplier=1.0
    )

  return optax.partition(
    {
      "networks": nesterov(weight_decay),
      FUSION: nesterov(fusion_weight_decay),
      DECODERS: optax.chain(
        optax.add_decayed_weights(weight_decay), optax.adam(decoder_schedule)
      ),
    },
    lambda params: {
      name: name if name in (FUSION, DECODERS) else "networks"
      for name in params
    },
  )


def _adapter_mask(params: dict[str, Any]) -> dict[str, Any]:
  return {
    name: jax.tree.map(lambda _, is_adapter=name == ADAPTERS: is_adapter, tree)
    for name, tree in params.items()
  }
