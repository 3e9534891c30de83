"""Each member learns from its peers, and teaching leaves a member unmoved."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ekd_jax import losses
from tests.reference import losses as reference


def random_members(seed, num_members, shape):
  rng = np.random.default_rng(seed)
  return [
    rng.normal(scale=2, size=shape).astype(np.float32)
    for _ in range(num_members)
  ]


@pytest.mark.parametrize("shape", [(5,), (1, 1), (4, 6), (2, 3, 4)])
@pytest.mark.parametrize("num_members", [1, 2, 4])
def test_equals_the_reference(num_members, shape):
  logits = random_members(0, num_members, shape)
  loss = losses.mutual_learning_loss(logits, temperature=2.0)
  exact = reference.mutual_learning_loss(logits, 2.0)
  assert len(loss) == num_members
  for ours, theirs in zip(loss, exact, strict=True):
    assert ours.shape == shape[:-1]
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_two_members_distil_into_each_other():
  first, second = random_members(1, 2, (3, 4))
  loss = losses.mutual_learning_loss([first, second], temperature=3.0)
  for ours, student, teacher in [
    (loss[0], first, second),
    (loss[1], second, first),
  ]:
    exact = reference.distillation_loss(student, teacher, 3.0)
    np.testing.assert_allclose(ours, exact, rtol=1e-4)


def test_no_gradient_reaches_the_peers():
  logits = random_members(2, 3, (4, 5))

  def loss_of(i):
    return lambda logits: jnp.sum(
      losses.mutual_learning_loss(logits, temperature=2.0)[i]
    )

  for i in range(3):
    for j, gradient in enumerate(jax.grad(loss_of(i))(logits)):
      if i == j:
        exact = np.mean(
          [
            reference.distillation_student_gradient(logits[i], peer, 2.0)
            for k, peer in enumerate(logits)
            if k != i
          ],
          axis=0,
        )
        np.testing.assert_allclose(gradient, exact, rtol=1e-4, atol=1e-5)
      else:
        np.testing.assert_array_equal(gradient, 0)


def test_a_lone_member_has_nothing_to_learn():
  (logits,) = random_members(3, 1, (4, 5))

  def total(logits):
    (loss,) = losses.mutual_learning_loss([logits], temperature=2.0)
    return jnp.sum(loss)

  value, gradient = jax.value_and_grad(total)(logits)
  assert value == 0
  np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_saturated_logits_stay_finite(dtype):
  peak = np.zeros((2, 4), np.float32)
  peak[:, 1] = 1e4
  logits = [
    jnp.asarray(z, dtype) for z in (peak, peak[:, ::-1], peak / 1e4, peak)
  ]

  def total(logits):
    return sum(
      jnp.sum(loss)
      for loss in losses.mutual_learning_loss(logits, temperature=2.0)
    )

  value, by_member = jax.jit(jax.value_and_grad(total))(logits)
  assert value.dtype == jnp.float32
  exact = sum(
    loss.sum()
    for loss in reference.mutual_learning_loss(
      [np.asarray(z, np.float64) for z in logits], 2.0
    )
  )
  np.testing.assert_allclose(value, exact, rtol=1e-4)
  for gradient in by_member:
    assert np.isfinite(np.asarray(gradient, np.float32)).all()


def test_vmap_over_a_leading_axis_is_the_batched_call():
  logits = random_members(4, 3, (2, 4, 5))
  mapped = jax.jit(
    jax.vmap(lambda z: losses.mutual_learning_loss(z, temperature=2.0))
  )(logits)
  whole = losses.mutual_learning_loss(logits, temperature=2.0)
  for ours, theirs in zip(mapped, whole, strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
  ("logits", "temperature", "error", "message"),
  [
    (jnp.ones((2, 3)), 2.0, AssertionError, "logits must be a list or tuple"),
    ([], 2.0, AssertionError, "at least one member"),
    ([jnp.ones(3), jnp.ones(2)], 2.0, AssertionError, r"logits\[1\] and"),
    ([jnp.ones(3), jnp.ones(3, int)], 2.0, AssertionError, r"logits\[1\] must"),
    ([jnp.ones(3)], 0.0, ValueError, "temperature must be .* above 0, got 0.0"),
  ],
)
def test_mistakes_are_named(logits, temperature, error, message):
  with pytest.raises(error, match=message):
    losses.mutual_learning_loss(logits, temperature=temperature)
