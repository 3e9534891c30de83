"""What a step will take of a device's memory, from its compiled program.

Nothing is drawn, read or run: shapes are enough to compile.
"""

from typing import Any

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
  for member in build.members(config):
    alone = methods.solo(
      build.family(config),
      [member],
      build.optimizer(config, 1),
      accumulate=config.accumulate,
    )
    found[f"{member.name} alone"] = method_bytes(config, alone, train_count)
  return found


def method_bytes(config: Config, method: Method, train_count: int) -> int:
  """Of one method's step; see `step_bytes`."""
  info = build.dataset_info(config)
  devices = jax.devices()
  local = config.batch_size // len(devices)
  if info.streamed:
    step = make_stream_step(method, info)
    inputs = (_examples(local, info.image_shape),)
  else:
    step = make_train_step(
      method, info, batch_size=config.batch_size, steps_per_epoch=1
    )
    order = jax.ShapeDtypeStruct((train_count,), np.int32)
    inputs = _examples(train_count, info.image_shape), order
  state = jax.eval_shape(lambda: init_state(method, info, config.seed))
  arguments = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((len(devices), *x.shape), x.dtype),
    (state, *inputs),
  )
  program = parallel.per_device(step, devices, donate_argnums=(0,))
  memory = program.lower(*arguments).compile().memory_analysis()
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
