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

from ekd_jax import compression, data, losses, methods
from ekd_jax import config as configs
from ekd_jax.config import Config
from ekd_jax.errors import UserError
from ekd_jax.models import densenet, imagenet_resnet
from ekd_jax.models.bottleneck_resnet import BottleneckResNet
from ekd_jax.models.computation import Computation
from ekd_jax.models.densenet import DenseNet
from ekd_jax.models.efficientnet import EfficientNet
from ekd_jax.models.googlenet import GoogLeNet
from ekd_jax.models.imagenet_resnet import ImageNetResNet
from ekd_jax.models.network import Family, Network
from ekd_jax.models.plain_densenet import PlainDenseNet
from ekd_jax.models.resnet import CifarResNet
from ekd_jax.models.vgg import VGG16
from ekd_jax.models.wide_resnet import WideResNet
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
  changes["reflect"] = config.crop_fill == "reflect"
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


def computation(config: Config) -> Computation:
  """How layers are computed."""
  return Computation(
    axis_name=methods.AXIS_NAME if config.batch_norm == "global" else None,
    noise_axis_name=methods.AXIS_NAME,
    dtype=jnp.dtype(config.precision),
    formulation=config.conv,
    scan=config.scan,
    remat=config.remat,
  )


def family(config: Config) -> Family:
  """The network at any width.

  Raises:
    UserError: the images are too small for it.
  """
  info = dataset_info(config)
  what = info.num_classes, info.input_shape
  how = dataclasses.asdict(computation(config))
  if config.network == "densenet":
    numbers, _, form = config.variant.partition("-")
    growth, depth = map(int, numbers.split("/"))
    network = DenseNet(growth, depth, *what, final_norm=not form, **how)
  elif config.network == "plain_densenet":
    growth, depth = map(int, config.variant.split("/"))
    network = PlainDenseNet(growth, depth, *what, **how)
  elif config.network == "wide_resnet":
    network = WideResNet(config.variant, *what, **how)
  elif config.network == "bottleneck_resnet":
    network = BottleneckResNet(config.variant, *what, **how)
  elif config.network == "vgg16":
    network = VGG16(*what, **how)
  elif config.network == "googlenet":
    network = GoogLeNet(*what, **how)
  elif config.network == "imagenet_resnet":
    variant = imagenet_resnet.VARIANTS[config.variant]
    network = ImageNetResNet(variant, *what, **how)
  elif config.network == "efficientnet":
    network = EfficientNet(config.variant, *what, **how)
  elif config.network == "resnet":
    network = CifarResNet(
      config.depth, *what, initialization=config.initialization, **how
    )
  else:
    network = _own_network(config.network)(*what)
    if not isinstance(getattr(network, "smallest_side", None), int):
      raise UserError(
        f"--network {config.network} returned {type(network).__name__}, not a "
        "family of networks such as ekd_jax.models.OwnFamily"
      )
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
    found = importlib.import_module(module)
  except ModuleNotFoundError as error:
    # Not one that the user's module imports.
    if not f"{module}.".startswith(f"{error.name}."):
      raise
    raise UserError(
      f"--network {where}: there is no module {error.name}; name one that "
      "Python finds, such as a file of that name in this directory"
    ) from error
  if not callable(getattr(found, function, None)):
    raise UserError(
      f"--network {where}: {module} has no {function} to call with the number "
      "of classes and the shape of images"
    )
  return getattr(found, function)


def families(config: Config) -> list[Family]:
  """The network of each member."""
  if config.partners is None:
    return [family(config)] * configs.member_count(config)
  return [family(each) for each in (config, *configs.partners_of(config))]


def network_name(config: Config) -> str:
  """What reports call what is trained: the full network, and its partners."""
  return " + ".join(dict.fromkeys(each.name for each in families(config)))


@functools.lru_cache
def members(config: Config) -> tuple[compression.Member, ...]:
  """Who is trained, the full network first.

  Raises:
    UserError: a ratio or width that no network has.
  """
  network = family(config)
  if config.peers is not None:
    return compression.members_of_widths((1.0,) * config.peers, network.cost)
  if config.partners is not None:
    costs = [each.cost(1.0) for each in families(config)]
    return compression.members_of_costs(costs)
  if config.widths is not None:
    return compression.members_of_widths(config.widths, network.cost)
  tolerance = compression.RATIO_TOLERANCE
  if isinstance(network, DenseNet | PlainDenseNet):
    tolerance = densenet.RATIO_TOLERANCE
  return compression.solve_widths(
    config.ratios,
    network.cost,
    network.width_candidates(),
    tolerance=tolerance,
  )


def check_maps(config: Config) -> None:
  """Refuses networks whose maps the method cannot put together.

  Raises:
    UserError: FFL's last maps differ in size, or those that FFSD decodes do
      not double from one to the one before, or are too small.
  """
  if config.method not in ("ffl", "ffsd"):
    return
  sides = {each.name: _sides_of_maps(each) for each in families(config)}
  last = {name: of_blocks[-1] for name, of_blocks in sides.items()}
  if len(set(last.values())) > 1:
    shown = ", ".join(f"{s[0]} x {s[1]} in {name}" for name, s in last.items())
    raise UserError(
      f"--method ffl fuses the last maps, which must be of one size: {shown}"
    )
  if config.method == "ffl":
    return
  (of_blocks, *_) = sides.values()
  doubled = [(2 * height, 2 * width) for height, width in of_blocks[1:]]
  # Of fewer than three places, none is among the third with least attention.
  if (
    len(of_blocks) < 2
    or list(of_blocks[:-1]) != doubled
    or math.prod(of_blocks[-1]) < 3
  ):
    shown = ", ".join(f"{height} x {width}" for height, width in of_blocks)
    raise UserError(
      "--method ffsd needs compared maps whose sides halve from one to the "
      "next, the last of three pixels or more: those of "
      f"{family(config).name} are {shown}; try another --network or "
      "--image-size"
    )


@functools.lru_cache
def _sides_of_maps(network: Family) -> tuple[tuple[int, int], ...]:
  """(H, W) of every compared block."""
  network = network.alone()  # Plain arrays, whatever --conv says.
  images = jax.ShapeDtypeStruct((1, *network.image_shape), jnp.float32)
  whole = Network(network.stem(), network.branch(1.0))
  outputs, _ = jax.eval_shape(whole.init_with_output, jax.random.key(0), images)
  return tuple(maps.shape[1:3] for maps in outputs.features)


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
  """The optimizer that the config and the method ask for."""
  if config.method in ("ffl", "ffsd"):
    decoders = dataclasses.replace(
      config, learning_rate=config.decoder_learning_rate
    )
    return optimizers.sgd_and_adam(
      schedule(config, total_steps),
      momentum=config.momentum,
      weight_decay=config.weight_decay,
      fusion_weight_decay=config.fusion_weight_decay,
      decoder_schedule=schedule(decoders, total_steps),
    )
  rmsprop = config.optimizer == "rmsprop"
  return (optimizers.rmsprop if rmsprop else optimizers.nesterov_sgd)(
    schedule(config, total_steps),
    momentum=config.momentum,
    weight_decay=config.weight_decay,
    adapter_multiplier=config.adapter_learning_rate,
  )


def ramp_up(config: Config, total_steps: int) -> Callable[..., jax.Array]:
  """step -> weight of what grows at the start; constant within an epoch."""
  length = config.ramp_up_epochs
  epoch_steps = max(1, total_steps // config.epochs)
  # FFSD counts its epochs from 1.
  first = 1 if config.method == "ffsd" else 0
  if config.ramp_up == "as_coded":
    return lambda step: methods.ramp_up_as_coded(step // epoch_steps, length)
  return lambda step: losses.ramp_up(first + step // epoch_steps, length)


def method(config: Config, total_steps: int) -> methods.Method:
  """The method that the config names."""
  each, who = families(config), members(config)
  what = each, who, optimizer(config, total_steps)
  how: dict[str, Any] = {"accumulate": config.accumulate}
  if config.method == "solo":
    return methods.solo(*what, **how)
  how["temperature"] = config.temperature
  if config.method == "dml":
    return methods.dml(*what, **how)
  if config.method == "ekd":
    return methods.ekd(
      family(config),
      *what[1:],
      label_weight=config.label_weight,
      feature_weight=config.feature_weight,
      distill_weight=config.distill_weight,
      base_gradients=config.base_gradients,
      **how,
    )
  how["ramp"] = ramp_up(config, total_steps)
  how["num_classes"] = dataset_info(config).num_classes
  if config.method == "pcl":
    return methods.pcl(
      *what,
      mean_teacher_decay=config.mean_teacher_decay,
      views=config.views,
      **how,
    )
  how["compute"] = computation(config)
  if config.method == "ffl":
    return methods.ffl(*what, **how)
  return methods.ffsd(
    family(config),
    *what[1:],
    common_students=config.common_students,
    diversity_weight=config.diversity_weight,
    fusion_weight=config.fusion_weight,
    decoder_weight=config.decoder_weight,
    normalized_diversity=config.diversity == "normalized",
    **how,
  )


def abstract_state(config: Config) -> Any:
  """Structure, shapes and types of the loop's state; draws nothing."""
  info = dataset_info(config)
  # The number of steps shapes the schedule's values, not the state.
  return jax.eval_shape(
    lambda: step.init_state(method(config, total_steps=1), info, config.seed)
  )
