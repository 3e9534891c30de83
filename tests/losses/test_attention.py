"""FFSD: where networks look, and how they are set apart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ekd_jax import losses
from tests.losses.vectors import LABELS, Z1, Z2, Z3, Z4
from tests.reference import losses as reference

# [N, C, H, W], as the published numbers are.
A = np.array([[[[1, 2, 0], [0, 1, 3]], [[0, 1, 1], [2, 0, 1]]]], np.float32)
B = np.array([[[[2, 0, 1], [1, 0, 1]], [[1, 1, 0], [0, 3, 2]]]], np.float32)
AXES = {"batch_axis": 0, "channel_axis": 1}

OF_PAIRS = [losses.attention_loss, losses.diversity_loss]
REFERENCES = {
  losses.attention_loss: reference.attention_loss,
  losses.diversity_loss: reference.diversity_loss,
}


def maps(seed, channels=3, shape=(2, 4, 5)):
  rng = np.random.default_rng(seed)
  return rng.normal(size=(*shape, channels)).astype(np.float32)


def test_the_published_code_s_numbers_of_maps():
  close = {"rtol": 0, "atol": 6e-7}
  np.testing.assert_allclose(
    losses.attention_map(A, **AXES).ravel(), [0.5, 2.5, 0.5, 2, 0.5, 5], **close
  )
  np.testing.assert_allclose(
    losses.attention_map(B, **AXES).ravel(),
    [2.5, 0.5, 0.5, 0.5, 4.5, 2.5],
    **close,
  )
  np.testing.assert_allclose(
    losses.attention_loss(A, B, **AXES), 0.155760, **close
  )
  np.testing.assert_allclose(
    losses.normalized_feature_loss(A, B), 0.106061, **close
  )
  np.testing.assert_allclose(
    losses.diversity_loss(A, B, **AXES), 15.520828, rtol=1e-6
  )
  np.testing.assert_allclose(
    losses.shifted_features(B, **AXES).reshape(2, 6),
    [
      [16.25, 8.125, 9.125, 9.125, 12.25, 15.25],
      [15.25, 9.125, 8.125, 8.125, 15.25, 16.25],
    ],
    rtol=1e-5,
  )


def test_the_published_code_s_numbers_of_logits():
  first, second = losses.mutual_learning_loss([Z1, Z2], temperature=2.0)
  np.testing.assert_allclose(first.mean(), 0.279072, rtol=0, atol=1e-6)
  np.testing.assert_allclose(second.mean(), 0.279749, rtol=0, atol=1e-6)
  for student, teacher, expected in (
    (Z3, losses.ensemble_logits([Z1, Z2]), 0.516544),
    (Z4, Z3, 0.386735),
  ):
    found = losses.distillation_loss(student, teacher, temperature=2.0).mean()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
  for logits, expected in ((Z1, 0.621627), (Z3, 1.705779), (Z4, 0.623951)):
    found = reference.cross_entropy(logits, LABELS).mean()
    np.testing.assert_allclose(found, expected, rtol=0, atol=6e-7)


@pytest.mark.parametrize("function", OF_PAIRS)
def test_pairs_equal_the_reference_whatever_their_channels(function):
  student, teacher = maps(0, 3), maps(1, 4)
  found = jax.jit(function)(student, teacher)
  assert found.shape == (2,)
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(
    found, REFERENCES[function](student, teacher), rtol=1e-4
  )


@pytest.mark.parametrize("normalized", [False, True])
def test_targets_equal_the_reference(normalized):
  student, peer = maps(2), maps(3)
  np.testing.assert_allclose(
    losses.diversity_loss(student, peer, normalized=normalized),
    reference.diversity_loss(student, peer, normalized),
    rtol=1e-4,
  )
  np.testing.assert_allclose(
    losses.shifted_features(peer, normalized=normalized),
    reference.shifted_features(peer, normalized),
    rtol=1e-4,
    atol=1e-5,
  )


def test_maps_themselves_equal_the_reference():
  student, teacher = maps(4), maps(5)
  np.testing.assert_allclose(
    losses.normalized_feature_loss(student, teacher),
    reference.normalized_feature_loss(student, teacher),
    rtol=1e-5,
  )
  np.testing.assert_allclose(
    losses.attention_map(student), reference.attention_map(student), rtol=1e-6
  )


@pytest.mark.parametrize("normalized", [False, True])
def test_the_slope_of_a_shift_is_that_of_the_reference_when_compiled(
  normalized,
):
  """By differences; a compiler must not lose the place at the threshold."""
  for seed in range(20):
    features = maps(seed, 2, (2, 3, 4))
    direction = maps(seed + 100, 2, (2, 3, 4))

    @jax.jit
    def slope(features, direction):
      def shift(features):
        return losses.shifted_features(features, normalized=normalized)

      return jax.jvp(shift, (features,), (direction,))[1]

    after, before = (
      reference.shifted_features(
        features.astype(np.float64) + step * direction, normalized
      )
      for step in (1e-6, -1e-6)
    )
    np.testing.assert_allclose(
      slope(features, direction),
      (after - before) / 2e-6,
      rtol=1e-3,
      atol=1e-3,
    )


@pytest.mark.parametrize("shape", [(3,), (3, 1, 1)])
def test_with_a_single_place_there_is_nowhere_else_to_look(shape):
  student, teacher = maps(0, 4, shape), maps(1, 4, shape)
  student[0] = 0
  found = losses.attention_loss(student, teacher)
  np.testing.assert_allclose(found, [1, 0, 0], atol=1e-6)


def test_no_examples_give_no_losses():
  nothing = jnp.zeros((0, 3, 4, 2))
  for function in (*OF_PAIRS, losses.normalized_feature_loss):
    assert function(nothing, nothing).shape == (0,)
  assert losses.shifted_features(nothing).shape == nothing.shape


@pytest.mark.parametrize("axes", [(3, 0), (-1, -4), (3, -4)])
def test_the_order_of_axes_makes_no_difference(axes):
  student, peer = maps(6), maps(7)
  last = [x.transpose(3, 1, 2, 0) for x in (student, peer)]
  named = dict(zip(("batch_axis", "channel_axis"), axes, strict=True))
  for function in OF_PAIRS:
    np.testing.assert_allclose(
      function(*last, **named), function(student, peer), rtol=1e-5
    )
  np.testing.assert_allclose(
    losses.normalized_feature_loss(*last, batch_axis=axes[0]),
    losses.normalized_feature_loss(student, peer),
    rtol=1e-5,
  )
  np.testing.assert_allclose(
    losses.attention_map(last[0], **named),
    losses.attention_map(student),
    rtol=1e-6,
  )
  np.testing.assert_allclose(
    losses.shifted_features(last[0], **named).transpose(3, 1, 2, 0),
    losses.shifted_features(student),
    rtol=1e-5,
    atol=1e-6,
  )


@pytest.mark.parametrize(
  "function", [*OF_PAIRS, losses.normalized_feature_loss]
)
def test_only_the_student_learns(function):
  student, teacher = maps(8), maps(9)
  by_student, by_teacher = jax.grad(
    lambda s, t: function(s, t).sum(), argnums=(0, 1)
  )(student, teacher)
  np.testing.assert_array_equal(by_teacher, 0)
  # One direction, by differences of the reference.
  direction = maps(10)
  exact = REFERENCES.get(function, reference.normalized_feature_loss)
  step = 1e-5
  up, down = (
    exact(student.astype(np.float64) + s * direction, teacher).sum()
    for s in (step, -step)
  )
  np.testing.assert_allclose(
    (by_student * direction).sum(), (up - down) / (2 * step), rtol=1e-3
  )


def test_a_teacher_can_learn_too():
  by_teacher = jax.grad(
    lambda t: losses.attention_loss(
      maps(8), t, stop_teacher_gradient=False
    ).sum()
  )(maps(9))
  assert np.abs(by_teacher).max() > 0


@pytest.mark.parametrize(
  "function", [*OF_PAIRS, losses.normalized_feature_loss]
)
def test_a_map_of_zeros_has_a_finite_gradient(function):
  nothing = jnp.zeros((2, 4, 5, 3))
  value, gradient = jax.value_and_grad(lambda s: function(s, maps(0)).sum())(
    nothing
  )
  assert np.isfinite(value)
  np.testing.assert_array_equal(gradient, 0)
  assert np.isfinite(function(maps(0), nothing)).all()
  assert np.isfinite(losses.shifted_features(nothing)).all()


def test_bfloat16_is_computed_in_float32():
  student, teacher = (jnp.asarray(maps(s), jnp.bfloat16) for s in (0, 1))
  exact = [np.asarray(x, np.float32) for x in (student, teacher)]
  for function in (*OF_PAIRS, losses.normalized_feature_loss):
    found = function(student, teacher)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, function(*exact), rtol=1e-5)
  assert losses.shifted_features(student).dtype == jnp.float32


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: losses.attention_map(jnp.ones(3)), "with at least one element"),
    (lambda: losses.attention_map(jnp.ones((2, 3), int)), "floating-point"),
    (
      lambda: losses.attention_map(maps(0), batch_axis=4),
      "with the batch on axis 4",
    ),
    (
      lambda: losses.attention_map(maps(0), channel_axis=0),
      "features must have N and C on two axes",
    ),
    (
      lambda: losses.normalized_feature_loss(maps(0), maps(0, 4)),
      "student_features and teacher_features must have one shape",
    ),
    (
      lambda: losses.attention_loss(maps(0), maps(0, shape=(2, 4, 4))),
      "student_features and teacher_features must have one shape but for",
    ),
    (
      lambda: losses.attention_map(maps(0), channel_axis=4),
      "with the channels on axis 4",
    ),
    (
      lambda: losses.diversity_loss(maps(0), maps(0, shape=(2, 4, 4))),
      "student_features and peer_features must have one shape but for the",
    ),
    (
      lambda: losses.shifted_features(maps(0, shape=(2, 1, 2))),
      "features must have at least three places, got 2",
    ),
  ],
)
def test_mistakes_are_named(call, message):
  with pytest.raises(AssertionError, match=message):
    call()
