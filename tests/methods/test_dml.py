"""DML: every member learns from the labels and from its peers."""

import functools

import jax
import numpy as np
import pytest

from ekd_jax import methods
from tests.methods import common, independent
from tests.methods.common import HYPER, batch, first
from tests.methods.independent import MEMBERS, NAMES
from tests.reference import losses as reference


def build(hyper, members=MEMBERS):
  return methods.dml(
    [common.family()] * len(members),
    members,
    common.optimizer(hyper),
    temperature=hyper["temperature"],
  )


@functools.cache
def state():
  return common.random_state(build)


@functools.cache
def step(num_devices=1):
  """A compiled step, shared by the tests of this file."""
  return common.compiled_step(build, num_devices)


@functools.cache
def logits():
  """Every member's, of the first batch."""
  found = independent.reference_logits(state(), batch(0)["image"], train=True)
  return [found[name] for name in NAMES]


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_metrics_are_the_terms_that_numpy_finds(temperature):
  hyper = {**HYPER, "temperature": temperature}
  metrics = common.terms_of(first(step()(state(), [batch(0)], hyper)[1]), NAMES)
  labels = batch(0)["label"]
  mutual = reference.mutual_learning_loss(logits(), temperature)
  ensemble = sum(logits()) / 3
  expected = {
    "label/ensemble": reference.cross_entropy(ensemble, labels).mean(),
    "top1/ensemble": common.top1(ensemble, labels),
    "loss": 0.0,
  }
  for name, own, divergence in zip(NAMES, logits(), mutual, strict=True):
    expected[f"label/{name}"] = reference.cross_entropy(own, labels).mean()
    expected[f"mutual/{name}"] = divergence.mean()
    expected[f"top1/{name}"] = common.top1(own, labels)
    expected["loss"] += expected[f"label/{name}"] + divergence.mean()
  assert metrics.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_allclose(metrics[name], value, rtol=1e-3, err_msg=name)


def test_the_published_temperature_is_the_default():
  """It is one method with or without the argument."""
  optimizer = common.optimizer(HYPER)
  own = common.random_state(functools.partial(build, members=MEMBERS[1:]))
  jaxprs = [
    str(
      jax.make_jaxpr(
        lambda state, batch, method=method: method.train_step(
          state, batch, jax.random.key(0)
        ),
        axis_env=[(methods.AXIS_NAME, 1)],
      )(own, batch(0))
    )
    for method in (
      methods.dml([common.family()] * 2, MEMBERS[1:], optimizer),
      methods.dml(
        [common.family()] * 2, MEMBERS[1:], optimizer, temperature=1.0
      ),
      methods.dml(
        [common.family()] * 2, MEMBERS[1:], optimizer, temperature=2.0
      ),
    )
  ]
  assert jaxprs[0] == jaxprs[1] != jaxprs[2]


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_a_member_s_loss_does_not_reach_its_peers(temperature):
  """Peers are constants on paper: T / (S - 1) sum_j (q_i - p_j) is all."""
  hyper = {**HYPER, "temperature": temperature}
  onehot = np.eye(common.CLASSES)[batch(0)["label"]]
  by_logits = []
  for i, own in enumerate(logits()):
    from_peers = [
      reference.distillation_student_gradient(own, peer, temperature)
      for j, peer in enumerate(logits())
      if j != i
    ]
    by_label = reference.softmax(own) - onehot
    by_logits.append((by_label + sum(from_peers) / 2) / common.BATCH)
  after = first(step()(state(), [batch(0)], hyper)[0])
  independent.assert_gradients_are_pulled_back(
    state(), after["opt_state"]["gradients"], by_logits
  )


def test_members_learn_from_each_other():
  before = independent.with_another(state(), "student_0")
  found, others = (
    first(step()(own, [batch(0)])[0])["opt_state"]["gradients"]
    for own in (state(), before)
  )
  for name in NAMES[1:]:
    differences = common.relative_differences(others[name], found[name])
    assert min(differences.values()) > 1e-3


def test_a_step_moves_everything_by_the_recipe():
  independent.assert_moves_everything(state(), step()(state(), [batch(0)])[0])


def test_predictions_and_students_are_those_of_numpy():
  independent.assert_predicts_as_numpy(build(HYPER), MEMBERS, state())


def test_a_step_keeps_shapes_and_types():
  common.assert_keeps_its_types(build)


@pytest.mark.parametrize("steps", [1, 5])
def test_four_devices_train_as_one_does(steps):
  batches = [batch(seed) for seed in range(steps)]
  common.assert_devices_agree(
    state(), step(1)(state(), batches), step(4)(state(), batches)
  )
