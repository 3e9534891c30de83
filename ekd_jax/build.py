"""From a config to the objects it describes: the members, the method.

One obvious place each: a network family, its members, the optimizer, the
method. A new network or method is one more branch here.
"""

import dataclasses
import functools
import importlib
import math
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ekd_jax import compression, data, methods
from ekd_jax.config import Config
from ekd_jax.errors import UserError
from ekd_jax.models import densenet, imagenet_resnet
from ekd_jax.models.densenet import DenseNet
from ekd_jax.models.efficientnet import EfficientNet
from ekd_jax.models.imagenet_resnet import ImageNetResNet
from ekd_jax.models.network import Family
from ekd_jax.models.resnet import CifarResNet
from ekd_jax.training import optimizers, step


def dataset_info(config: Config) -> data.DatasetInfo:
  """The facts about the data, as the config would have it."""
  info = data.info(config.dataset)
  height, _, channels = info.image_shape
  changes = {}
  if config.num_classes is not None:
    changes["num_classes"] = config.num_classes
  if config.crop_padding is not None:
    changes["crop_padding"] = config.crop_padding
  side = config.image_size or height
  if info.streamed:
    changes["image_shape"] = (side, side, channels)
  elif side != height:
    changes["side"] = side
    padding = round(info.crop_padding * side / height)
    changes.setdefault("crop_padding", padding)
  return dataclasses.replace(info, **changes)


def load_data(config: Config) -> data.Dataset | data.LargeDataset:
  """What the config trains on and is tested with.

  Raises:
    UserError: it is not there, or not as it must be.
  """
  info = dataset_info(config)
  numbers = {
    "train_examples": config.train_examples,
    "validation_examples": config.validation_examples,
  }
  if info.streamed:
    return data.large.load(info, config.data_dir, **numbers)
  dataset = data.load(config.dataset, config.data_dir, download=config.download)
  dataset = dataclasses.replace(dataset, info=info)
  return data.restrict(dataset, **numbers)


def family(config: Config) -> Family:
  """The network at any width.

  Raises:
    UserError: the images are too small for it.
  """
  info = dataset_info(config)
  what = info.num_classes, info.input_shape
  how = {
    "axis_name": methods.AXIS_NAME if config.batch_norm == "global" else None,
    "noise_axis_name": methods.AXIS_NAME,
    "dtype": jnp.dtype(config.precision),
    "formulation": config.conv,
    "scan": config.scan,
    "remat": config.remat,
  }
  if config.network == "densenet":
    growth, depth = map(int, config.variant.split("/"))
    network = DenseNet(growth, depth, *what, **how)
  elif config.network == "imagenet_resnet":
    variant = imagenet_resnet.VARIANTS[config.variant]
    network = ImageNetResNet(variant, *what, **how)
  elif config.network == "efficientnet":
    network = EfficientNet(config.variant, *what, **how)
  elif config.network == "resnet":
    network = CifarResNet(config.depth, *what, **how)
  else:
    network = _own_network(config.network)(*what)
  side = min(info.input_shape[:2])
  if side < network.smallest_side:
    raise UserError(
      f"images of {side} pixels are too small for {network.name}: use "
      f"--image-size {network.smallest_side} or more"
    )
  return network


@functools.lru_cache
def _own_network(where: str) -> Callable[..., Family]:
  """The function that MODULE:FUNCTION names.

  Raises:
    UserError: there is none.
  """
  module, _, function = where.partition(":")
  if "" not in sys.path:
    sys.path.append("")  # What lies in the working directory is found too.
  try:
    return getattr(importlib.import_module(module), function)
  except ModuleNotFoundError as error:
    if error.name != module:
      raise
    raise UserError(
      f"--network {where}: there is no module {module}; name one that Python "
      "finds, such as a file of that name in this directory"
    ) from error
  except AttributeError as error:
    raise UserError(f"--network {where}: {module} has no {function}") from error


@functools.lru_cache
def members(config: Config) -> tuple[compression.Member, ...]:
  """Who is trained, the full network first.

  Raises:
    UserError: a ratio or width that no network has.
  """
  network = family(config)
  if config.widths is not None:
    return compression.members_of_widths(config.widths, network.cost)
  tolerance = compression.RATIO_TOLERANCE
  if isinstance(network, DenseNet):
    tolerance = densenet.RATIO_TOLERANCE
  return compression.solve_widths(
    config.ratios,
    network.cost,
    network.width_candidates(),
    tolerance=tolerance,
  )


def schedule(config: Config, total_steps: int) -> Any:
  """The learning rate at every step."""
  drops = config.learning_rate_drops or ()
  if config.learning_rate_drop_every is not None:
    part = config.learning_rate_drop_every / config.epochs
    drops = [k * part for k in range(1, math.ceil(1 / part))]
  return optimizers.step_schedule(
    config.learning_rate,
    drops=drops,
    drop_factor=config.learning_rate_drop_factor,
    total_steps=total_steps,
  )


def optimizer(config: Config, total_steps: int) -> optax.GradientTransformation:
  """The optimizer that the config names."""
  rmsprop = config.optimizer == "rmsprop"
  return (optimizers.rmsprop if rmsprop else optimizers.nesterov_sgd)(
    schedule(config, total_steps),
    momentum=config.momentum,
    weight_decay=config.weight_decay,
    adapter_multiplier=config.adapter_learning_rate,
  )


def method(config: Config, total_steps: int) -> methods.Method:
  """The method that the config names."""
  what = family(config), members(config), optimizer(config, total_steps)
  if config.method == "solo":
    return methods.solo(*what, accumulate=config.accumulate)
  if config.method == "dml":
    return methods.dml(*what, accumulate=config.accumulate)
  return methods.ekd(
    *what,
    temperature=config.temperature,
    label_weight=config.label_weight,
    feature_weight=config.feature_weight,
    distill_weight=config.distill_weight,
    base_gradients=config.base_gradients,
    accumulate=config.accumulate,
  )


def abstract_state(config: Config) -> Any:
  """Structure, shapes and types of the loop's state; draws nothing."""
  info = dataset_info(config)
  # The number of steps shapes the schedule's values, not the state.
  return jax.eval_shape(
    lambda: step.init_state(method(config, total_steps=1), info, config.seed)
  )
