"""PCL: peers learn from their ensemble and from the others' mean teachers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ekd_jax import losses
from tests.losses.vectors import LABELS, Z1, Z2, Z3, Z4
from tests.reference import losses as reference

MEAN_TEACHERS = [
  np.array(values, np.float32)
  for values in (
    [[1.5, 0.2, -0.6], [0, 0.1, 0.5]],
    [[0.9, 1, -0.2], [0.2, -0.1, 0.7]],
    [[0.4, 0, 0.1], [0.6, 0.3, -0.1]],
  )
]


def random_inputs(seed, members=3, shape=(4, 5)):
  rng = np.random.default_rng(seed)
  drawn = rng.normal(scale=2, size=(2 * members + 1, *shape))
  ensemble, *others = drawn.astype(np.float32)
  labels = rng.integers(shape[1], size=shape[0])
  return others[:members], ensemble, others[members:], labels


def test_terms_and_totals_of_the_published_code():
  loss, terms = losses.pcl_loss([Z1, Z2, Z3], Z4, MEAN_TEACHERS, LABELS)
  expected = {
    "label": [0.621627, 0.786608, 1.705779],
    "ensemble_label": 0.623951,
    "ensemble": [0.192190, 0.122296, 0.426544],
    "mean_teacher": [0.266500, 0.256972, 0.433183],
  }
  assert terms.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_allclose(terms[name], value, rtol=0, atol=1e-6)
  assert float(loss) == pytest.approx(5.435650, abs=5e-6)
  loss, _ = losses.pcl_loss(
    [Z1, Z2, Z3], Z4, MEAN_TEACHERS, LABELS, distill_weight=np.exp(-5.0)
  )
  assert float(loss) == pytest.approx(3.749404, abs=2e-6)


@pytest.mark.parametrize("members", [2, 4])
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_equals_the_reference(members, weight):
  logits, ensemble, teachers, labels = random_inputs(members, members)
  loss, terms = jax.jit(
    lambda weight: losses.pcl_loss(
      logits, ensemble, teachers, labels, temperature=2.0, distill_weight=weight
    )
  )(weight)
  exact, exact_terms = reference.pcl_loss(
    logits, ensemble, teachers, labels, 2.0, weight
  )
  assert loss.dtype == jnp.float32
  np.testing.assert_allclose(loss, exact, rtol=1e-5)
  for name, value in exact_terms.items():
    np.testing.assert_allclose(terms[name], value, rtol=1e-4, atol=1e-6)


def test_teachers_are_constants_and_the_ensemble_has_its_labels_only():
  logits, ensemble, teachers, labels = random_inputs(0)
  onehot = np.eye(5)[labels]

  def total(logits, ensemble, teachers):
    return losses.pcl_loss(
      logits, ensemble, teachers, labels, temperature=3.0, distill_weight=0.4
    )[0]

  by_logits, by_ensemble, by_teachers = jax.grad(total, argnums=(0, 1, 2))(
    logits, ensemble, teachers
  )
  for gradient in by_teachers:
    np.testing.assert_array_equal(gradient, 0)
  exact = (reference.softmax(ensemble) - onehot) / 4
  np.testing.assert_allclose(by_ensemble, exact, rtol=1e-4, atol=1e-6)
  for i, (own, gradient) in enumerate(zip(logits, by_logits, strict=True)):
    exact = reference.softmax(own) - onehot
    others = [t for j, t in enumerate(teachers) if j != i]
    for weight, teacher in [(1.0, ensemble), *((0.5, t) for t in others)]:
      exact += (
        0.4
        * weight
        * reference.distillation_student_gradient(own, teacher, 3.0)
      )
    np.testing.assert_allclose(gradient, exact / 4, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_saturated_logits_stay_finite(dtype):
  peak = jnp.zeros((2, 4), dtype).at[:, 1].set(1e4)
  inputs = [peak, peak[:, ::-1]]

  def total(inputs):
    return losses.pcl_loss(inputs, peak, inputs, jnp.array([1, 0]))[0]

  value, gradients = jax.value_and_grad(total)(inputs)
  assert value.dtype == jnp.float32
  assert np.isfinite(value)
  assert all(np.isfinite(np.asarray(g, np.float32)).all() for g in gradients)


@pytest.mark.parametrize(
  ("changes", "error", "message"),
  [
    ({"logits": [Z1]}, AssertionError, "at least two members, got 1"),
    ({"ensemble_logits": Z4[:1]}, AssertionError, "ensemble_logits and"),
    ({"mean_teacher_logits": [Z1]}, AssertionError, "each of the 2 peers"),
    (
      {"mean_teacher_logits": [Z1[:, :2], Z2[:, :2]]},
      AssertionError,
      r"mean_teacher_logits\[0\] and",
    ),
    ({"labels": np.ones(2)}, AssertionError, "labels must be an integer"),
    ({"temperature": -1.0}, ValueError, "temperature must be .* above 0"),
    ({"distill_weight": np.inf}, ValueError, "distill_weight must be a finite"),
  ],
)
def test_mistakes_are_named(changes, error, message):
  fine = {
    "logits": [Z1, Z2],
    "ensemble_logits": Z4,
    "mean_teacher_logits": MEAN_TEACHERS[:2],
    "labels": LABELS,
  }
  with pytest.raises(error, match=message):
    losses.pcl_loss(**fine | changes)
