"""Solo: every member learns from the labels, as if it were alone."""

import functools

import jax
import numpy as np
import pytest

from ekd_jax import methods
from tests.methods import common, independent
from tests.methods.common import HYPER, batch, first
from tests.reference import layers as reference_layers
from tests.reference import losses as reference

NAMES = independent.NAMES[:2]
MEMBERS = independent.MEMBERS[:2]


def build(
  hyper, members=MEMBERS, axis_name=methods.AXIS_NAME, formulation="lax"
):
  return methods.solo(
    [common.family(axis_name, formulation=formulation)] * len(members),
    members,
    common.optimizer(hyper),
  )


@functools.cache
def state():
  return common.random_state(build)


@functools.cache
def step(num_devices=1, axis_name=methods.AXIS_NAME):
  """A compiled step, shared by the tests of this file."""
  return common.compiled_step(
    functools.partial(build, axis_name=axis_name), num_devices
  )


def batches(count):
  return [batch(seed) for seed in range(count)]


def test_metrics_are_the_cross_entropies_that_numpy_finds():
  metrics = common.terms_of(first(step()(state(), [batch(0)])[1]), NAMES)
  labels = batch(0)["label"]
  logits = independent.reference_logits(state(), batch(0)["image"], train=True)
  ensemble = sum(logits.values()) / 2
  expected = {
    "label/ensemble": reference.cross_entropy(ensemble, labels).mean(),
    "top1/ensemble": common.top1(ensemble, labels),
  }
  for name in NAMES:
    cross_entropy = reference.cross_entropy(logits[name], labels)
    expected[f"label/{name}"] = cross_entropy.mean()
    expected[f"top1/{name}"] = common.top1(logits[name], labels)
  expected["loss"] = sum(expected[f"label/{name}"] for name in NAMES)
  assert metrics.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_allclose(metrics[name], value, rtol=1e-3, err_msg=name)
  assert len({float(metrics[f"top1/{name}"]) for name in NAMES}) > 1


def test_gradients_are_those_of_each_member_s_cross_entropy():
  logits = independent.reference_logits(state(), batch(0)["image"], train=True)
  onehot = np.eye(common.CLASSES)[batch(0)["label"]]
  by_logits = [
    (reference.softmax(logits[name]) - onehot) / common.BATCH for name in NAMES
  ]
  after = first(step()(state(), [batch(0)])[0])
  independent.assert_gradients_are_pulled_back(
    state(), after["opt_state"]["gradients"], by_logits
  )


def test_members_do_not_notice_each_other():
  """Bit for bit: the program is the same, only another member differs."""
  before = independent.with_another(state(), "student_0")
  one, _ = step()(state(), batches(3))
  other, _ = step()(before, batches(3))
  for collection in ("params", "batch_stats"):
    for name in NAMES[1:]:
      jax.tree.map(
        np.testing.assert_array_equal,
        one[collection][name],
        other[collection][name],
      )
    changed = [
      (a != b).any()
      for a, b in zip(
        jax.tree.leaves(one[collection]["student_0"]),
        jax.tree.leaves(other[collection]["student_0"]),
        strict=True,
      )
    ]
    assert all(changed)


def test_a_member_trains_as_it_does_in_a_run_of_its_own():
  def build_one(hyper):
    return build(hyper, MEMBERS[1:2])

  own = common.random_state(build_one)
  for collection in ("params", "batch_stats"):
    own[collection] = {"student_1": state()[collection]["student_1"]}
  alone = first(common.compiled_step(build_one, 1)(own, batches(3))[0])
  together = first(step()(state(), batches(3))[0])
  for collection in ("params", "batch_stats"):
    alone_now = alone[collection]["student_1"]
    moved = jax.tree.map(
      np.subtract, alone_now, state()[collection]["student_1"]
    )
    common.assert_close(
      together[collection]["student_1"],
      alone_now,
      common.DEVICE_TOLERANCE,
      scale=moved,
    )


def test_a_step_moves_everything_by_the_recipe():
  independent.assert_moves_everything(state(), step()(state(), [batch(0)])[0])


def test_predictions_and_students_are_those_of_numpy():
  independent.assert_predicts_as_numpy(build(HYPER), MEMBERS, state())


def test_a_step_keeps_shapes_and_types():
  common.assert_keeps_its_types(build)


def test_every_member_starts_with_a_stem_of_its_own():
  shapes = common.state_shapes(build)
  assert list(shapes["params"]) == list(NAMES)
  for collection in ("params", "batch_stats"):
    for variables in shapes[collection].values():
      assert set(variables) == {"stem", "branch"}


@pytest.mark.parametrize("steps", [1, 5])
def test_four_devices_train_as_one_does(steps):
  common.assert_devices_agree(
    state(),
    step(1)(state(), batches(steps)),
    step(4)(state(), batches(steps)),
  )


def test_the_split_formulation_trains_as_lax_does(smooth):
  """On one device each; for several, see test_ekd.py."""
  by_lax, by_split = (
    common.compiled_step(functools.partial(build, formulation=formulation), 1)(
      state(), batches(3)
    )
    for formulation in ("lax", "split")
  )
  common.assert_formulations_agree(state(), by_lax, by_split)


def test_local_batch_norm_differs_yet_all_devices_hold_one_state():
  local_state, metrics = step(4, None)(state(), batches(2))
  common.assert_same_on_all_devices((local_state, metrics))
  one, _ = step()(state(), batches(2))
  moved = jax.tree.map(np.subtract, first(one)["params"], state()["params"])
  differences = common.relative_differences(
    first(local_state)["params"], first(one)["params"], scale=moved
  )
  assert max(differences.values()) > 0.1


def test_local_running_statistics_are_the_mean_over_the_devices():
  local_state, _ = step(4, None)(state(), batches(1))
  for name in NAMES:
    kernel = state()["params"][name]["stem"]["conv"]["kernel"]
    hidden = reference_layers.convolution(batch(0)["image"], kernel)
    moments = [reference_layers.moments(h) for h in np.split(hidden, 4)]
    before = state()["batch_stats"][name]["stem"]["norm"]
    after = first(local_state)["batch_stats"][name]["stem"]["norm"]
    for i, statistic in enumerate(("mean", "var")):
      expected = np.mean(
        [reference_layers.running(before[statistic], m[i]) for m in moments], 0
      )
      np.testing.assert_allclose(
        after[statistic], expected, rtol=1e-5, atol=1e-6
      )
    # The variance between devices is lost, which is how this can be told.
    _, whole = reference_layers.moments(hidden)
    lost = reference_layers.running(before["var"], whole) / after["var"] - 1
    assert lost.max() > 1e-3
