"""EKD: its loss, where each term's gradient goes, one step, many devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ekd_jax import methods
from tests.methods import common
from tests.methods.common import HYPER, batch, first
from tests.models import formulations
from tests.reference import layers as reference_layers
from tests.reference import losses as reference
from tests.reference import resnet as reference_resnet

WIDTHS = (1.0, 0.5, 0.25)
NAMES = ("student_0", "student_1", "student_2")
THIN = NAMES[1:]
BLOCKS = ("block_0", "block_1", "block_2")
MEMBERS = common.members(*WIDTHS)
NO_TERMS = {"label_weight": 0.0, "feature_weight": 0.0, "distill_weight": 0.0}


def build(hyper, base_gradients="all", dtype=jnp.float32, formulation="lax"):
  return methods.ekd(
    common.family(dtype=dtype, formulation=formulation),
    MEMBERS,
    common.optimizer(hyper),
    base_gradients=base_gradients,
    **{
      name: hyper[name]
      for name in (
        "temperature",
        "label_weight",
        "feature_weight",
        "distill_weight",
      )
    },
  )


@functools.cache
def state():
  return common.random_state(build)


@functools.cache
def step(num_devices=1, base_gradients="all"):
  """A compiled step, shared by the tests of this file."""
  return common.compiled_step(
    functools.partial(build, base_gradients=base_gradients), num_devices
  )


def gradients(base_gradients="all", **weights):
  """The gradients of the terms that have a weight; the others have none."""
  hyper = {**HYPER, **NO_TERMS, **weights}
  run = step(base_gradients=base_gradients)
  next_state, _ = run(state(), [batch(0)], hyper)
  return first(next_state)["opt_state"]["gradients"]


# --- the networks once more, one member at a time ---------------------------


@jax.jit
def members_alone(params, batch_stats, images, cotangents):
  """Every member on its own stem, without the method.

  Returns:
    {member: (logits, features, adapted features)}, and the cotangents of
    logits and adapted features pulled back to {member: (stem, branch,
    adapters)}.
  """
  family = common.family(axis_name=None)

  def apply(module, params, batch_stats, x):
    variables = {"params": params, "batch_stats": batch_stats}
    return module.apply(variables, x, train=True, mutable=["batch_stats"])[0]

  outputs, pulled = {}, {}
  for name, width in zip(NAMES, WIDTHS, strict=True):

    def forward(stem, branch, adapters, name=name, width=width):
      hidden = apply(family.stem(), stem, batch_stats["stem"], images)
      logits, features = apply(
        family.branch(width), branch, batch_stats["branches"][name], hidden
      )
      adapted = [
        feature @ adapters[block]["kernel"][0, 0] + adapters[block]["bias"]
        for block, feature in zip(BLOCKS, features, strict=True)
        if adapters
      ]
      return (logits, adapted), features

    (logits, adapted), pull, features = jax.vjp(
      forward,
      params["stem"],
      params["branches"][name],
      params["adapters"].get(name, {}),
      has_aux=True,
    )
    outputs[name] = logits, features, adapted
    pulled[name] = pull(cotangents[name])
  return outputs, pulled


def zero_cotangents():
  maps = [(8, 8, 16), (4, 4, 32), (2, 2, 64)]
  return {
    name: (
      np.zeros((common.BATCH, common.CLASSES), np.float32),
      [np.zeros((common.BATCH, *m), np.float32) for m in maps if name in THIN],
    )
    for name in NAMES
  }


@functools.cache
def outputs():
  """{member: (logits, features, adapted features)} of the first batch."""
  own = state()
  found, _ = members_alone(
    own["params"], own["batch_stats"], batch(0)["image"], zero_cotangents()
  )
  return jax.tree.map(np.asarray, found)


def member_gradients(label_weight=0.0, feature_weight=0.0, distill_weight=0.0):
  """The loss differentiated on paper, pulled back through each member."""
  logits = [outputs()[name][0] for name in NAMES]
  teacher_features = outputs()["student_0"][1]
  by_logits = reference.ekd_logit_gradients(
    logits,
    batch(0)["label"],
    HYPER["temperature"],
    label_weight,
    distill_weight,
  )
  cotangents = {}
  for name, by_logit in zip(NAMES, by_logits, strict=True):
    adapted = outputs()[name][2]
    pairs = adapted, teacher_features[: len(adapted)]
    by_features = [
      feature_weight
      / common.BATCH
      * reference.feature_student_gradient(student, teacher)
      for student, teacher in zip(*pairs, strict=True)
    ]
    cotangents[name] = jax.tree.map(np.float32, (by_logit, by_features))
  own = state()
  return members_alone(
    own["params"], own["batch_stats"], batch(0)["image"], cotangents
  )[1]


# --- the loss ---------------------------------------------------------------


def test_metrics_are_the_terms_that_numpy_finds():
  _, metrics = step()(state(), [batch(0)])
  metrics = common.terms_of(first(metrics), ["stem", *NAMES])
  labels = batch(0)["label"]
  logits = [outputs()[name][0] for name in NAMES]
  loss, terms = reference.ekd_loss(
    logits,
    labels,
    [outputs()[name][2] for name in THIN],
    outputs()["student_0"][1],
    temperature=2.0,
    label_weight=0.7,
    feature_weight=0.15,
    distill_weight=0.15,
  )
  ensemble = reference.ensemble_logits(logits)
  expected = {
    "loss": loss,
    "label/ensemble": reference.cross_entropy(ensemble, labels).mean(),
    "top1/ensemble": common.top1(ensemble, labels),
  }
  for i, name in enumerate(NAMES):
    expected[f"label/{name}"] = terms["label"][i]
    expected[f"distill/{name}"] = terms["distill"][i]
    expected[f"top1/{name}"] = common.top1(logits[i], labels)
  for i, name in enumerate(THIN):
    for b, block in enumerate(BLOCKS):
      expected[f"feature/{name}/{block}"] = terms["feature"][i][b]
  assert metrics.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_allclose(metrics[name], value, rtol=1e-4, err_msg=name)
  # Not all members are right or wrong alike, so a mix-up would show.
  assert len({expected[f"top1/{name}"] for name in NAMES}) > 1


# --- where gradients go -----------------------------------------------------


@pytest.mark.parametrize("base_gradients", ["all", "first"])
@pytest.mark.parametrize(
  "weights",
  [
    {"label_weight": 1.0},
    {"distill_weight": 1.0},
    {"feature_weight": 1.0},
    {"label_weight": 0.7, "feature_weight": 0.3, "distill_weight": 0.2},
  ],
  ids=lambda weights: "+".join(w.removesuffix("_weight") for w in weights),
)
def test_gradients_are_those_worked_out_on_paper(base_gradients, weights):
  """Every term reaches what it should and nothing else.

  On paper the ensemble and the full network's features are constants, so a
  member's branch is reached by its own logits and features alone. (A gradient
  through the ensemble would cancel in the sum over all members: the mean of
  log(p_E / p_i) is the same for every class.)
  """
  actual = gradients(base_gradients, **weights)
  by_member = member_gradients(**weights)
  trains_the_stem = NAMES if base_gradients == "all" else NAMES[:1]
  expected = {
    "stem": jax.tree.map(
      lambda *leaves: sum(leaves),
      *(by_member[name][0] for name in trains_the_stem),
    ),
    "branches": {name: by_member[name][1] for name in NAMES},
    "adapters": {name: by_member[name][2] for name in THIN},
  }
  expected = jax.tree.map(np.asarray, expected)
  actual_paths, expected_paths = common.paths(actual), common.paths(expected)
  assert actual_paths.keys() == expected_paths.keys()
  for path, value in expected_paths.items():
    np.testing.assert_allclose(
      actual_paths[path],
      value,
      rtol=0,
      atol=1e-4 * np.abs(value).max(),
      err_msg=path,
    )


def is_zero(tree):
  return not any(leaf.any() for leaf in jax.tree.leaves(tree))


def has_no_zero_leaf(tree):
  return all(leaf.any() for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("base_gradients", ["all", "first"])
def test_features_do_not_train_the_full_network(base_gradients):
  found = gradients(base_gradients, feature_weight=1.0)
  assert is_zero(found["branches"]["student_0"])
  # The features of thin members are compared before their head.
  for name in THIN:
    branch = dict(found["branches"][name])
    assert is_zero(branch.pop("head"))
    assert has_no_zero_leaf(branch)
  assert has_no_zero_leaf(found["adapters"])


@pytest.mark.parametrize("term", ["label_weight", "distill_weight"])
def test_only_features_train_the_adapters(term):
  found = gradients(**{term: 1.0})
  assert is_zero(found["adapters"])
  for name in NAMES:
    assert has_no_zero_leaf(found["branches"][name])


def test_first_trains_the_stem_with_the_full_network_only():
  assert is_zero(gradients("first", feature_weight=1.0)["stem"])
  assert has_no_zero_leaf(gradients("all", feature_weight=1.0)["stem"])
  weights = {"label_weight": 0.7, "distill_weight": 0.15}
  by_all, by_first = gradients("all", **weights), gradients("first", **weights)
  # The branches do not notice.
  common.assert_close(by_first["branches"], by_all["branches"], 1e-5)
  differences = common.relative_differences(by_first["stem"], by_all["stem"])
  assert min(differences.values()) > 0.1


# --- one step ---------------------------------------------------------------


def test_a_step_moves_everything_by_the_recipe_adapters_at_half_the_rate():
  before = state()["params"]
  after = first(step()(state(), [batch(0)])[0])
  found = common.paths(after["opt_state"]["gradients"])
  after = common.paths(after["params"])
  for path, old in common.paths(before).items():
    # The first step of Nesterov momentum: (1 + momentum) gradients.
    rate = 0.05 * 1.9 * (0.5 if path.startswith("adapters/") else 1)
    expected = old - rate * (found[path] + 1e-2 * old)
    np.testing.assert_allclose(
      after[path], expected, rtol=1e-5, atol=1e-6, err_msg=path
    )
    assert np.abs(after[path] - old).max() > 1e-5, path


def test_weight_decay_shrinks_every_parameter():
  hyper = {**HYPER, **NO_TERMS, "momentum": 0.0, "weight_decay": 0.1}
  before = common.paths(state()["params"])
  after = first(step()(state(), [batch(0)], hyper)[0])
  assert is_zero(after["opt_state"]["gradients"])
  for path, new in common.paths(after["params"]).items():
    rate = 0.05 * (0.5 if path.startswith("adapters/") else 1)
    np.testing.assert_allclose(
      new, before[path] * (1 - rate * 0.1), rtol=1e-6, err_msg=path
    )


def test_a_step_updates_all_batch_statistics():
  before = common.paths(state()["batch_stats"])
  after = first(step()(state(), [batch(0)])[0])["batch_stats"]
  for path, new in common.paths(after).items():
    assert (new != before[path]).all(), path
  hidden = reference_layers.convolution(
    batch(0)["image"], state()["params"]["stem"]["conv"]["kernel"]
  )
  mean, var = reference_layers.moments(hidden)
  stem = after["stem"]["norm"]
  np.testing.assert_allclose(
    stem["mean"],
    reference_layers.running(before["stem/norm/mean"], mean),
    rtol=1e-4,
    atol=1e-6,
  )
  np.testing.assert_allclose(
    stem["var"],
    reference_layers.running(before["stem/norm/var"], var),
    rtol=1e-4,
  )


@pytest.mark.parametrize("formulation", formulations.NAMES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_step_keeps_shapes_and_types(dtype, formulation):
  common.assert_keeps_its_types(
    functools.partial(build, dtype=dtype, formulation=formulation)
  )


# --- the initial state ------------------------------------------------------


def test_adapters_exist_from_the_start_for_every_thin_member_and_block():
  adapters = common.state_shapes(build)["params"]["adapters"]
  shapes = {path: leaf.shape for path, leaf in common.paths(adapters).items()}
  expected = {}
  for name, channels in zip(THIN, [(8, 16, 32), (4, 8, 16)], strict=True):
    for block, c, full in zip(BLOCKS, channels, (16, 32, 64), strict=True):
      expected[f"{name}/{block}/kernel"] = (1, 1, c, full)
      expected[f"{name}/{block}/bias"] = (full,)
  assert shapes == expected


def test_the_state_does_not_depend_on_the_batch_size():
  by_one, by_eight = (
    jax.tree.map(
      lambda leaf: (leaf.shape, leaf.dtype), common.state_shapes(build, count)
    )
    for count in (1, 8)
  )
  assert by_one == by_eight


def test_init_draws_every_kernel_anew_and_only_by_its_key():
  """Equal parts of two members must not start as twins."""
  twins = common.members(0.125, 0.125)
  method = methods.ekd(common.family(), twins, common.optimizer(HYPER))
  # This generator compiles several times faster than the default one.
  rng = jax.random.key(3, impl="unsafe_rbg")
  init = jax.jit(method.init)
  drawn = jax.tree.map(np.asarray, init(rng, batch(0, 2)))
  kernels = {
    path: leaf
    for path, leaf in common.paths(drawn["params"]).items()
    if path.endswith("kernel") or "head" in path or "adapters" in path
  }
  assert len(kernels) == 1 + 2 * (6 + 3 + 2) + 6
  for path, leaf in kernels.items():
    assert np.isfinite(leaf).all() and leaf.any(), path
    for other, values in kernels.items():
      if other != path and values.shape == leaf.shape:
        assert (values != leaf).any(), (path, other)
  # Other images of this shape make no difference, another key does.
  again = init(rng, batch(1, 2))
  jax.tree.map(np.testing.assert_array_equal, drawn, again)
  other = init(jax.random.key(4, impl="unsafe_rbg"), batch(0, 2))
  for path, leaf in common.paths(other["params"]).items():
    assert path not in kernels or (leaf != kernels[path]).any(), path


# --- prediction -------------------------------------------------------------


@functools.cache
def predict():
  return jax.jit(build(HYPER).predict)


def network_variables(name):
  return {
    collection: {
      "stem": state()[collection]["stem"],
      "branch": state()[collection]["branches"][name],
    }
    for collection in ("params", "batch_stats")
  }


def test_predictions_are_those_of_numpy_with_running_statistics():
  images = batch(0)["image"]
  predictions = predict()(state(), images)
  assert list(predictions) == ["ensemble", *NAMES]
  expected = {
    name: reference_resnet.forward(
      **network_variables(name), images=images, train=False
    )[0]
    for name in NAMES
  }
  expected["ensemble"] = sum(expected.values()) / 3
  for name, logits in expected.items():
    np.testing.assert_allclose(
      predictions[name], logits, rtol=1e-3, atol=1e-4, err_msg=name
    )


def test_a_prediction_does_not_depend_on_the_other_images():
  images = batch(0)["image"]
  others = np.concatenate([images[:1], 10 * batch(1)["image"][1:]])
  alone, among = predict()(state(), images), predict()(state(), others)
  for name in alone:
    np.testing.assert_array_equal(alone[name][0], among[name][0])
    assert (alone[name][1:] != among[name][1:]).all()


@pytest.mark.parametrize("formulation", formulations.NAMES)
def test_students_are_networks_that_predict_the_same_alone(formulation):
  students = build(HYPER, formulation=formulation).students(state())
  assert list(students) == list(NAMES)
  images = batch(0)["image"]
  predictions = predict()(state(), images)
  for member in MEMBERS:
    module, variables = students[member.name]
    size = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    assert size == member.params
    outputs = jax.jit(module.apply)(variables, images)
    np.testing.assert_allclose(
      outputs.logits, predictions[member.name], rtol=1e-5, atol=1e-5
    )
    # Whatever trained them, users are given plain arrays.
    assert all(isinstance(maps, jax.Array) for maps in outputs.features)


# --- devices ----------------------------------------------------------------


def on_devices(num_devices, steps):
  return step(num_devices)(state(), [batch(seed) for seed in range(steps)])


@pytest.mark.parametrize("steps", [1, 5])
def test_four_devices_train_as_one_does(steps):
  common.assert_devices_agree(
    state(), on_devices(1, steps), on_devices(4, steps)
  )


# --- formulations -----------------------------------------------------------


def test_the_split_formulation_trains_on_four_devices_as_lax_on_one(smooth):
  """Compiled anew, for the activations: see the fixture."""

  def train(formulation, num_devices):
    run = common.compiled_step(
      functools.partial(build, formulation=formulation), num_devices
    )
    return run(state(), [batch(seed) for seed in range(3)])

  common.assert_formulations_agree(state(), train("lax", 1), train("split", 4))


def test_the_split_formulation_predicts_as_numpy_does():
  """In the layout that a run on a CPU evaluates in."""
  images = batch(0)["image"]
  method = build(HYPER, formulation="split")
  predictions = jax.jit(method.predict)(state(), images)
  for name in NAMES:
    logits, _ = reference_resnet.forward(
      **network_variables(name), images=images, train=False
    )
    np.testing.assert_allclose(
      predictions[name], logits, rtol=1e-3, atol=1e-4, err_msg=name
    )
