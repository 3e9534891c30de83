"""The ensemble's logits are a mean that every member has a part in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ekd_jax import losses
from tests.reference import losses as reference


def random_members(seed, num_members, shape):
  rng = np.random.default_rng(seed)
  return [
    rng.normal(scale=3, size=shape).astype(np.float32)
    for _ in range(num_members)
  ]


@pytest.mark.parametrize("shape", [(4,), (3, 5), (2, 3, 7), (1, 1)])
@pytest.mark.parametrize("num_members", [1, 2, 5])
def test_equals_the_reference(num_members, shape):
  logits = random_members(0, num_members, shape)
  weights = [0.5 * (i + 1) for i in range(num_members)]
  mean = losses.ensemble_logits(logits)
  weighted = losses.ensemble_logits(logits, weights=weights)
  assert mean.shape == weighted.shape == shape
  np.testing.assert_allclose(
    mean, reference.ensemble_logits(logits), rtol=1e-5, atol=1e-6
  )
  np.testing.assert_allclose(
    weighted, reference.ensemble_logits(logits, weights), rtol=1e-5, atol=1e-6
  )


def test_weights_are_shares_whose_scale_does_not_matter():
  logits = random_members(1, 3, (4, 6))
  once = losses.ensemble_logits(logits, weights=[1, 2, 3])
  tenfold = losses.ensemble_logits(logits, weights=[10, 20, 30])
  np.testing.assert_allclose(once, tenfold, rtol=1e-5, atol=1e-6)


def test_a_weight_of_zero_leaves_its_member_out():
  logits = random_members(2, 3, (4, 6))
  weighted = losses.ensemble_logits(logits, weights=[1, 0, 1])
  np.testing.assert_allclose(
    weighted, losses.ensemble_logits(logits[::2]), rtol=1e-6
  )


def test_low_precision_members_are_averaged_in_float32():
  logits = [jnp.asarray(z, jnp.bfloat16) for z in random_members(3, 3, (4, 6))]
  ensemble = losses.ensemble_logits(logits)
  assert ensemble.dtype == jnp.float32
  exact = reference.ensemble_logits([np.asarray(z, np.float64) for z in logits])
  np.testing.assert_allclose(ensemble, exact, rtol=1e-6, atol=1e-6)


def test_gradient_reaches_every_member_and_array_weights():
  logits = random_members(4, 3, (2, 4))
  weights = jnp.array([1.0, 1.0, 2.0])

  def total(logits, weights):
    return jnp.sum(losses.ensemble_logits(logits, weights=weights))

  by_member, by_weight = jax.jit(jax.grad(total, argnums=(0, 1)))(
    logits, weights
  )
  for gradient, share in zip(by_member, [0.25, 0.25, 0.5], strict=True):
    np.testing.assert_allclose(gradient, share, rtol=1e-6)
  sums = np.array([z.sum() for z in logits])
  mean = (sums * np.asarray(weights)).sum() / 4
  np.testing.assert_allclose(by_weight, (sums - mean) / 4, rtol=1e-3)


def test_vmap_over_a_leading_axis_is_the_batched_call():
  logits = random_members(5, 2, (3, 4, 6))
  mapped = jax.vmap(lambda *z: losses.ensemble_logits(z))(*logits)
  np.testing.assert_array_equal(mapped, losses.ensemble_logits(logits))


@pytest.mark.parametrize(
  ("logits", "message"),
  [
    (np.ones((2, 3, 4), np.float32), "list or tuple.*one array of shape"),
    ([], "at least one member"),
    ([np.ones(3, np.float32), np.ones(4, np.float32)], r"logits\[1\].*\(4,\)"),
    ([np.ones(3, np.int32)], r"logits\[0\] must be a floating-point array"),
    ([1.0, 2.0], r"logits\[0\] must be a floating-point array.*got float"),
    ([np.ones((3, 0), np.float32)], "K >= 1"),
    ([np.float32(1.0)], r"must have shape \[..., K\]"),
  ],
)
def test_wrong_members_are_named(logits, message):
  with pytest.raises(AssertionError, match=message):
    losses.ensemble_logits(logits)


@pytest.mark.parametrize(
  ("weights", "error", "message"),
  [
    ([1.0], AssertionError, r"weights must be 2 numbers.*got shape \(1,\)"),
    (jnp.ones((2, 1)), AssertionError, "weights must be 2 numbers"),
    (0.5, AssertionError, "weights must be a list or tuple"),
    ([1.0, "a"], AssertionError, r"weights\[1\] must be a single number"),
    ([1.0, -0.1], ValueError, r"weights\[1\] must be .*>= 0, got -0.1"),
    ([1.0, float("nan")], ValueError, r"weights\[1\] must be a finite"),
    (np.array([-1.0, 2.0]), ValueError, r"weights\[0\] must be .*>= 0"),
    ([0.0, 0.0], ValueError, "must not all be zero"),
  ],
)
def test_wrong_weights_are_named(weights, error, message):
  with pytest.raises(error, match=message):
    losses.ensemble_logits([jnp.ones(3), jnp.ones(3)], weights=weights)
