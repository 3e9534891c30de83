"""From a config to the objects it describes: the members, the method.

One obvious place each: a network family, its members, the optimizer, the
method. A new network or method is one more branch here.
"""

from typing import Any

import jax
import jax.numpy as jnp

from ekd_jax import compression, data, methods
from ekd_jax.config import Config
from ekd_jax.models.network import Family
from ekd_jax.models.resnet import CifarResNet
from ekd_jax.training import optimizers, step


def family(config: Config) -> Family:
  """The network at any width."""
  info = data.info(config.dataset)
  return CifarResNet(
    config.depth,
    info.num_classes,
    info.image_shape,
    axis_name=methods.AXIS_NAME if config.batch_norm == "global" else None,
    dtype=jnp.dtype(config.precision),
    formulation=config.conv,
    scan=config.scan,
    remat=config.remat,
  )


def members(config: Config) -> tuple[compression.Member, ...]:
  """Who is trained, the full network first.

  Raises:
    UserError: a ratio or width that no network has.
  """
  network = family(config)
  if config.widths is not None:
    return compression.members_of_widths(config.widths, network.cost)
  return compression.solve_widths(
    config.ratios, network.cost, network.width_candidates()
  )


def schedule(config: Config, total_steps: int) -> Any:
  """The learning rate at every step."""
  return optimizers.step_schedule(
    config.learning_rate,
    drops=config.learning_rate_drops,
    drop_factor=config.learning_rate_drop_factor,
    total_steps=total_steps,
  )


def method(config: Config, total_steps: int) -> methods.Method:
  """The method that the config names."""
  optimizer = optimizers.nesterov_sgd(
    schedule(config, total_steps),
    momentum=config.momentum,
    weight_decay=config.weight_decay,
    adapter_multiplier=config.adapter_learning_rate,
  )
  who = members(config)
  if config.method == "solo":
    return methods.solo(family(config), who, optimizer)
  if config.method == "dml":
    return methods.dml(family(config), who, optimizer)
  return methods.ekd(
    family(config),
    who,
    optimizer,
    temperature=config.temperature,
    label_weight=config.label_weight,
    feature_weight=config.feature_weight,
    distill_weight=config.distill_weight,
    base_gradients=config.base_gradients,
  )


def abstract_state(config: Config) -> Any:
  """Structure, shapes and types of the loop's state; draws nothing."""
  info = data.info(config.dataset)
  # The number of steps shapes the schedule's values, not the state.
  return jax.eval_shape(
    lambda: step.init_state(method(config, total_steps=1), info, config.seed)
  )
