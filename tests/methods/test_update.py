"""The step that the methods share, on a loss whose gradient is on paper."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ekd_jax.methods import update
from ekd_jax.training import parallel
from tests.methods.common import first

RATE = 0.5


def _step(loss_of_params, params, devices):
  """One step of plain gradient descent; each device has its own number."""
  optimizer = optax.sgd(RATE)

  def step(state, number):
    def loss_function(params, batch_stats):
      return loss_of_params(params, number), (batch_stats, {})

    return update.gradient_step(state, loss_function, optimizer, dict)

  devices = jax.devices()[:devices]
  state = update.init_state(params, jnp.zeros(()), optimizer)
  state, metrics = parallel.per_device(step, devices)(
    parallel.replicate(state, devices),
    parallel.shard(np.arange(1.0, 1 + len(devices)), devices),
  )
  return first(state)["params"], first(metrics)


def _params():
  return {
    "student_0": {"kernel": jnp.array([[3.0, 4.0]]), "bias": jnp.array([12.0])},
    "student_1": {"kernel": jnp.array([[-1.0]])},
  }


@pytest.mark.parametrize("devices", [1, 4])
def test_norms_are_of_the_global_gradient_member_by_member(devices):
  # Half the squares, times the device's number: the mean of these times the
  # parameters is the gradient.
  def loss(params, number):
    squares = jax.tree.map(lambda x: jnp.square(x).sum() / 2, params)
    return number[0] * sum(jax.tree.leaves(squares))

  after, metrics = _step(loss, _params(), devices)
  factor = {1: 1.0, 4: 2.5}[devices]
  assert metrics == {
    "gradient_norm/student_0": pytest.approx(13 * factor),
    "gradient_norm/student_1": pytest.approx(1 * factor),
  }
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y * (1 - RATE * factor)),
    after,
    _params(),
  )


def test_a_gradient_that_overflows_under_a_finite_loss_is_told():
  # The root of 0: the loss is 0, its slope infinite.
  def loss(params, number):
    roots = jnp.sqrt(params["student_1"]["kernel"] + 1).sum()
    return roots + jnp.square(params["student_0"]["bias"]).sum()

  _, metrics = _step(loss, _params(), 1)
  assert metrics["gradient_norm/student_1"] == np.inf
  assert metrics["gradient_norm/student_0"] == pytest.approx(24)
