"""What a step will take: of a device's memory, and, tried out, of time.

For the memory nothing is drawn, read or run: shapes are enough to compile.
"""

import statistics
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ekd_jax import build, methods
from ekd_jax.config import Config
from ekd_jax.methods import Method
from ekd_jax.training import parallel
from ekd_jax.training.step import (
  init_state,
  make_stream_step,
  make_train_step,
)


def step_bytes(config: Config, train_count: int) -> dict[str, int]:
  """Bytes per device while a step runs, by XLA's analysis of its memory.

  Args:
    config: a resolved config; its batch divides by the devices.
    train_count: images that are trained on; those of a set in memory count.

  Returns:
    {"all members": bytes, "student_0 alone": bytes, ...}.
  """
  method = build.method(config, 1)
  found = {"all members": method_bytes(config, method, train_count)}
  members = build.members(config)
  for family, member in zip(build.families(config), members, strict=True):
    alone = methods.solo(
      [family],
      [member],
      build.optimizer(config, 1),
      accumulate=config.accumulate,
    )
    found[f"{member.name} alone"] = method_bytes(config, alone, train_count)
  return found


def method_bytes(config: Config, method: Method, train_count: int) -> int:
  """Of one method's step; see `step_bytes`."""
  return _bytes_of(_compiled(config, method, train_count))


class Costs(NamedTuple):
  """What a step takes.

  Attributes:
    seconds: of one step, the median of several.
    bytes: per device, see `step_bytes`.
  """

  seconds: float
  bytes: int


# Steps of each config in turn, so that whatever else the machine does is shared
# fairly between them.
_ROUNDS = 7


def step_costs(
  by_name: Mapping[str, Config], train_count: int
) -> dict[str, Costs]:
  """Runs steps of several configs side by side, on noise.

  Args:
    by_name: resolved configs; their batches divide by the devices.
    train_count: see `step_bytes`.

  Returns:
    {name: its costs}.
  """
  devices = jax.devices()
  source = np.random.default_rng(0)
  steps, found = {}, {}
  for name, config in by_name.items():
    method = build.method(config, 1)
    program = _compiled(config, method, train_count)
    info = build.dataset_info(config)
    state, inputs = _arguments(config, method, train_count)

    def noise(x: jax.ShapeDtypeStruct, classes: int) -> np.ndarray:
      most = 256 if x.dtype == np.uint8 else classes
      return source.integers(0, most, x.shape, x.dtype)

    # The same examples; a set in memory is also given their order.
    examples = jax.tree.map(
      lambda x, classes=info.num_classes: noise(x, classes), inputs[0]
    )
    order = [np.arange(len(examples["label"]), dtype=np.int32)] * (
      len(inputs) - 1
    )
    state = init_state(method, info, config.seed)
    steps[name] = (
      program,
      parallel.replicate(state, devices),
      parallel.replicate((examples, *order), devices),
    )
    found[name] = []
  for _ in range(1 + _ROUNDS):
    for name, (program, state, inputs) in steps.items():
      start = time.perf_counter()
      state, metrics = program(state, *inputs)
      jax.block_until_ready(metrics)
      found[name].append(time.perf_counter() - start)
      steps[name] = program, state, inputs
  return {
    # The first one warms up.
    name: Costs(statistics.median(times[1:]), _bytes_of(steps[name][0]))
    for name, times in found.items()
  }


def _arguments(
  config: Config, method: Method, train_count: int
) -> tuple[Any, tuple[Any, ...]]:
  """State and inputs of one device's step, as shapes and types."""
  info = build.dataset_info(config)
  if info.streamed:
    views = () if method.views == 1 else (method.views,)
    local = config.batch_size // len(jax.devices())
    inputs = (_examples(local, (*views, *info.image_shape)),)
  else:
    order = jax.ShapeDtypeStruct((train_count,), np.int32)
    inputs = _examples(train_count, info.image_shape), order
  state = jax.eval_shape(lambda: init_state(method, info, config.seed))
  return state, inputs


def _compiled(config: Config, method: Method, train_count: int) -> Any:
  """The program of a step."""
  info = build.dataset_info(config)
  devices = jax.devices()
  if info.streamed:
    step = make_stream_step(method, info)
  else:
    step = make_train_step(
      method, info, batch_size=config.batch_size, steps_per_epoch=1
    )
  state, inputs = _arguments(config, method, train_count)
  arguments = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((len(devices), *x.shape), x.dtype),
    (state, *inputs),
  )
  program = parallel.per_device(step, devices, donate_argnums=(0,))
  return program.lower(*arguments).compile()


def _bytes_of(program: Any) -> int:
  memory = program.memory_analysis()
  return (
    memory.argument_size_in_bytes
    + memory.output_size_in_bytes
    - memory.alias_size_in_bytes
    + memory.temp_size_in_bytes
  )


def _examples(count: int, shape: tuple[int, ...]) -> dict[str, Any]:
  return {
    "image": jax.ShapeDtypeStruct((count, *shape), jnp.uint8),
    "label": jax.ShapeDtypeStruct((count,), jnp.int32),
  }
