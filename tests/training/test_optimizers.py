"""The published recipe: what torch's SGD does, and when the rate drops."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ekd_jax.training.optimizers import (
  nesterov_sgd,
  rmsprop,
  sgd_and_adam,
  step_schedule,
)
from tests.reference.optimizers import (
  TensorFlowRMSProp,
  TorchAdam,
  TorchSGD,
)


def schedule(total_steps=200, drops=(0.5, 0.75)):
  return step_schedule(
    0.1, drops=drops, drop_factor=0.1, total_steps=total_steps
  )


@pytest.mark.parametrize(
  ("step", "rate"),
  [
    (0, 0.1),
    (99, 0.1),
    (100, 0.01),
    (149, 0.01),
    (150, 0.001),
    (199, 0.001),
  ],
)
def test_the_rate_drops_after_half_and_three_quarters_of_the_steps(step, rate):
  np.testing.assert_allclose(schedule()(step), rate, rtol=1e-6)
  # Inside a compiled step the count is an array.
  np.testing.assert_allclose(schedule()(jnp.asarray(step)), rate, rtol=1e-6)


def test_drops_fall_on_the_nearest_step():
  """Half of 7 steps is 3.5, three quarters are 5.25."""
  rates = [float(schedule(7)(step)) for step in range(7)]
  np.testing.assert_allclose(rates[:3], 0.1, rtol=1e-6)
  np.testing.assert_allclose(rates[4:5], 0.01, rtol=1e-6)
  np.testing.assert_allclose(rates[5:], 0.001, rtol=1e-6)


def test_drops_that_meet_on_one_step_both_count():
  rates = [float(schedule(2, drops=(0.6, 0.7))(step)) for step in range(2)]
  np.testing.assert_allclose(rates, [0.1, 0.001], rtol=1e-6)


def test_the_first_step_always_has_the_full_rate():
  np.testing.assert_allclose(schedule(1)(0), 0.1, rtol=1e-6)


def test_without_drops_the_rate_is_constant():
  rates = [float(schedule(drops=())(step)) for step in (0, 100, 10_000)]
  np.testing.assert_allclose(rates, 0.1, rtol=1e-6)


def random_tree(seed):
  rng = np.random.default_rng(seed)

  def normal(*shape):
    return rng.normal(size=shape).astype(np.float32)

  return {
    "stem": {"kernel": normal(3, 2), "scale": normal(2)},
    "branches": {"student_0": {"head": {"bias": normal(4)}}},
    "adapters": {"student_1": {"block_0": {"kernel": normal(2, 2)}}},
  }


def leaves(tree, prefix=()):
  """Flattens nested dicts to {path: array}."""
  if not isinstance(tree, dict):
    return {prefix: np.asarray(tree)}
  return {
    path: leaf
    for name, branch in tree.items()
    for path, leaf in leaves(branch, (*prefix, name)).items()
  }


@pytest.mark.parametrize("momentum", [0.9, 0.0])
@pytest.mark.parametrize("weight_decay", [0.05, 0.0])
@pytest.mark.parametrize("adapters", [True, False])
def test_steps_equal_those_of_torch(momentum, weight_decay, adapters):
  optimizer = nesterov_sgd(
    schedule(8),
    momentum=momentum,
    weight_decay=weight_decay,
    adapter_multiplier=0.5,
  )
  params = random_tree(0)
  if not adapters:
    del params["adapters"]
  expected = leaves(params)
  torch = {path: TorchSGD(momentum, weight_decay) for path in expected}
  state = optimizer.init(params)
  rates = [0.1] * 4 + [0.01] * 2 + [0.001] * 2
  for step, rate in enumerate(rates, start=1):
    gradients = random_tree(step)
    if not adapters:
      del gradients["adapters"]
    updates, state = optimizer.update(gradients, state, params)
    params = optax.apply_updates(params, updates)
    for path, gradient in leaves(gradients).items():
      own_rate = rate * 0.5 if path[0] == "adapters" else rate
      expected[path] = torch[path].step(expected[path], gradient, own_rate)
    for path, value in leaves(params).items():
      np.testing.assert_allclose(
        value, expected[path], rtol=1e-5, atol=1e-6, err_msg=f"{step} {path}"
      )


@pytest.mark.parametrize("momentum", [0.9, 0.0])
@pytest.mark.parametrize("weight_decay", [0.05, 0.0])
def test_rmsprop_steps_equal_those_of_tensorflow(momentum, weight_decay):
  optimizer = rmsprop(
    schedule(8),
    momentum=momentum,
    weight_decay=weight_decay,
    adapter_multiplier=0.5,
  )
  params = random_tree(0)
  expected = leaves(params)
  reference = {
    path: TensorFlowRMSProp(momentum, weight_decay, epsilon=0.001)
    for path in expected
  }
  state = optimizer.init(params)
  for step, rate in enumerate([0.1] * 4 + [0.01] * 2 + [0.001] * 2, start=1):
    gradients = random_tree(step)
    updates, state = optimizer.update(gradients, state, params)
    params = optax.apply_updates(params, updates)
    for path, gradient in leaves(gradients).items():
      own_rate = rate * 0.5 if path[0] == "adapters" else rate
      expected[path] = reference[path].step(expected[path], gradient, own_rate)
    for path, value in leaves(params).items():
      np.testing.assert_allclose(
        value, expected[path], rtol=1e-5, atol=1e-6, err_msg=f"{step} {path}"
      )


@pytest.mark.parametrize("multiplier", [0.0, 0.5, 1.0])
def test_only_adapters_have_a_rate_of_their_own(multiplier):
  optimizer = nesterov_sgd(
    lambda step: 0.1,
    momentum=0.0,
    weight_decay=0.0,
    adapter_multiplier=multiplier,
  )
  params, gradients = random_tree(0), random_tree(1)
  updates, _ = optimizer.update(gradients, optimizer.init(params), params)
  updates, gradients = leaves(updates), leaves(gradients)
  for path, gradient in gradients.items():
    rate = 0.1 * multiplier if path[0] == "adapters" else 0.1
    np.testing.assert_allclose(updates[path], -rate * gradient, rtol=1e-6)


def test_a_deeper_entry_named_adapters_is_an_ordinary_parameter():
  optimizer = nesterov_sgd(
    lambda step: 1.0, momentum=0.0, weight_decay=0.0, adapter_multiplier=0.5
  )
  params = {"student_0": {"adapters": jnp.ones(2)}}
  updates, _ = optimizer.update(params, optimizer.init(params), params)
  np.testing.assert_array_equal(updates["student_0"]["adapters"], [-1, -1])


def test_fusion_and_decoders_are_trained_in_their_own_ways():
  """SGD with another weight decay, and Adam, each as torch's."""
  optimizer = sgd_and_adam(
    schedule(8),
    momentum=0.9,
    weight_decay=0.05,
    fusion_weight_decay=0.2,
    decoder_schedule=step_schedule(
      1e-3, drops=(0.5, 0.75), drop_factor=0.1, total_steps=8
    ),
  )
  own = {
    "networks": TorchSGD(0.9, 0.05),
    "spread": TorchSGD(0.9, 0.05),
    "fusion": TorchSGD(0.9, 0.2),
    "decoders": TorchAdam(0.05),
  }
  rng = np.random.default_rng(0)
  params = {name: {"kernel": jnp.array(rng.normal(size=3))} for name in own}
  expected = {name: np.array(tree["kernel"]) for name, tree in params.items()}
  state = optimizer.init(params)
  for factor in [1.0] * 4 + [0.1] * 2 + [0.01] * 2:
    gradients = {name: {"kernel": rng.normal(size=3)} for name in own}
    updates, state = optimizer.update(gradients, state, params)
    params = optax.apply_updates(params, updates)
    for name, torch in own.items():
      rate = (1e-3 if name == "decoders" else 0.1) * factor
      gradient = gradients[name]["kernel"]
      expected[name] = torch.step(expected[name], gradient, rate)
      np.testing.assert_allclose(
        params[name]["kernel"], expected[name], rtol=1e-4, err_msg=name
      )
