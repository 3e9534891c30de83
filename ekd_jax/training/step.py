"""The compiled step: from examples in device memory to the next state.

The whole data set lives on every device as uint8. A step finds its examples
by its own number alone, in this epoch's order; it augments them, and hands
them to the method. Augmentation is drawn for the whole global batch, of which
each device takes its rows: so neither depends on how many devices there are.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ekd_jax.data import DatasetInfo, augment
from ekd_jax.methods.interface import AXIS_NAME, Method

# What the training draws from one seed; each root is split no further than
# by epoch or step number.
KEY_NAMES = ("init", "order", "augment", "method")

# The metric by which several processes agree to stop.
STOP = "stop"


def root_keys(seed: int) -> dict[str, jax.Array]:
  """The roots of all random numbers of a run, as key data (uint32 [2])."""
  keys = jax.random.split(jax.random.key(seed), len(KEY_NAMES))
  return {
    name: jax.random.key_data(key)
    for name, key in zip(KEY_NAMES, keys, strict=True)
  }


def init_state(method: Method, info: DatasetInfo, seed: int) -> Any:
  """The state of step 0: {"method", "keys", "step"}."""
  keys = root_keys(seed)
  views = () if method.views == 1 else (method.views,)
  batch = {
    "image": jnp.zeros((1, *views, *info.input_shape), jnp.float32),
    "label": jnp.zeros((1,), jnp.int32),
  }
  rng = jax.random.wrap_key_data(keys["init"])
  return {
    "method": method.init(rng, batch),
    "keys": keys,
    "step": jnp.zeros((), jnp.int32),
  }


def make_train_step(
  method: Method,
  info: DatasetInfo,
  *,
  batch_size: int,
  steps_per_epoch: int,
) -> Callable[..., tuple[Any, dict[str, jax.Array]]]:
  """Builds the step of one device.

  Args:
    method: what is trained.
    info: how examples are augmented and normalised.
    batch_size: of the global batch; a multiple of the number of devices.
    steps_per_epoch: whole batches in an epoch.

  Returns:
    (state, examples, order) -> (state, metrics), to be run by
    `parallel.per_device`. `examples` is {"image": [N, H, W, C] uint8,
    "label": [N]}; `order` [N] this epoch's order of them. Where several
    processes train, there is a fourth argument: a float32 scalar, not 0 in a
    process that was asked to stop. The metrics then have `STOP`, not 0 in all
    of them after the same step.
  """

  def train_step(
    state: Any,
    examples: dict[str, jax.Array],
    order: jax.Array,
    stop: jax.Array | None = None,
  ) -> tuple[Any, dict[str, jax.Array]]:
    step = state["step"]
    key = jax.random.wrap_key_data(state["keys"]["augment"])
    local = batch_size // jax.lax.axis_size(AXIS_NAME)
    first = jax.lax.axis_index(AXIS_NAME) * local

    def own(rows: jax.Array) -> jax.Array:
      return jax.lax.dynamic_slice_in_dim(rows, first, local)

    position = (step % steps_per_epoch) * batch_size
    rows = own(jax.lax.dynamic_slice_in_dim(order, position, batch_size))
    key = jax.random.fold_in(key, step)
    images = augment.enlarge(examples["image"][rows], info.side)

    def view(key: jax.Array) -> jax.Array:
      choices = augment.draw(
        key, batch_size, padding=info.crop_padding, flip=info.flip
      )
      return augment.apply(
        images,
        jax.tree.map(own, choices),
        padding=info.crop_padding,
        reflect=info.reflect,
      )

    if method.views == 1:
      images = view(key)
    else:
      keys = [jax.random.fold_in(key, index) for index in range(method.views)]
      images = jnp.stack([view(key) for key in keys], 1)
    batch = {
      "image": augment.normalize(images, mean=info.mean, std=info.std),
      "label": examples["label"][rows],
    }
    return _advance(method, state, batch, stop)

  return train_step


def make_stream_step(
  method: Method, info: DatasetInfo
) -> Callable[..., tuple[Any, dict[str, jax.Array]]]:
  """Builds the step of one device for batches that workers made.

  Args:
    method: what is trained.
    info: how images are normalised; they are cropped and mirrored already.

  Returns:
    (state, batch) -> (state, metrics), as `make_train_step`; batch is
    {"image": [n, H, W, C] uint8 (or [n, views, H, W, C]), "label": [n]}, the
    device's rows.
  """

  def train_step(
    state: Any, batch: dict[str, jax.Array], stop: jax.Array | None = None
  ) -> tuple[Any, dict[str, jax.Array]]:
    images = augment.normalize(batch["image"], mean=info.mean, std=info.std)
    return _advance(method, state, {**batch, "image": images}, stop)

  return train_step


def _advance(
  method: Method,
  state: Any,
  batch: dict[str, jax.Array],
  stop: jax.Array | None,
) -> tuple[Any, dict[str, jax.Array]]:
  """The method's step on a batch, and what the loop's state has besides."""
  step = state["step"]
  key = jax.random.wrap_key_data(state["keys"]["method"])
  method_state, metrics = method.train_step(
    state["method"], batch, jax.random.fold_in(key, step)
  )
  next_state = {
    "method": method_state,
    "keys": state["keys"],
    "step": step + 1,
  }
  if stop is not None:
    metrics = metrics | {STOP: jax.lax.pmax(stop, AXIS_NAME)}
  return next_state, metrics
