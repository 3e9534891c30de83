"""FFSD: every term, and that each trains the part that it is for."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ekd_jax import losses, methods
from ekd_jax.compression import members_of_widths
from ekd_jax.models import CifarResNet, Network
from ekd_jax.models.computation import Computation
from ekd_jax.models.fusion import Decoder, Fusion, Spread
from ekd_jax.models.googlenet import GoogLeNet
from ekd_jax.models.plain_densenet import PlainDenseNet
from ekd_jax.models.wide_resnet import WideResNet
from tests.methods import common
from tests.methods.common import HYPER, batch, first, run_alone
from tests.reference import losses as reference

LEADER, COMMON = "student_0", ("common_0", "common_1")
NETWORKS = (LEADER, *COMMON)
MEMBERS = common.members(1.0)
WEIGHTS = {"diversity": 1e-2, "fusion": 10.0, "decoder": 100.0}


def build(
  hyper, members=MEMBERS, formulation="lax", accumulate=1, dtype=jnp.float32
):
  return methods.ffsd(
    common.family(dtype=dtype, formulation=formulation),
    members,
    common.optimizer(hyper),
    compute=Computation(
      axis_name=methods.AXIS_NAME, dtype=dtype, formulation=formulation
    ),
    num_classes=common.CLASSES,
    temperature=hyper["temperature"],
    diversity_weight=WEIGHTS["diversity"],
    fusion_weight=WEIGHTS["fusion"],
    decoder_weight=WEIGHTS["decoder"],
    ramp=lambda step: hyper["distill_weight"] * (1 + step),
    accumulate=accumulate,
  )


@functools.cache
def state():
  return common.random_state(build)


@functools.cache
def step(num_devices=1):
  return common.compiled_step(build, num_devices)


# --- the parts, one by one --------------------------------------------------


def network(variables, name, *, train=True):
  family = common.family(axis_name=None)
  return run_alone(
    *(Network(family.stem(), family.branch(1.0)), variables),
    *(f"networks/{name}", batch(0)["image"]),
    train=train,
  )[0]


def fusion(variables, maps, *, train=True):
  module = Fusion(Computation(), 64, common.CLASSES)
  return run_alone(module, variables, f"fusion/{LEADER}", maps, train=train)[0]


def spread(variables, maps):
  module = Spread(Computation(), 128)
  return run_alone(module, variables, f"spread/{LEADER}", maps)[0]


def decoder(variables, name, maps, *, train):
  module = Decoder(Computation(), (16, 32))
  return run_alone(module, variables, f"decoders/{name}", maps, train=train)[0]


@functools.cache
def found():
  """What every part computes of the first batch, as numbers."""

  @jax.jit
  def run(variables):
    outputs = {name: network(variables, name) for name in NETWORKS}
    together = [outputs[name].features[-1] for name in COMMON]
    fused = fusion(variables, together)
    shifted = losses.shifted_features(together[0])
    return {
      "outputs": outputs,
      "together": together,
      "fused": fused,
      "spread": spread(variables, outputs[LEADER].features[-1]),
      "of_shifted": decoder(variables, "common_1", shifted, train=False),
      "of_fused": decoder(variables, LEADER, fused.features[0], train=False),
      "back": {
        name: decoder(variables, name, outputs[name].features[-1], train=True)
        for name in ("common_1", LEADER)
      },
    }

  return jax.tree.map(np.asarray, run(state()))


def attention(mine, theirs):
  """The sum over pairs of maps of the mean over the batch."""
  return sum(
    reference.attention_loss(s, t).mean()
    for s, t in zip(mine, theirs, strict=True)
  )


def test_metrics_are_the_terms_that_numpy_finds():
  metrics = first(step()(state(), [batch(0)])[1])
  metrics = common.terms_of(metrics, NETWORKS)
  labels, all_of = batch(0)["label"], found()
  outputs, fused = all_of["outputs"], all_of["fused"]
  logits = {name: outputs[name].logits for name in NETWORKS}
  first_maps, second_maps = (outputs[name].features for name in COMMON)

  def cross_entropy(z):
    return reference.cross_entropy(z, labels).mean()

  def distill(student, teacher):
    return reference.distillation_loss(student, teacher, 2.0).mean()

  def both(name):
    back, maps = all_of["back"][name], outputs[name].features[:-1]
    raw = sum(
      reference.normalized_feature_loss(s, t).mean()
      for s, t in zip(back, maps, strict=True)
    )
    return raw + attention(back, maps)

  mean = (logits["common_0"] + logits["common_1"]) / 2
  leader = outputs[LEADER].features
  ramp = 0.15
  terms = {
    "label/common_0": (1, cross_entropy(logits["common_0"])),
    "label/common_1": (1, cross_entropy(logits["common_1"])),
    "mutual/common_0": (1, distill(logits["common_0"], logits["common_1"])),
    "mutual/common_1": (1, distill(logits["common_1"], logits["common_0"])),
    "diversity/common_1": (
      1e-2 * ramp,
      reference.diversity_loss(second_maps[-1], first_maps[-1]).mean(),
    ),
    "self_distill/common_1": (
      1e-2 * ramp,
      attention(second_maps[:-1], all_of["of_shifted"]),
    ),
    "fused_label/student_0": (1, cross_entropy(fused.logits)),
    "fused_distill/student_0": (1, distill(fused.logits, mean)),
    "label/student_0": (1, cross_entropy(logits[LEADER])),
    "distill/student_0": (1, distill(logits[LEADER], fused.logits)),
    "fused_maps/student_0": (
      10 * ramp,
      attention(leader[-1:], fused.features),
    ),
    "all_maps/student_0": (
      10 * ramp,
      attention([all_of["spread"]], [np.concatenate(all_of["together"], 3)]),
    ),
    "self_distill/student_0": (
      10 * ramp,
      attention(leader[:-1], all_of["of_fused"]),
    ),
    "decoder/common_1": (100 * ramp, both("common_1")),
    "decoder/student_0": (100 * ramp, both(LEADER)),
  }
  expected = {name: term for name, (_, term) in terms.items()}
  expected["loss"] = sum(weight * term for weight, term in terms.values())
  expected["label/ensemble"] = cross_entropy(fused.logits)
  expected["top1/ensemble"] = common.top1(fused.logits, labels)
  for name in NETWORKS:
    expected[f"top1/{name}"] = common.top1(logits[name], labels)
  assert metrics.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_allclose(metrics[name], value, rtol=2e-3, err_msg=name)


# --- who is trained by what -------------------------------------------------


def _label(logits):
  return optax.losses.softmax_cross_entropy_with_integer_labels(
    logits, batch(0)["label"]
  ).mean()


def _distill(student, teacher):
  return losses.distillation_loss(student, teacher, temperature=2.0).mean()


def _attention(mine, theirs):
  pairs = zip(mine, theirs, strict=True)
  return sum(losses.attention_loss(s, t).mean() for s, t in pairs)


def _loss_of_common_0(variables):
  own = network(variables, "common_0")
  peer = found()["outputs"]["common_1"].logits
  return _label(own.logits) + _distill(own.logits, peer)


def _loss_of_common_1(variables):
  own = network(variables, "common_1")
  peer = found()["outputs"]["common_0"]
  apart = losses.diversity_loss(own.features[-1], peer.features[-1]).mean()
  apart += _attention(own.features[:-1], found()["of_shifted"])
  return (
    _label(own.logits) + _distill(own.logits, peer.logits) + 1e-2 * 0.15 * apart
  )


def _loss_of_leader(variables):
  own = network(variables, LEADER)
  fused = found()["fused"]
  maps = _attention(own.features[-1:], fused.features)
  maps += _attention(
    [spread(variables, own.features[-1])],
    [np.concatenate(found()["together"], 3)],
  )
  maps += _attention(own.features[:-1], found()["of_fused"])
  return (
    _label(own.logits) + _distill(own.logits, fused.logits) + 10 * 0.15 * maps
  )


def _loss_of_fusion(variables):
  own = fusion(variables, found()["together"])
  outputs = found()["outputs"]
  mean = (outputs["common_0"].logits + outputs["common_1"].logits) / 2
  return _label(own.logits) + _distill(own.logits, mean)


def _loss_of_decoder(name):
  def loss(variables):
    maps = found()["outputs"][name].features
    back = decoder(variables, name, maps[-1], train=True)
    raw = sum(
      losses.normalized_feature_loss(s, t).mean()
      for s, t in zip(back, maps[:-1], strict=True)
    )
    return 100 * 0.15 * (raw + _attention(back, maps[:-1]))

  return loss


@pytest.mark.parametrize(
  ("parts", "loss"),
  [
    (["networks/common_0"], _loss_of_common_0),
    (["networks/common_1"], _loss_of_common_1),
    ([f"networks/{LEADER}", f"spread/{LEADER}"], _loss_of_leader),
    ([f"fusion/{LEADER}"], _loss_of_fusion),
    (["decoders/common_1"], _loss_of_decoder("common_1")),
    ([f"decoders/{LEADER}"], _loss_of_decoder(LEADER)),
  ],
  ids=lambda x: x[0] if isinstance(x, list) else "",
)
def test_a_part_s_gradient_is_that_of_its_own_loss(parts, loss):
  """Everything that the loss does not train is a number in it."""
  found()
  expected = jax.jit(
    jax.grad(lambda params: loss({**state(), "params": params}))
  )(state()["params"])
  gradients = first(step()(state(), [batch(0)])[0])["opt_state"]["gradients"]
  for part in parts:
    kind, name = part.split("/")
    common.assert_close(gradients[kind][name], expected[kind][name], 5e-4)


# --- what comes out ---------------------------------------------------------


def test_predictions_and_students():
  method = build(HYPER)
  images = batch(0)["image"]
  predictions = jax.jit(method.predict)(state(), images)
  names = common.names_of_predictions(method, state())
  assert names == ["ensemble", *NETWORKS]
  assert predictions.keys() == set(names)

  @jax.jit
  def run(variables):
    outputs = {n: network(variables, n, train=False) for n in NETWORKS}
    together = [outputs[name].features[-1] for name in COMMON]
    fused = fusion(variables, together, train=False)
    return {
      "ensemble": fused.logits,
      **{name: output.logits for name, output in outputs.items()},
    }

  for name, logits in run(state()).items():
    np.testing.assert_allclose(
      predictions[name], logits, rtol=1e-5, atol=1e-5, err_msg=name
    )
  ((name, (module, variables)),) = method.students(state()).items()
  assert name == LEADER
  size = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
  assert size == MEMBERS[0].params
  alone = jax.jit(module.apply)(variables, images).logits
  np.testing.assert_allclose(alone, predictions[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
  ("family", "student", "leader", "fused", "decoded"),
  [
    (CifarResNet(20, 100), 278324, 287476, 16228, 23136),
    (CifarResNet(32, 100), 472756, 481908, 16228, 23136),
    (CifarResNet(56, 100), 861620, 870772, 16228, 23136),
    (WideResNet("16-2", 100), 704420, 739108, 48740, 92352),
    (WideResNet("40-2", 100), 2258084, 2292772, 48740, 92352),
    (PlainDenseNet(12, 40, 100), 1100428, 1523140, 472516, 1753152),
    (GoogLeNet(100), 6258500, 8371012, 2224228, 11264576),
  ],
  ids=lambda x: getattr(x, "name", ""),
)
def test_parts_are_as_large_as_published(
  family, student, leader, fused, decoded
):
  method = methods.ffsd(
    family,
    members_of_widths((1.0,), family.cost),
    optax.identity(),
    compute=Computation(),
    num_classes=100,
  )
  image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
  params = jax.eval_shape(method.init, jax.random.key(0), {"image": image})[
    "params"
  ]

  def count(*trees):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(trees))

  networks = params["networks"]
  assert count(networks["common_0"]) == count(networks["common_1"]) == student
  assert count(networks[LEADER], params["spread"]) == leader
  assert count(params["fusion"]) == fused
  assert list(params["decoders"]) == ["common_1", LEADER]
  assert {count(one) for one in params["decoders"].values()} == {decoded}


def test_thinner_leaders_have_modules_of_their_own():
  own = functools.partial(build, members=common.members(1.0, 0.5))
  common.assert_keeps_its_types(own)
  params = common.state_shapes(own)["params"]
  heads = [one["head"]["kernel"].shape[0] for one in params["fusion"].values()]
  assert heads == [64, 32]
  widest = [one["conv_1"]["kernel"].shape for one in params["spread"].values()]
  assert widest == [(1, 1, 64, 128), (1, 1, 32, 128)]
  names = common.names_of_predictions(own(HYPER), common.state_shapes(own))
  assert names == [
    *("ensemble", "student_0", "student_1", *COMMON),
    "ensemble_of_student_1",
  ]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_step_keeps_shapes_and_types(dtype):
  common.assert_keeps_its_types(functools.partial(build, dtype=dtype))


def test_four_devices_train_as_one_does():
  batches = [batch(seed) for seed in range(3)]
  common.assert_devices_agree(
    state(), step(1)(state(), batches), step(4)(state(), batches)
  )


def test_two_micro_batches_are_a_step():
  halves = [
    {name: part[rows] for name, part in batch(0).items()}
    for rows in (slice(4), slice(4, 8))
  ]
  run = common.compiled_step(functools.partial(build, accumulate=2), 1)
  whole = first(run(state(), [batch(0)])[1])
  both = [first(step()(state(), [half])[1]) for half in halves]
  # Decoders are used with running statistics, which the first half has moved.
  for name in ("label/student_0", "decoder/student_0", "mutual/common_1"):
    np.testing.assert_allclose(
      whole[name], np.mean([one[name] for one in both]), rtol=1e-5
    )


def test_both_formulations_train_alike(smooth):
  by_lax, by_split = (
    common.compiled_step(functools.partial(build, formulation=form), 1)(
      state(), [batch(0)]
    )
    for form in ("lax", "split")
  )
  common.assert_formulations_agree(state(), by_lax, by_split)
