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

  def loss_function(params, batch_stats, number, rng):
    del rng
    return loss_of_params(params, number), (batch_stats, {})

  def step(state, number):
    key = jax.random.key(0)
    return update.gradient_step(
      state, number, key, loss_function, optimizer, dict
    )

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


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_micro_batches_add_up_to_the_batch(accumulate, devices):
  """A quadratic of eight numbers, whose gradient is on paper."""
  numbers = np.arange(1.0, 9.0, dtype=np.float32)
  optimizer = optax.sgd(RATE)

  def loss_function(params, batch_stats, numbers, rng):
    del rng
    errors = params["student_0"] * numbers - 1
    loss = jnp.square(errors).mean() / 2
    # What follows a running statistic: how many micro-batches there were.
    return loss, (batch_stats + 1, {"loss": loss})

  def step(state, numbers):
    return update.gradient_step(
      state,
      numbers,
      jax.random.key(0),
      loss_function,
      optimizer,
      dict,
      accumulate=accumulate,
    )

  own = jax.devices()[:devices]
  params = {"student_0": jnp.array(0.5)}
  state = update.init_state(params, jnp.zeros(()), optimizer)
  state, metrics = parallel.per_device(step, own)(
    parallel.replicate(state, own), parallel.shard(numbers, own)
  )
  gradient = np.mean((0.5 * numbers - 1) * numbers)
  loss = np.mean((0.5 * numbers - 1) ** 2) / 2
  assert first(state)["params"]["student_0"] == pytest.approx(
    0.5 - RATE * gradient, rel=1e-5
  )
  assert first(state)["batch_stats"] == accumulate
  assert first(metrics)["loss"] == pytest.approx(loss, rel=1e-5)
  assert first(metrics)["gradient_norm/student_0"] == pytest.approx(
    abs(gradient), rel=1e-5
  )


def test_each_micro_batch_has_random_numbers_of_its_own():
  optimizer = optax.sgd(RATE)

  def loss_function(params, batch_stats, numbers, rng):
    noise = jax.random.normal(rng, numbers.shape)
    return (params["student_0"] * noise).sum(), (batch_stats, {})

  def gradient(accumulate):
    state = update.init_state(
      {"student_0": jnp.zeros(())}, jnp.zeros(()), optimizer
    )
    step = jax.vmap(
      lambda numbers: update.gradient_step(
        state,
        numbers,
        jax.random.key(0),
        loss_function,
        optimizer,
        dict,
        accumulate=accumulate,
      ),
      axis_name="batch",
    )
    return step(jnp.zeros((1, 4)))[0]["params"]["student_0"][0] / -RATE

  keys = [jax.random.fold_in(jax.random.key(0), i) for i in range(2)]
  expected = np.mean([jax.random.normal(key, (2,)).sum() for key in keys])
  assert gradient(2) == pytest.approx(expected, rel=1e-5)
