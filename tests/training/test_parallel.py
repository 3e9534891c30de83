"""The seam to the devices: what goes in comes out, and stays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ekd_jax.methods import AXIS_NAME
from ekd_jax.training import parallel


@pytest.fixture(params=[1, 2, 4])
def devices(request):
  return jax.devices()[: request.param]


def _tree():
  return {
    "kernel": np.arange(12, dtype=np.float32).reshape(3, 4),
    "nested": (np.int32(7), np.uint32([1, 2**32 - 1])),
  }


def _assert_equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)
  assert jax.tree.structure(a) == jax.tree.structure(b)


def test_replicate_puts_the_same_array_on_every_device(devices):
  replicated = parallel.replicate(_tree(), devices)
  kernel = replicated["kernel"]
  assert kernel.shape == (len(devices), 3, 4)
  assert kernel.dtype == np.float32
  assert {s.device for s in kernel.addressable_shards} == set(devices)
  for part in kernel.addressable_shards:
    np.testing.assert_array_equal(part.data[0], _tree()["kernel"])


def test_unreplicate_undoes_replicate(devices):
  host = parallel.unreplicate(parallel.replicate(_tree(), devices))
  _assert_equal(host, _tree())
  for leaf, wanted in zip(
    jax.tree.leaves(host), jax.tree.leaves(_tree()), strict=True
  ):
    assert isinstance(leaf, np.ndarray | np.generic)
    assert (leaf.dtype, leaf.shape) == (wanted.dtype, wanted.shape)


def test_replicate_takes_arrays_of_jax():
  devices = jax.devices()
  tree = jax.tree.map(jnp.asarray, _tree())
  host = parallel.unreplicate(parallel.replicate(tree, devices))
  _assert_equal(host, _tree())


def test_shards_are_equal_parts_in_order(devices):
  rows = np.arange(24, dtype=np.int32).reshape(8, 3)
  sharded = parallel.shard({"rows": rows}, devices)["rows"]
  assert sharded.shape == (len(devices), 8 // len(devices), 3)
  np.testing.assert_array_equal(np.asarray(sharded).reshape(8, 3), rows)
  for device, part in zip(devices, np.split(rows, len(devices)), strict=True):
    (own,) = [s for s in sharded.addressable_shards if s.device == device]
    np.testing.assert_array_equal(own.data[0], part)


def test_a_step_sees_one_device_and_the_named_axis(devices):
  def step(total, rows):
    assert total.shape == ()
    assert rows.shape == (8 // len(devices),)
    return total + jax.lax.psum(rows.sum(), AXIS_NAME)

  result = parallel.per_device(step, devices)(
    parallel.replicate(np.float32(100), devices),
    parallel.shard(np.arange(8, dtype=np.float32), devices),
  )
  assert result.shape == (len(devices),)
  assert parallel.unreplicate(result) == 128


def test_unreplicate_is_a_copy_that_survives_donation(devices):
  # Large enough that the host array is a view if nobody copies it.
  start = np.zeros((256, 256), np.float32)
  step = parallel.per_device(lambda x: x + 1, devices, donate_argnums=(0,))
  state = step(parallel.replicate(start, devices))
  kept = []
  for _ in range(4):
    kept.append(parallel.unreplicate(state))
    donated = state
    state = step(state)
    assert donated.is_deleted(), "the state was not donated"
  jax.block_until_ready(state)
  for number, host in enumerate(kept, start=1):
    np.testing.assert_array_equal(host, np.full_like(start, number))


@pytest.mark.parametrize(
  "platform, ahead", [("cpu", 0), ("gpu", 1), ("tpu", 1)]
)
def test_only_an_accelerator_is_given_a_program_ahead(
  platform, ahead, monkeypatch
):
  monkeypatch.setattr(jax, "default_backend", lambda: platform)
  assert parallel.programs_ahead() == ahead


@pytest.mark.parametrize("ahead", [0, 1, 5])
def test_results_are_handed_out_in_order_a_fixed_number_of_programs_late(
  ahead, monkeypatch
):
  monkeypatch.setattr(parallel, "programs_ahead", lambda: ahead)
  dispatched = []

  def dispatch():
    for number in range(3):
      dispatched.append(number)
      yield number

  seen = [(result, len(dispatched)) for result in parallel.when_due(dispatch())]
  assert seen == [(n, min(n + 1 + ahead, 3)) for n in range(3)]
