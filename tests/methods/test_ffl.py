"""FFL: fused classifier and sub-networks, their losses and their gradients."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ekd_jax import methods
from ekd_jax.compression import members_of_widths
from ekd_jax.models import CifarResNet
from ekd_jax.models.computation import Computation
from ekd_jax.models.fusion import Fusion
from tests.methods import common
from tests.methods.common import HYPER, batch, first, run_alone
from tests.reference import losses as reference

NAMES = ("student_0", "student_1")
EQUAL = common.members(1.0, 1.0)
# For other depths see test_configured.py.
OTHERS = common.members(1.0, 0.5)


def build(
  hyper, members=EQUAL, formulation="lax", accumulate=1, dtype=jnp.float32
):
  family = common.family(dtype=dtype, formulation=formulation)
  return methods.ffl(
    [family] * len(members),
    members,
    common.optimizer(hyper),
    compute=Computation(
      axis_name=methods.AXIS_NAME, dtype=dtype, formulation=formulation
    ),
    num_classes=common.CLASSES,
    temperature=hyper["temperature"],
    ramp=lambda step: hyper["distill_weight"] * (1 + step),
    accumulate=accumulate,
  )


@functools.cache
def state():
  return common.random_state(build)


@functools.cache
def step(num_devices=1, formulation="lax", accumulate=1):
  return common.compiled_step(
    functools.partial(build, formulation=formulation, accumulate=accumulate),
    num_devices,
  )


def forward(variables, *, train=True):
  """(logits of the two, fused logits), module by module."""
  family = common.family(axis_name=None)
  images = batch(0)["image"]
  hidden, _ = run_alone(
    family.lower(1.0), variables, "networks/lower", images, train=train
  )
  outputs = [
    run_alone(
      family.upper(1.0),
      variables,
      f"networks/upper/{name}",
      hidden,
      train=train,
    )[0]
    for name in NAMES
  ]
  fused, _ = run_alone(
    Fusion(Computation(), 64, common.CLASSES),
    variables,
    "fusion",
    [one.features[-1] for one in outputs],
    train=train,
  )
  return [one.logits for one in outputs], fused.logits


@functools.cache
def outputs():
  return jax.tree.map(np.asarray, jax.jit(forward)(state()))


@pytest.mark.parametrize("done", [0, 2])
def test_metrics_are_the_terms_that_numpy_finds(done):
  before = {**state(), "step": np.int32(done)}
  after, metrics = map(first, step()(before, [batch(0)]))
  assert after["step"] == done + 1
  found = common.terms_of(metrics, ["lower", *NAMES, "ensemble"])
  logits, fused = outputs()
  labels = batch(0)["label"]
  loss, terms = reference.ffl_loss(
    logits, fused, labels, 2.0, 0.15 * (1 + done)
  )
  expected = {
    "loss": loss,
    "label/ensemble": terms["fused_label"],
    "distill/ensemble": terms["fused_distill"],
    "top1/ensemble": common.top1(fused, labels),
  }
  for i, name in enumerate(NAMES):
    expected[f"label/{name}"] = terms["label"][i]
    expected[f"distill/{name}"] = terms["distill"][i]
    expected[f"top1/{name}"] = common.top1(logits[i], labels)
  assert found.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_allclose(found[name], value, rtol=1e-3, err_msg=name)


@pytest.mark.parametrize("weight", [0.0, 0.7])
def test_gradients_reach_through_the_module_and_not_into_targets(weight):
  """Those of the loss written out, with targets that are numbers."""
  logits, fused = outputs()
  labels = batch(0)["label"]
  temperature = 2.0

  def towards(student, target):
    probabilities = reference.softmax(target / temperature).astype(np.float32)
    cross_entropy = -(
      probabilities * jax.nn.log_softmax(student / temperature)
    ).sum(-1)
    return temperature**2 * cross_entropy.mean()

  def loss(params):
    own, own_fused = forward({**state(), "params": params})
    total = 0.0
    for each, target in [
      *((z, fused) for z in own),
      (own_fused, sum(logits) / 2),
    ]:
      total += optax.losses.softmax_cross_entropy_with_integer_labels(
        each, labels
      ).mean()
      total += weight * towards(each, target)
    return total

  expected = jax.jit(jax.grad(loss))(state()["params"])
  hyper = {**HYPER, "distill_weight": weight}
  after = first(step()(state(), [batch(0)], hyper)[0])
  common.assert_close(after["opt_state"]["gradients"], expected, 1e-4)
  # With labels only, too, the module's loss reaches what is below it.
  alone = jax.jit(
    jax.grad(
      lambda params: sum(
        optax.losses.softmax_cross_entropy_with_integer_labels(z, labels).mean()
        for z in forward({**state(), "params": params})[0]
      )
    )
  )(state()["params"])
  differences = common.relative_differences(
    alone["networks"], expected["networks"]
  )
  assert max(differences.values()) > 1e-2


def test_predictions_and_students():
  method = build(HYPER)
  images = batch(0)["image"]
  predictions = jax.jit(method.predict)(state(), images)
  assert list(predictions) == ["ensemble", *NAMES]
  assert common.names_of_predictions(method, state()) == list(predictions)
  logits, fused = jax.jit(lambda v: forward(v, train=False))(state())
  for name, expected in zip(predictions, [fused, *logits], strict=True):
    np.testing.assert_allclose(
      predictions[name], expected, rtol=1e-5, atol=1e-5
    )
  students = method.students(state())
  assert list(students) == list(NAMES)
  for member in EQUAL:
    module, variables = students[member.name]
    size = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    assert size == member.params
    alone = jax.jit(module.apply)(variables, images).logits
    np.testing.assert_allclose(
      alone, predictions[member.name], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
  ("depth", "networks"),
  [(20, 490520), (32, 832920), (44, 1175320), (56, 1517720), (110, 3058520)],
)
def test_two_branches_and_the_module_are_as_large_as_published(depth, networks):
  family = CifarResNet(depth, 100)
  method = methods.ffl(
    [family] * 2,
    members_of_widths((1.0, 1.0), family.cost),
    optax.identity(),
    compute=Computation(),
    num_classes=100,
  )
  shapes = jax.eval_shape(
    method.init,
    jax.random.key(0),
    {"image": jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)},
  )["params"]

  def count(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))

  assert count(shapes["networks"]) == networks
  assert count(shapes["fusion"]) == 16228


def test_different_networks_share_nothing():
  method = build(HYPER, OTHERS)
  shapes = common.state_shapes(functools.partial(build, members=OTHERS))
  assert list(shapes["params"]["networks"]) == ["upper"]
  common.assert_keeps_its_types(functools.partial(build, members=OTHERS))
  own = common.random_state(functools.partial(build, members=OTHERS))
  for member in OTHERS:
    _, variables = method.students(own)[member.name]
    size = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    assert size == member.params


def test_members_start_differently():
  drawn = jax.jit(build(HYPER).init)(jax.random.key(0), batch(0))
  upper = drawn["params"]["networks"]["upper"]
  for a, b in zip(*(jax.tree.leaves(upper[n]) for n in NAMES), strict=True):
    if a.ndim > 1:
      assert (np.asarray(a) != np.asarray(b)).any()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_step_keeps_shapes_and_types(dtype):
  common.assert_keeps_its_types(functools.partial(build, dtype=dtype))


def test_four_devices_train_as_one_does():
  batches = [batch(seed) for seed in range(3)]
  common.assert_devices_agree(
    state(), step(1)(state(), batches), step(4)(state(), batches)
  )


def test_two_micro_batches_are_a_step():
  """Of each half, with its own statistics: the means of their metrics."""
  halves = [
    {name: part[rows] for name, part in batch(0).items()}
    for rows in (slice(4), slice(4, 8))
  ]
  _, whole = step(accumulate=2)(state(), [batch(0)])
  both = [first(step()(state(), [half])[1])["loss"] for half in halves]
  np.testing.assert_allclose(first(whole)["loss"], np.mean(both), rtol=1e-5)


def test_both_formulations_train_alike(smooth):
  by_lax, by_split = (
    common.compiled_step(functools.partial(build, formulation=form), 1)(
      state(), [batch(0)]
    )
    for form in ("lax", "split")
  )
  common.assert_formulations_agree(state(), by_lax, by_split)
