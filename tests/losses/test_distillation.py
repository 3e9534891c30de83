"""T^2 KL(teacher || student): values, gradients, scale and saturation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ekd_jax import losses
from tests.reference import losses as reference


def random_pair(seed, shape, scale=2.0):
  rng = np.random.default_rng(seed)
  student, teacher = rng.normal(scale=scale, size=(2, *shape))
  return student.astype(np.float32), teacher.astype(np.float32)


@functools.partial(jax.jit, static_argnums=3)
def gradients(student, teacher, temperature, stop_teacher_gradient):
  """Returns d loss / d (student, teacher)."""

  def total(student, teacher):
    return jnp.sum(
      losses.distillation_loss(
        student,
        teacher,
        temperature=temperature,
        stop_teacher_gradient=stop_teacher_gradient,
      )
    )

  return jax.grad(total, argnums=(0, 1))(student, teacher)


@pytest.mark.parametrize("temperature", [0.5, 1, 4.0])
@pytest.mark.parametrize("shape", [(5,), (1, 3), (4, 10), (2, 3, 7)])
def test_equals_the_reference(shape, temperature):
  student, teacher = random_pair(0, shape)
  loss = losses.distillation_loss(student, teacher, temperature=temperature)
  assert loss.shape == shape[:-1]
  assert loss.dtype == jnp.float32
  exact = reference.distillation_loss(student, teacher, temperature)
  np.testing.assert_allclose(loss, exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_gradients_equal_the_ones_derived_on_paper(temperature):
  student, teacher = random_pair(1, (4, 6))
  by_student, by_teacher = gradients(student, teacher, temperature, False)
  np.testing.assert_allclose(
    by_student,
    reference.distillation_student_gradient(student, teacher, temperature),
    rtol=1e-4,
    atol=1e-5,
  )
  np.testing.assert_allclose(
    by_teacher,
    reference.distillation_teacher_gradient(student, teacher, temperature),
    rtol=1e-4,
    atol=1e-5,
  )


def test_the_teacher_is_a_constant_unless_asked_otherwise():
  student, teacher = random_pair(2, (3, 5))

  def total(teacher):
    return jnp.sum(losses.distillation_loss(student, teacher, temperature=2.0))

  np.testing.assert_array_equal(jax.grad(total)(teacher), 0)
  _, by_teacher = gradients(student, teacher, 2.0, False)
  assert np.abs(by_teacher).max() > 0.1


def test_the_student_gradient_does_not_depend_on_the_stop():
  student, teacher = random_pair(3, (3, 5))
  stopped, _ = gradients(student, teacher, 2.0, True)
  flowing, _ = gradients(student, teacher, 2.0, False)
  np.testing.assert_array_equal(stopped, flowing)


def test_equal_distributions_cost_nothing():
  student, _ = random_pair(4, (3, 5))
  loss = losses.distillation_loss(student, student, temperature=2.0)
  np.testing.assert_array_equal(loss, 0)
  shifted = losses.distillation_loss(student + 8, student, temperature=2.0)
  np.testing.assert_allclose(shifted, 0, atol=1e-5)


def test_a_single_class_costs_nothing():
  loss = losses.distillation_loss(
    jnp.array([[3.0]]), jnp.array([[-2.0]]), temperature=2.0
  )
  np.testing.assert_array_equal(loss, [0])


def test_the_gradient_keeps_its_size_as_temperature_grows():
  student, teacher = random_pair(5, (64, 10), scale=1.0)
  sizes = [
    np.linalg.norm(gradients(student, teacher, t, True)[0])
    for t in (1.0, 2.0, 4.0, 8.0, 16.0)
  ]
  # Without the factor T^2 the last would be 1/256 of the first.
  assert max(sizes) / min(sizes) < 1.6


def test_at_high_temperature_it_compares_the_logits_themselves():
  student, teacher = random_pair(6, (16, 8), scale=1.0)
  student -= student.mean(axis=-1, keepdims=True)
  teacher -= teacher.mean(axis=-1, keepdims=True)
  by_student, _ = gradients(student, teacher, 1000.0, True)
  limit = (student - teacher) / 8
  np.testing.assert_allclose(by_student, limit, atol=2e-3)


@pytest.mark.parametrize("stop_teacher_gradient", [True, False])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("where", ["student", "teacher", "both", "opposed"])
def test_saturated_logits_stay_finite(where, dtype, stop_teacher_gradient):
  peak = np.zeros((2, 4), np.float32)
  peak[:, 1] = 1e4
  flat = np.linspace(-1, 1, 8, dtype=np.float32).reshape(2, 4)
  student = flat if where == "teacher" else peak
  teacher = {
    "student": flat,
    "teacher": peak,
    "both": peak,
    "opposed": peak[:, ::-1],
  }[where]
  student, teacher = jnp.asarray(student, dtype), jnp.asarray(teacher, dtype)
  loss = losses.distillation_loss(
    student,
    teacher,
    temperature=2.0,
    stop_teacher_gradient=stop_teacher_gradient,
  )
  exact = reference.distillation_loss(
    np.asarray(student, np.float64), np.asarray(teacher, np.float64), 2.0
  )
  np.testing.assert_allclose(loss, exact, rtol=1e-4, atol=1e-5)
  for gradient in gradients(student, teacher, 2.0, stop_teacher_gradient):
    assert gradient.dtype == dtype
    assert np.isfinite(np.asarray(gradient, np.float32)).all()


def test_low_precision_logits_are_compared_in_float32():
  student, teacher = (
    jnp.asarray(z, jnp.bfloat16) for z in random_pair(7, (8, 10), scale=0.1)
  )
  loss = losses.distillation_loss(student, teacher, temperature=2.0)
  assert loss.dtype == jnp.float32
  exact = reference.distillation_loss(
    np.asarray(student, np.float64), np.asarray(teacher, np.float64), 2.0
  )
  np.testing.assert_allclose(loss, exact, rtol=1e-3)


def test_double_precision_changes_neither_type_nor_value():
  student, teacher = random_pair(9, (3, 5))
  single = losses.distillation_loss(student, teacher, temperature=2.0)
  with jax.enable_x64(True):
    double = losses.distillation_loss(
      jnp.asarray(student, jnp.float64),
      jnp.asarray(teacher, jnp.float64),
      temperature=jnp.float64(2.0),
    )
  assert double.dtype == jnp.float32
  np.testing.assert_array_equal(double, single)


def test_jit_vmap_and_a_traced_temperature():
  student, teacher = random_pair(8, (3, 4, 6))

  @jax.jit
  def mapped(student, teacher, temperature):
    return jax.vmap(
      lambda s, t: losses.distillation_loss(s, t, temperature=temperature)
    )(student, teacher)

  np.testing.assert_allclose(
    mapped(student, teacher, 3.0),
    losses.distillation_loss(student, teacher, temperature=3.0),
    rtol=1e-5,
    atol=1e-6,
  )


@pytest.mark.parametrize(
  ("student", "teacher", "message"),
  [
    (jnp.ones((2, 3)), jnp.ones((2, 4)), r"one shape.*\(2, 3\) and \(2, 4\)"),
    (jnp.ones((2, 3)), jnp.ones(3), "student_logits and teacher_logits must"),
    (jnp.ones(3, jnp.int32), jnp.ones(3), "student_logits must be a floating"),
    (jnp.ones(3), [1.0, 1.0, 1.0], "teacher_logits must be a floating.*list"),
    (jnp.ones(()), jnp.ones(()), r"student_logits must have shape \[..., K\]"),
    (jnp.ones((2, 0)), jnp.ones((2, 0)), "K >= 1"),
  ],
)
def test_wrong_logits_are_named(student, teacher, message):
  with pytest.raises(AssertionError, match=message):
    losses.distillation_loss(student, teacher, temperature=2.0)


@pytest.mark.parametrize(
  ("temperature", "error"),
  [
    (0, ValueError),
    (-1.0, ValueError),
    (float("nan"), ValueError),
    (float("inf"), ValueError),
    (np.float32(0), ValueError),
    ("2", AssertionError),
    ([2.0], AssertionError),
    (jnp.ones((2, 1)), AssertionError),
  ],
)
def test_wrong_temperatures_are_named(temperature, error):
  with pytest.raises(error, match="temperature must be"):
    losses.distillation_loss(
      jnp.ones((2, 3)), jnp.ones((2, 3)), temperature=temperature
    )
