"""FFL: a fused classifier and its sub-networks teach each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ekd_jax import losses
from tests.losses.vectors import LABELS, Z1, Z2, Z3
from tests.reference import losses as reference


def random_inputs(seed, members=3, shape=(4, 5)):
  rng = np.random.default_rng(seed)
  logits = [
    rng.normal(scale=2, size=shape).astype(np.float32)
    for _ in range(members + 1)
  ]
  return logits[1:], logits[0], rng.integers(shape[1], size=shape[0])


def test_terms_and_totals_of_the_published_code():
  _, terms = losses.ffl_loss([Z1, Z2], Z3, LABELS)
  # Six digits, without the constant that the code adds to probabilities.
  expected = {
    "label": [0.621627, 0.786608],
    "fused_label": 1.705779,
    "distill": [0.600818, 0.655678],
    "fused_distill": 0.547185,
  }
  assert terms.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_allclose(terms[name], value, rtol=0, atol=1e-6)
  # With it totals are 1e-5 larger at most.
  for epoch, total in ((0, 3.126168), (40, 3.630780), (80, 4.917704)):
    loss, _ = losses.ffl_loss(
      [Z1, Z2], Z3, LABELS, distill_weight=losses.ramp_up(epoch, 80)
    )
    assert float(loss) == pytest.approx(total, abs=1e-5)


@pytest.mark.parametrize("members", [2, 4])
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_equals_the_reference(members, weight):
  logits, fused, labels = random_inputs(members, members)
  loss, terms = jax.jit(
    lambda weight: losses.ffl_loss(
      logits, fused, labels, temperature=2.0, distill_weight=weight
    )
  )(weight)
  exact, exact_terms = reference.ffl_loss(logits, fused, labels, 2.0, weight)
  assert loss.dtype == jnp.float32
  np.testing.assert_allclose(loss, exact, rtol=1e-5)
  for name, value in exact_terms.items():
    np.testing.assert_allclose(terms[name], value, rtol=1e-4, atol=1e-6)


def test_every_classifier_learns_from_its_labels_and_its_teacher():
  """Teachers are constants on paper: softmax - onehot, and T (q - p)."""
  logits, fused, labels = random_inputs(0)
  onehot = np.eye(5)[labels]

  def total(logits, fused):
    return losses.ffl_loss(
      logits, fused, labels, temperature=3.0, distill_weight=0.4
    )[0]

  by_logits, by_fused = jax.grad(total, argnums=(0, 1))(logits, fused)
  pairs = [(z, fused, g) for z, g in zip(logits, by_logits, strict=True)]
  pairs.append((fused, np.mean(logits, axis=0), by_fused))
  for student, teacher, gradient in pairs:
    exact = reference.softmax(student) - onehot
    exact += 0.4 * reference.distillation_student_gradient(
      student, teacher, 3.0
    )
    np.testing.assert_allclose(gradient, exact / 4, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_saturated_logits_stay_finite(dtype):
  peak = jnp.zeros((2, 4), dtype).at[:, 1].set(1e4)
  inputs = [peak, peak[:, ::-1]]

  def total(inputs):
    return losses.ffl_loss(inputs, peak, jnp.array([1, 0]))[0]

  value, gradients = jax.value_and_grad(total)(inputs)
  assert value.dtype == jnp.float32
  assert np.isfinite(value)
  assert all(np.isfinite(np.asarray(g, np.float32)).all() for g in gradients)


def test_a_label_that_is_no_class_is_not_silent():
  loss, _ = losses.ffl_loss([Z1, Z2], Z3, np.array([0, -1]))
  assert np.isnan(loss)


@pytest.mark.parametrize(
  ("changes", "error", "message"),
  [
    ({"logits": [Z1]}, AssertionError, "at least two members, got 1"),
    ({"logits": Z1}, AssertionError, "logits must be a list or tuple"),
    ({"fused_logits": Z3[:, :2]}, AssertionError, "fused_logits and"),
    ({"fused_logits": LABELS}, AssertionError, "fused_logits must be a float"),
    ({"labels": np.ones(2)}, AssertionError, "labels must be an integer"),
    ({"labels": np.arange(3)}, AssertionError, "with N = 2"),
    ({"temperature": 0.0}, ValueError, "temperature must be .* above 0"),
    ({"distill_weight": -1.0}, ValueError, "distill_weight must be .* >= 0"),
  ],
)
def test_mistakes_are_named(changes, error, message):
  fine = {"logits": [Z1, Z2], "fused_logits": Z3, "labels": LABELS}
  with pytest.raises(error, match=message):
    losses.ffl_loss(**fine | changes)
