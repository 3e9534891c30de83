"""The feature loss is a mean per example, and the teacher's maps are fixed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ekd_jax import losses
from tests.reference import losses as reference


def random_maps(seed, shape):
  rng = np.random.default_rng(seed)
  student, teacher = rng.normal(size=(2, *shape))
  return student.astype(np.float32), teacher.astype(np.float32)


def gradients(student, teacher, **kwargs):
  def total(student, teacher):
    return jnp.sum(losses.feature_loss(student, teacher, **kwargs))

  return jax.jit(jax.grad(total, argnums=(0, 1)))(student, teacher)


@pytest.mark.parametrize(
  "shape", [(4, 3), (2, 5, 3), (3, 4, 4, 2), (1, 1, 1, 1)]
)
def test_equals_the_reference(shape):
  student, teacher = random_maps(0, shape)
  loss = losses.feature_loss(student, teacher)
  assert loss.shape == shape[:1]
  assert loss.dtype == jnp.float32
  exact = reference.feature_loss(student, teacher)
  np.testing.assert_allclose(loss, exact, rtol=1e-5)


def test_gradients_equal_the_ones_derived_on_paper():
  student, teacher = random_maps(1, (3, 4, 4, 2))
  exact = reference.feature_student_gradient(student, teacher)
  by_student, by_teacher = gradients(student, teacher)
  np.testing.assert_allclose(by_student, exact, rtol=1e-5, atol=1e-7)
  np.testing.assert_array_equal(by_teacher, 0)
  by_student, by_teacher = gradients(
    student, teacher, stop_teacher_gradient=False
  )
  np.testing.assert_allclose(by_student, exact, rtol=1e-5, atol=1e-7)
  np.testing.assert_allclose(by_teacher, -exact, rtol=1e-5, atol=1e-7)


def test_low_precision_maps_are_compared_in_float32():
  student, teacher = (
    jnp.asarray(x, jnp.bfloat16) for x in random_maps(2, (2, 8, 8, 4))
  )
  loss = losses.feature_loss(student, teacher)
  assert loss.dtype == jnp.float32
  exact = reference.feature_loss(
    np.asarray(student, np.float64), np.asarray(teacher, np.float64)
  )
  np.testing.assert_allclose(loss, exact, rtol=1e-5)


@pytest.mark.parametrize("shape", [(4, 3), (3, 4, 5, 2), (1, 2, 3)], ids=str)
@pytest.mark.parametrize("stop_teacher_gradient", [True, False])
def test_the_batch_may_be_on_any_axis(shape, stop_teacher_gradient):
  maps = random_maps(4, shape)
  kwargs = {"stop_teacher_gradient": stop_teacher_gradient}
  expected = reference.feature_loss(*maps)
  plain = gradients(*maps, **kwargs)
  for axis in range(-len(shape), len(shape)):
    moved = [np.moveaxis(x, 0, axis) for x in maps]
    loss = losses.feature_loss(*moved, batch_axis=axis, **kwargs)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    for actual, wanted in zip(
      gradients(*moved, batch_axis=axis, **kwargs), plain, strict=True
    ):
      np.testing.assert_allclose(
        actual, np.moveaxis(wanted, 0, axis), rtol=1e-6
      )


@pytest.mark.parametrize(
  ("shape", "axis", "message"),
  [
    ((2, 4, 3), 3, r"shape \[N, ..., C\] with the batch on axis 3, got \(2, 4"),
    ((2, 4, 3), -4, "with the batch on axis -4"),
    ((), 0, "with the batch on axis 0"),
    ((4,), 0, "at least one element per example"),
    ((2, 0, 3), 2, "at least one element per example"),
  ],
  ids=str,
)
def test_a_batch_axis_that_is_not_there_is_named(shape, axis, message):
  with pytest.raises(AssertionError, match=message):
    losses.feature_loss(jnp.ones(shape), jnp.ones(shape), batch_axis=axis)


def test_vmap_over_a_leading_axis():
  student, teacher = random_maps(3, (2, 3, 4, 5))
  mapped = jax.jit(jax.vmap(losses.feature_loss))(student, teacher)
  assert mapped.shape == (2, 3)
  for i in range(2):
    np.testing.assert_allclose(
      mapped[i], reference.feature_loss(student[i], teacher[i]), rtol=1e-5
    )


@pytest.mark.parametrize(
  ("student", "teacher", "message"),
  [
    (jnp.ones((2, 4, 3)), jnp.ones((2, 4, 6)), r"one shape \[N, ..., C\]"),
    (jnp.ones((2, 4)), jnp.ones((1, 4)), r"\(2, 4\) and \(1, 4\)"),
    (jnp.ones(4), jnp.ones(4), r"must have shape \[N, ..., C\]"),
    (jnp.ones((2, 0, 3)), jnp.ones((2, 0, 3)), "at least one element"),
    (jnp.ones((2, 3)), jnp.ones((2, 3), int), "teacher_features must be a flo"),
    ([[1.0]], jnp.ones((1, 1)), "student_features must be a floating.*list"),
  ],
)
def test_wrong_maps_are_named(student, teacher, message):
  with pytest.raises(AssertionError, match=message):
    losses.feature_loss(student, teacher)
