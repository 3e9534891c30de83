"""Our side of the benchmarks: the product's own compiled step.

Nothing is rebuilt here: the method, the step, its augmentation, the mapping
over devices and the donated state are those of a training.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import traverse_util

import workload
from ekd_jax import build, data
from ekd_jax.config import Config
from ekd_jax.data import augment
from ekd_jax.methods.interface import Method
from ekd_jax.training import parallel
from ekd_jax.training.step import init_state, make_train_step

# The heap grows in the first steps of a process, each time by the step's
# scratch memory, and such a step can take twice as long; see
# docs/performance.md, Memory.
WARM_UP_STEPS = 6


class Program(NamedTuple):
  """A train step and what it is called with.

  Attributes:
    train_step: (state, examples, order) -> (state, metrics); donates `state`.
    state: of step 0.
    inputs: `examples` and `order`.
  """

  train_step: Callable[..., Any]
  state: Any
  inputs: tuple[Any, Any]


def program(
  config: Config,
  *,
  device_count: int = 1,
  batches: int = workload.BATCHES,
  change: Callable[[Method], Method] | None = None,
) -> Program:
  """The training step of the config.

  Args:
    config: what is trained.
    device_count: how many devices share the batch.
    batches: of the data set, which is in device memory.
    change: what to do to the method, if anything; the step around it stays.

  Returns:
    The `Program`.
  """
  devices = jax.devices()[:device_count]
  info = data.info(config.dataset)
  method = build.method(config, workload.TOTAL_STEPS)
  if change is not None:
    method = change(method)
  train_step = parallel.per_device(
    make_train_step(
      method,
      info,
      batch_size=config.batch_size,
      steps_per_epoch=batches,
    ),
    devices,
    donate_argnums=(0,),
  )
  examples = workload.examples(config, batches=batches)
  # Shuffled as in a training: a batch is gathered from all over the memory.
  count = len(examples["label"])
  order = np.random.default_rng(0).permutation(count).astype(np.int32)
  return Program(
    train_step,
    parallel.replicate(init_state(method, info, config.seed), devices),
    (
      parallel.replicate(examples, devices),
      parallel.replicate(order, devices),
    ),
  )


def prepare(config: Config, **options: Any) -> workload.Run:
  """Compiles the step, trains for a few, and returns `run(steps)`.

  Args:
    config: what is trained.
    **options: of `program`.
  """
  train_step, state, inputs = program(config, **options)

  def dispatch(steps: int) -> Iterator[Any]:
    nonlocal state
    for _ in range(steps):
      state, metrics = train_step(state, *inputs)
      yield metrics

  def run(steps: int) -> None:
    for metrics in parallel.when_due(dispatch(steps)):
      jax.block_until_ready(metrics)
    jax.block_until_ready(state)

  run(WARM_UP_STEPS)
  return run


def one_step(config: Config) -> dict[str, Any]:
  """One step without augmentation, and everything it read and wrote.

  Args:
    config: of the EKD method.

  Returns:
    NumPy arrays: "image" [N, H, W, C] normalised and "label" [N]; "metrics"
    {name: scalar}; and by path, such as "stem/conv/kernel", "params",
    "batch_stats", "new_params", "new_batch_stats" and "gradients".
  """
  devices = jax.devices()[:1]
  info = data.info(config.dataset)
  method = build.method(config, workload.TOTAL_STEPS)
  examples = {
    name: rows[: config.batch_size]
    for name, rows in workload.examples(config).items()
  }
  images = augment.normalize(examples["image"], mean=info.mean, std=info.std)
  batch = {"image": np.asarray(images), "label": examples["label"]}
  state = init_state(method, info, config.seed)["method"]
  train_step = parallel.per_device(method.train_step, devices)
  key = jax.random.key_data(jax.random.key(config.seed))
  new_state, metrics = map(
    parallel.unreplicate,
    train_step(*(parallel.replicate(x, devices) for x in (state, batch, key))),
  )
  params = _by_path(state["params"])
  # After the first step the momentum is the gradient and the weight decay.
  momentum = optax.tree_utils.tree_get(new_state["opt_state"], "trace")
  return batch | {
    "metrics": metrics,
    "params": params,
    "batch_stats": _by_path(state["batch_stats"]),
    "new_params": _by_path(new_state["params"]),
    "new_batch_stats": _by_path(new_state["batch_stats"]),
    "gradients": {
      path: value - config.weight_decay * params[path]
      for path, value in _by_path(momentum).items()
    },
  }


def _by_path(tree: Any) -> dict[str, np.ndarray]:
  return {
    path: np.asarray(value)
    for path, value in traverse_util.flatten_dict(tree, sep="/").items()
  }
