import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ekd_jax.data import order


@pytest.mark.parametrize("num_examples", [1, 10, 1437])
def test_every_epoch_visits_every_example_once(num_examples):
  key = jax.random.key(3)
  for epoch in range(3):
    got = order.epoch_order(key, epoch, num_examples)
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(np.sort(got), np.arange(num_examples))


def test_the_order_depends_on_key_and_epoch_alone():
  key = jax.random.key(3)
  first = order.epoch_order(key, 7, 500)
  order.epoch_order(key, 8, 500)
  np.testing.assert_array_equal(first, order.epoch_order(key, 7, 500))
  assert (first != order.epoch_order(key, 8, 500)).any()
  assert (first != order.epoch_order(jax.random.key(4), 7, 500)).any()


def test_the_epoch_may_be_traced():
  key = jax.random.key(3)
  traced = jax.jit(order.epoch_order, static_argnums=2)
  np.testing.assert_array_equal(
    traced(key, jnp.int32(7), 500), order.epoch_order(key, 7, 500)
  )
