"""What devices say to each other in a step, and that it compiles elsewhere."""

import functools
import re

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from ekd_jax import build, data
from ekd_jax import config as configs
from ekd_jax.methods import AXIS_NAME
from ekd_jax.training import parallel, step

BATCH = 32
EXAMPLES = 3 * BATCH
DEVICES = 4


class Step:
  """A real train step, and the shapes that one device calls it with."""

  def __init__(self, method="ekd", **options):
    config = configs.resolve(
      configs.Config(
        method=method, dataset="cifar10", depth=8, ratios=(0.75,),
        batch_size=BATCH, run_dir="run", conv="lax", **options,
      )
    )  # fmt: skip
    info = data.info(config.dataset)
    own = build.method(config, total_steps=3)
    self.function = step.make_train_step(
      own, info, batch_size=BATCH, steps_per_epoch=3
    )
    self.state = jax.eval_shape(lambda: step.init_state(own, info, seed=0))
    self.arguments = (
      self.state,
      {
        "image": jax.ShapeDtypeStruct((EXAMPLES, 32, 32, 3), np.uint8),
        "label": jax.ShapeDtypeStruct((EXAMPLES,), np.int32),
      },
      jax.ShapeDtypeStruct((EXAMPLES,), np.int32),
    )

  @property
  def norms(self):
    """How many batch norms there are: each has one scale."""
    params = self.state["method"]["params"]
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    return sum(path[-1].key == "scale" for path in paths)


@functools.cache
def on_devices(devices, **options):
  """StableHLO of the mapped step."""
  own = Step(**options)
  mapped = parallel.per_device(own.function, jax.devices()[:devices])
  arguments = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((devices, *x.shape), x.dtype), own.arguments
  )
  return own, in_line(mapped.lower(*arguments).as_text())


def in_line(text):
  """StableHLO with the body of each function wherever it is called.

  Equal layers are one function: what is written once is done more often.
  """
  bodies = dict(
    re.findall(
      r"func\.func \w+ @(\w+)\((.*?)(?=func\.func |\Z)", text, re.DOTALL
    )
  )

  def body(name):
    return re.sub(
      r"(?<!custom_)call @(\w+)", lambda call: body(call[1]), bodies[name]
    )

  return body("main")


def all_reduces(text):
  return len(re.findall(r"stablehlo\.all_reduce", text))


@pytest.mark.parametrize("method", ["ekd", "solo", "dml"])
def test_gradients_statistics_and_metrics_travel_together(method):
  """One all-reduce for them, two per batch norm: forward and backward."""
  own, text = on_devices(DEVICES, method=method)
  assert own.norms > 15
  assert all_reduces(text) == 2 * own.norms + 1


def test_local_batch_norm_needs_no_more_than_that_one():
  _, text = on_devices(DEVICES, batch_norm="local")
  assert all_reduces(text) == 1


def test_one_device_has_nobody_to_talk_to():
  _, text = on_devices(1)
  assert all_reduces(text) == 0


def test_no_bytes_travel_twice():
  """The one all-reduce carries gradients, statistics and metrics, flat."""
  own, text = on_devices(DEVICES)
  parts = [own.state["method"][k] for k in ("params", "batch_stats")]
  least = sum(leaf.size for leaf in jax.tree.leaves(parts))
  sizes = [
    int(np.prod([int(n) for n in found.split("x")]))
    for found in re.findall(
      r"stablehlo\.all_reduce.*?\}\) : \(tensor<([\dx]+)xf32>", text, re.DOTALL
    )
  ]
  assert len(sizes) == 2 * own.norms + 1
  metrics = 20
  assert least < max(sizes) <= least + metrics
  # Those of batch norm are two numbers per channel.
  assert sorted(sizes)[-2] <= 2 * 64


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_a_step_is_lowered_for_hardware_that_is_not_here(platform):
  """jax.export cannot take a pmap; the same step in a shard_map it can."""
  own = Step()
  mesh = jax.make_mesh((DEVICES,), (AXIS_NAME,))
  mapped = jax.shard_map(
    own.function,
    mesh=mesh,
    in_specs=PartitionSpec(),
    out_specs=PartitionSpec(),
    check_vma=False,
  )
  exported = jax.export.export(jax.jit(mapped), platforms=[platform])(
    *own.arguments
  )
  assert exported.platforms == (platform,)
  assert exported.nr_devices == DEVICES
  text = in_line(exported.mlir_module())
  assert all_reduces(text) == 2 * own.norms + 1
  # Plain convolutions: forward, and two for the gradients of each. The images
  # need no gradient, so the stem has one less.
  convolutions = sum(
    len(leaf.shape) == 4
    for leaf in jax.tree.leaves(own.state["method"]["params"])
  )
  assert (
    len(re.findall(r"stablehlo\.convolution", text)) == 3 * convolutions - 1
  )
  targets = set(re.findall(r"custom_call @(\w+)", text))
  assert not {t for t in targets if "callback" in t or "host" in t}, targets
