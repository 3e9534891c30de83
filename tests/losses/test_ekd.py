"""The EKD objective: its value, its terms and where its gradients go."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ekd_jax import losses
from tests.reference import losses as reference

WEIGHTS = {"label_weight": 0.7, "feature_weight": 0.15, "distill_weight": 0.15}


def random_inputs(seed, num_members, batch, num_classes, blocks, dtype="f4"):
  """Returns logits, labels, student features and teacher features."""
  rng = np.random.default_rng(seed)
  logits = [
    jnp.asarray(rng.normal(scale=2, size=(batch, num_classes)), dtype)
    for _ in range(num_members)
  ]
  labels = jnp.asarray(rng.integers(num_classes, size=batch))
  maps = [
    [jnp.asarray(rng.normal(size=(batch, *block)), dtype) for block in blocks]
    for _ in range(num_members)
  ]
  return logits, labels, maps[1:], maps[0]


compiled_loss = jax.jit(losses.ekd_loss)


@jax.jit
def gradients(inputs, **kwargs):
  """Returns d loss / d (logits, student features, teacher features)."""
  return jax.grad(
    lambda *inputs: losses.ekd_loss(*inputs, **kwargs)[0], argnums=(0, 2, 3)
  )(*inputs)


# A small case worked out by hand: three members, two examples, one block whose
# two positions are the two examples' maps, [N, H, W, C] = [2, 1, 1, 2] for the
# full network and one channel for each thinner member.
LOGITS = [
  jnp.array([[2.0, 0.5, -1.0], [0.1, 0.2, 0.3]]),
  jnp.array([[1.0, 1.5, -0.5], [0.0, -0.4, 0.9]]),
  jnp.array([[0.2, -0.3, 0.4], [1.2, 0.7, -0.6]]),
]
LABELS = jnp.array([0, 2])
FULL_MAP = jnp.array([[1.0, 3.0], [2.0, 4.0]]).reshape(2, 1, 1, 2)
THIN_MAPS = [
  jnp.array([0.5, -1.0]).reshape(2, 1, 1, 1),
  jnp.array([2.0, 0.0]).reshape(2, 1, 1, 1),
]
ADAPTERS = [
  {"kernel": jnp.array([[2.0, -1.0]]), "bias": jnp.array([0.1, 0.2])},
  {"kernel": jnp.array([[0.5, 1.5]]), "bias": jnp.array([0.0, -0.3])},
]


def golden_loss(logits, thin_maps, adapters, full_map):
  adapted = [
    [x @ adapter["kernel"] + adapter["bias"].reshape(1, 1, 1, 2)]
    for x, adapter in zip(thin_maps, adapters, strict=True)
  ]
  return losses.ekd_loss(logits, LABELS, adapted, [full_map])


def test_golden_values():
  np.testing.assert_allclose(
    losses.ensemble_logits(LOGITS),
    [[1.066667, 0.566667, -0.366667], [0.433333, 0.166667, 0.2]],
    atol=2e-6,
  )
  loss, terms = golden_loss(LOGITS, THIN_MAPS, ADAPTERS, FULL_MAP)
  np.testing.assert_allclose(
    terms["label"], [0.621627, 0.786608, 1.705779], atol=2e-6
  )
  np.testing.assert_allclose(terms["feature"], [[8.4875], [5.645]], atol=2e-6)
  np.testing.assert_allclose(
    terms["distill"], [0.109124, 0.144876, 0.236930], atol=2e-6
  )
  np.testing.assert_allclose(loss, 4.373325, atol=3e-6)


def test_golden_gradients():
  by_logits, by_maps, by_adapters, by_full_map = jax.jit(
    jax.grad(lambda *args: golden_loss(*args)[0], argnums=(0, 1, 2, 3))
  )(LOGITS, THIN_MAPS, ADAPTERS, FULL_MAP)
  expected = [
    [[-0.052733, 0.051615, 0.001118], [0.098487, 0.118760, -0.217247]],
    [[-0.239870, 0.219283, 0.020587], [0.074785, 0.045590, -0.120375]],
    [[-0.240385, 0.064047, 0.176337], [0.211926, 0.125790, -0.337716]],
  ]
  for gradient, golden in zip(by_logits, expected, strict=True):
    np.testing.assert_allclose(gradient, golden, atol=2e-6)
  np.testing.assert_allclose(by_maps[0].ravel(), [0.2625, -0.375], atol=2e-6)
  np.testing.assert_allclose(
    by_maps[1].ravel(), [-0.03375, -0.55875], atol=2e-6
  )
  np.testing.assert_allclose(
    by_adapters[0]["kernel"], [[0.29625, 0.08625]], atol=2e-6
  )
  np.testing.assert_array_equal(by_full_map, 0)


@pytest.mark.parametrize(
  ("num_members", "batch", "num_classes", "blocks"),
  [
    (5, 4, 10, [(4, 4, 2), (2, 2, 3), (1, 1, 5)]),
    (2, 1, 3, [(2, 2, 1)]),
    (1, 3, 4, [(2, 2, 1), (1, 1, 2)]),
    (3, 2, 1, [(6,)]),
    (3, 2, 4, []),
    (1, 1, 1, []),
  ],
)
def test_equals_the_reference(num_members, batch, num_classes, blocks):
  weights = {"label_weight": 1, "feature_weight": 0.5, "distill_weight": 0.3}
  inputs = random_inputs(0, num_members, batch, num_classes, blocks)
  loss, terms = compiled_loss(*inputs, temperature=3.0, **weights)
  exact, exact_terms = reference.ekd_loss(*inputs, 3.0, **weights)
  shapes = {
    "label": (num_members,),
    "feature": (num_members - 1, len(blocks)),
    "distill": (num_members,),
  }
  assert loss.shape == ()
  assert loss.dtype == jnp.float32
  np.testing.assert_allclose(loss, exact, rtol=1e-5, atol=1e-6)
  assert terms.keys() == shapes.keys()
  for name, shape in shapes.items():
    assert terms[name].shape == shape
    assert terms[name].dtype == jnp.float32
    np.testing.assert_allclose(
      terms[name],
      np.reshape(exact_terms[name], shape),
      rtol=1e-4,
      atol=1e-5,
    )


def test_logit_gradients_equal_the_ones_derived_on_paper():
  inputs = random_inputs(1, 3, 4, 6, [(2, 2, 3)])
  by_logits, _, _ = gradients(inputs, temperature=3.0, **WEIGHTS)
  exact = reference.ekd_logit_gradients(inputs[0], inputs[1], 3.0, 0.7, 0.15)
  for ours, theirs in zip(by_logits, exact, strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


def test_the_defaults_are_the_published_ones():
  inputs = random_inputs(2, 3, 4, 6, [(2, 2, 3)])
  loss, _ = losses.ekd_loss(*inputs)
  exact, _ = reference.ekd_loss(*inputs, 2.0, **WEIGHTS)
  np.testing.assert_allclose(loss, exact, rtol=1e-5)


def test_each_term_moves_only_the_members_it_should():
  logits, labels, students, teacher = random_inputs(
    3, 3, 4, 6, [(2, 2, 3), (1, 1, 4)]
  )

  def terms(logits, students, teacher):
    return losses.ekd_loss(logits, labels, students, teacher)[1]

  jacobians = jax.jit(jax.jacrev(terms, argnums=(0, 1, 2)))(
    logits, students, teacher
  )

  def moved(tree, *index):
    return [bool(np.any(leaf[index])) for leaf in jax.tree.leaves(tree)]

  for i in range(3):
    for name in ("label", "distill"):
      by_logits, by_students, by_teacher = jacobians[name]
      # The ensemble holds every member, and is still no path to the others.
      assert moved(by_logits, i) == [j == i for j in range(3)]
      assert not any(moved(by_students, i) + moved(by_teacher, i))
  by_logits, by_students, by_teacher = jacobians["feature"]
  for i in range(2):
    for b in range(2):
      assert not any(moved(by_logits, i, b) + moved(by_teacher, i, b))
      assert moved(by_students, i, b) == [
        (j, c) == (i, b) for j in range(2) for c in range(2)
      ]


def test_the_weights_switch_their_terms():
  inputs = random_inputs(4, 3, 4, 6, [(2, 2, 3)])
  for name in ("label", "feature", "distill"):
    weights = {f"{other}_weight": 0.0 for other in ("label", "feature")}
    weights["distill_weight"] = 0.0
    weights[f"{name}_weight"] = 2.0
    loss, terms = compiled_loss(*inputs, **weights)
    assert loss > 0
    np.testing.assert_allclose(loss, 2 * np.sum(terms[name]), rtol=1e-6)


def test_the_ensemble_includes_the_full_network():
  logits, labels, _, _ = random_inputs(5, 2, 4, 6, [])
  _, terms = losses.ekd_loss(logits, labels, [[]], [])
  mean = (np.asarray(logits[0]) + np.asarray(logits[1])) / 2
  for i in range(2):
    exact = reference.distillation_loss(logits[i], mean, 2.0).mean()
    np.testing.assert_allclose(terms["distill"][i], exact, rtol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("saturated", ["first", "last", "all", "opposed"])
def test_saturated_logits_stay_finite(saturated, dtype):
  logits, labels, students, teacher = random_inputs(
    6, 3, 4, 5, [(2, 2, 3)], dtype
  )
  peak = jnp.zeros((4, 5), dtype).at[:, 2].set(1e4)
  logits = {
    "first": [peak, *logits[1:]],
    "last": [*logits[:2], peak],
    "all": [peak, peak, peak],
    "opposed": [peak, peak[:, ::-1].at[:, 0].set(1e4), -peak],
  }[saturated]
  inputs = logits, labels, students, teacher
  loss, terms = compiled_loss(*inputs)
  as_float64 = jax.tree.map(lambda x: np.asarray(x, np.float64), inputs)
  exact, _ = reference.ekd_loss(
    as_float64[0], np.asarray(labels), *as_float64[2:], 2.0, **WEIGHTS
  )
  np.testing.assert_allclose(loss, exact, rtol=1e-4)
  for leaf in jax.tree.leaves((terms, gradients(inputs))):
    assert np.isfinite(np.asarray(leaf, np.float32)).all()


def test_low_precision_inputs_are_cast_before_anything_else():
  inputs = random_inputs(7, 3, 4, 5, [(2, 2, 3)], jnp.bfloat16)
  wide = jax.tree.map(
    lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, inputs
  )
  # Not compiled: fusion may keep bfloat16 intermediates wide and hide a
  # missing cast.
  low, high = losses.ekd_loss(*inputs), losses.ekd_loss(*wide)
  for ours, theirs in zip(
    jax.tree.leaves(low), jax.tree.leaves(high), strict=True
  ):
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.uint8, np.int64])
def test_any_integer_type_serves_as_label(dtype):
  logits, labels, _, _ = random_inputs(8, 1, 4, 300, [])
  expected, _ = compiled_loss(logits, labels % 256, [], [])
  loss, _ = compiled_loss(logits, np.asarray(labels % 256, dtype), [], [])
  assert loss == expected


@pytest.mark.parametrize("num_classes", [3, 300])
@pytest.mark.parametrize("label", [-1, -4, 300])
def test_a_label_out_of_range_is_not_trained_on(label, num_classes):
  # An int8 label cannot hold the number of classes, and must not wrap.
  labels = np.array([label], np.int8 if label < 0 else np.int32)
  loss, _ = compiled_loss([jnp.ones((1, num_classes))], labels, [], [])
  assert np.isnan(loss)


@pytest.mark.parametrize("axis", [1, 3, -1])
def test_features_may_have_their_batch_on_another_axis(axis):
  inputs = random_inputs(12, 3, 4, 5, [(2, 2, 3), (1, 3, 2)])
  logits, labels, students, teacher = inputs
  move = functools.partial(np.moveaxis, source=0, destination=axis)
  moved = logits, labels, *jax.tree.map(move, (students, teacher))

  def loss(logits, students, teacher, axis):
    return losses.ekd_loss(
      logits, labels, students, teacher, feature_batch_axis=axis
    )

  run = jax.jit(
    jax.value_and_grad(loss, (0, 1, 2), has_aux=True), static_argnums=3
  )
  value, pulled = run(logits, students, teacher, 0)
  moved_value, moved_pulled = run(logits, *moved[2:], axis)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-5), moved_value, value
  )
  by_logits, *by_features = pulled
  moved_by_logits, *moved_by_features = moved_pulled
  compare = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-8)
  jax.tree.map(compare, moved_by_logits, by_logits)
  jax.tree.map(compare, moved_by_features, jax.tree.map(move, by_features))


@pytest.mark.parametrize(
  ("axis", "message"),
  [
    (
      1,
      r"teacher_features\[0\] must have shape.*N = 2 on axis 1, got \(2, 3\)",
    ),
    (2, r"teacher_features\[0\] must have shape.*the batch on axis 2, got"),
    (-3, r"teacher_features\[0\] must have shape.*the batch on axis -3, got"),
  ],
)
def test_a_wrong_batch_axis_of_the_features_is_named(axis, message):
  with pytest.raises(AssertionError, match=message):
    losses.ekd_loss(*GOOD, feature_batch_axis=axis)


def test_vmap_over_independent_families():
  families = [random_inputs(seed, 3, 4, 5, [(2, 2, 3)]) for seed in (9, 10)]
  stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *families)
  loss, terms = jax.jit(jax.vmap(losses.ekd_loss))(*stacked)
  assert terms["feature"].shape == (2, 2, 1)
  for i, family in enumerate(families):
    exact, _ = reference.ekd_loss(*family, 2.0, **WEIGHTS)
    np.testing.assert_allclose(loss[i], exact, rtol=1e-5)


def test_hyper_parameters_may_be_traced():
  inputs = random_inputs(11, 3, 4, 5, [(2, 2, 3)])
  settings = {"temperature": 4.0, "label_weight": 0.2, "distill_weight": 0.5}
  traced, _ = compiled_loss(*inputs, **settings)
  fixed, _ = losses.ekd_loss(*inputs, **settings)
  np.testing.assert_allclose(traced, fixed, rtol=1e-6)


# Three members, a batch of two, four classes and blocks [2, 3] and [2, 5];
# each case below replaces one of the four arguments by a mistaken one.
GOOD = (
  [jnp.ones((2, 4))] * 3,
  jnp.array([0, 3]),
  [[jnp.ones((2, 3)), jnp.ones((2, 5))]] * 2,
  [jnp.ones((2, 3)), jnp.ones((2, 5))],
)
MISTAKES = [
  (0, jnp.ones((3, 2, 4)), "logits must be a list or tuple of S arrays"),
  (0, [], "logits must hold at least one member"),
  (0, [jnp.ones((1, 2, 4))] * 3, r"logits must be arrays of shape \[N, K\]"),
  (0, [jnp.ones((0, 4))] * 3, "with N >= 1"),
  (0, [*GOOD[0][:2], jnp.ones((2, 5))], r"logits\[2\] and logits\[0\] must"),
  (0, [jnp.ones((2, 4), int)] * 3, r"logits\[0\] must be a floating-point"),
  (1, jnp.array([0.0, 3.0]), r"labels must be an integer array \[N\]"),
  (1, jnp.array([0, 3, 1]), "with N = 2"),
  (1, jnp.zeros((2, 4), int), r"labels must be an integer array \[N\]"),
  (1, [0, 3], "labels must be an integer array.*got list"),
  (2, GOOD[2][:1], r"student_features must have S - 1 = 2 entries.*got 1"),
  (2, jnp.ones((2, 2)), "student_features must be a list or tuple of S - 1"),
  (2, [GOOD[3], GOOD[3][:1]], r"student_features\[1\] must have B = 2 arrays"),
  (2, [GOOD[3], jnp.ones(2)], r"student_features\[1\] must be a list or tuple"),
  (
    2,
    [GOOD[3], [jnp.ones((2, 3)), jnp.ones((2, 4))]],
    r"student_features\[1\]\[1\] and teacher_features\[1\] must have one shape",
  ),
  (
    2,
    [GOOD[3], [jnp.ones((2, 3)), jnp.ones((2, 5), int)]],
    r"student_features\[1\]\[1\] must be a floating-point array",
  ),
  (3, jnp.ones((2, 2, 3)), "teacher_features must be a list or tuple of B"),
  (3, [jnp.ones((3, 3))] * 2, r"teacher_features\[0\] must have shape.*N = 2"),
]


def test_the_arguments_the_mistakes_start_from_are_accepted():
  loss, _ = losses.ekd_loss(*GOOD)
  assert np.isfinite(loss)


@pytest.mark.parametrize(("position", "value", "message"), MISTAKES)
def test_mistaken_arguments_are_named(position, value, message):
  args = [*GOOD[:position], value, *GOOD[position + 1 :]]
  with pytest.raises(AssertionError, match=message):
    losses.ekd_loss(*args)
  with pytest.raises(AssertionError, match=message):
    jax.eval_shape(lambda: losses.ekd_loss(*args))


@pytest.mark.parametrize(
  ("name", "value", "error", "message"),
  [
    ("temperature", 0.0, ValueError, "must be a finite number above 0"),
    ("label_weight", -0.1, ValueError, "must be a finite number >= 0, got"),
    ("feature_weight", float("inf"), ValueError, "must be a finite number"),
    ("distill_weight", float("nan"), ValueError, "must be a finite number"),
    ("distill_weight", None, AssertionError, "must be a single number"),
    ("label_weight", jnp.ones(3), AssertionError, "must be a single number"),
  ],
)
def test_mistaken_hyper_parameters_are_named(name, value, error, message):
  with pytest.raises(error, match=f"{name} {message}"):
    losses.ekd_loss(*GOOD, **{name: value})
