"""PCL: peers, their ensemble, and the running means that are shipped."""

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
from ekd_jax.models.bottleneck_resnet import BottleneckResNet
from ekd_jax.models.densenet import DenseNet
from ekd_jax.models.vgg import VGG16
from tests.methods import common
from tests.methods.common import HYPER, first, run_alone
from tests.models.common import random_like
from tests.reference import losses as reference

NAMES = ("student_0", "student_1", "student_2")
MEMBERS = common.members(1.0, 1.0, 1.0)
VIEWS = 3


def build(hyper, views=VIEWS, members=MEMBERS, accumulate=1, dtype=jnp.float32):
  return methods.pcl(
    [common.family(dtype=dtype)] * len(members),
    members,
    common.optimizer(hyper),
    num_classes=common.CLASSES,
    temperature=hyper["temperature"],
    ramp=lambda step: hyper["distill_weight"] * (1 + step),
    views=views,
    accumulate=accumulate,
  )


def batch(seed, count=common.BATCH, views=VIEWS):
  """Every view is another noise."""
  own = common.batch(seed, count)
  rng = np.random.default_rng([7, seed])
  shape = (count, views, *common.IMAGE_SHAPE)
  return {**own, "image": rng.normal(size=shape).astype(np.float32)}


@functools.cache
def state():
  shapes = jax.eval_shape(build(HYPER).init, jax.random.key(0), batch(0))
  rest = {k: v for k, v in shapes.items() if k != "opt_state"}
  zeros = jax.tree.map(
    lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes["opt_state"]
  )
  return {**random_like(rest, 0), "opt_state": zeros}


@functools.cache
def step(num_devices=1):
  return common.compiled_step(build, num_devices)


def pooled(outputs):
  return jnp.concatenate([o.features[-1].mean((1, 2)) for o in outputs], -1)


def forward(variables, views, *, train=True):
  """Outputs of the peers, module by module, and all statistics afterwards."""
  family = common.family(axis_name=None)
  outputs, uppers = [], {}
  stats = variables["batch_stats"]["networks"]
  lower = stats["lower"]
  for index, name in enumerate(NAMES):
    passed = {
      "params": variables["params"],
      "batch_stats": {"networks": {**stats, "lower": lower}},
    }
    hidden, lower = run_alone(
      *(family.lower(1.0), passed, "networks/lower"),
      views[:, index] if views.ndim == 5 else views,
      train=train,
    )
    output, uppers[name] = run_alone(
      *(family.upper(1.0), variables, f"networks/upper/{name}", hidden),
      train=train,
    )
    outputs.append(output)
  return outputs, {"lower": lower, "upper": uppers}


def mean_teacher_of(state):
  """The variables of the mean teachers, as if they were the peers'."""
  return {
    "params": {"networks": state["mean_teacher"]},
    "batch_stats": {"networks": state["batch_stats"]["mean_teacher"]},
  }


def classify(params, outputs):
  head = params["head"]
  return pooled(outputs) @ head["kernel"] + head["bias"]


@functools.cache
def before():
  """What peers, ensemble and mean teachers say of the first batch."""

  @jax.jit
  def run(state, views):
    outputs, stats = forward(state, views)
    teachers, teacher_stats = forward(mean_teacher_of(state), views)
    return (
      [o.logits for o in outputs],
      classify(state["params"], outputs),
      [o.logits for o in teachers],
      {"networks": stats, "mean_teacher": teacher_stats},
    )

  return jax.tree.map(np.asarray, run(state(), batch(0)["image"]))


def test_metrics_are_the_terms_that_numpy_finds():
  metrics = first(step()(state(), [batch(0)])[1])
  found = common.terms_of(metrics, ["lower", *NAMES, "ensemble"])
  logits, ensemble, teachers, _ = before()
  labels = batch(0)["label"]
  loss, terms = reference.pcl_loss(
    logits, ensemble, teachers, labels, 2.0, 0.15
  )
  expected = {
    "loss": loss,
    "label/ensemble": terms["ensemble_label"],
    "top1/ensemble": common.top1(ensemble, labels),
  }
  for i, name in enumerate(NAMES):
    expected[f"label/{name}"] = terms["label"][i]
    expected[f"distill/{name}"] = terms["ensemble"][i]
    expected[f"mean_teacher/{name}"] = terms["mean_teacher"][i]
    expected[f"top1/{name}"] = common.top1(logits[i], labels)
  assert found.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_allclose(found[name], value, rtol=1e-3, err_msg=name)


def test_statistics_move_once_for_each_view_and_are_each_one_s_own():
  after = first(step()(state(), [batch(0)])[0])
  *_, expected = before()
  common.assert_close(after["batch_stats"], expected, 1e-4)


def test_gradients_are_those_of_the_loss_with_teachers_that_are_numbers():
  _, ensemble, teachers, _ = before()
  labels = batch(0)["label"]
  temperature, weight = 2.0, 0.15

  def towards(student, target):
    probabilities = reference.softmax(target / temperature).astype(np.float32)
    cross_entropy = -(
      probabilities * jax.nn.log_softmax(student / temperature)
    ).sum(-1)
    return temperature**2 * cross_entropy.mean()

  def label(logits):
    return optax.losses.softmax_cross_entropy_with_integer_labels(
      logits, labels
    ).mean()

  def loss(params):
    outputs, _ = forward({**state(), "params": params}, batch(0)["image"])
    total = label(classify(params, outputs))
    for i, output in enumerate(outputs):
      total += label(output.logits)
      total += weight * towards(output.logits, ensemble)
      for j, teacher in enumerate(teachers):
        if j != i:
          total += weight / 2 * towards(output.logits, teacher)
    return total

  expected = jax.jit(jax.grad(loss))(state()["params"])
  after = first(step()(state(), [batch(0)])[0])
  common.assert_close(after["opt_state"]["gradients"], expected, 2e-4)


def test_mean_teachers_follow_the_new_parameters():
  """The plain mean at first: the first step copies, the second halves."""
  batches = [batch(seed) for seed in range(3)]
  followed = [first(step()(state(), batches[: n + 1])[0]) for n in range(3)]
  news = [one["params"]["networks"] for one in followed]
  for one, count in zip(followed, (1, 2, 3), strict=True):
    mean = jax.tree.map(lambda *x: np.mean(x, axis=0), *news[:count])
    for (path, found), expected in zip(
      jax.tree_util.tree_leaves_with_path(one["mean_teacher"]),
      jax.tree.leaves(mean),
      strict=True,
    ):
      np.testing.assert_allclose(
        found, expected, rtol=1e-5, atol=1e-6, err_msg=f"{path}"
      )


def test_a_mean_teacher_keeps_what_was_published():
  """1 - 1 / (g + 1), then 0.999; so 1, 2 and 4 are 1, 1.5 and 2.333."""
  decays = {0: 0, 1: 0.5, 9: 0.9, 998: 0.998999, 999: 0.999, 5000: 0.999}
  for g, expected in decays.items():
    found = methods.mean_decay(jnp.int32(g), 0.999)
    assert float(found) == pytest.approx(expected, abs=6e-7)
  mean = 0.0
  for g, (value, expected) in enumerate([(1, 1), (2, 1.5), (4, 7 / 3)]):
    decay = float(methods.mean_decay(jnp.int32(g), 0.999))
    mean = decay * mean + (1 - decay) * value
    assert mean == pytest.approx(expected, rel=1e-6)


def test_predictions_and_students():
  method = build(HYPER)
  assert method.views == VIEWS
  images = common.batch(0)["image"]
  predictions = jax.jit(method.predict)(state(), images)
  names = ["ensemble", *NAMES, "peer_0", "peer_1", "peer_2"]
  assert common.names_of_predictions(method, state()) == names
  assert predictions.keys() == set(names)

  @jax.jit
  def expected(state):
    outputs, _ = forward(state, images, train=False)
    teachers, _ = forward(mean_teacher_of(state), images, train=False)
    return [
      classify(state["params"], outputs),
      *(o.logits for o in (*teachers, *outputs)),
    ]

  for name, logits in zip(names, expected(state()), strict=True):
    np.testing.assert_allclose(
      predictions[name], logits, rtol=1e-5, atol=1e-5, err_msg=name
    )
  students = method.students(state())
  assert list(students) == list(NAMES)
  for member in MEMBERS:
    module, variables = students[member.name]
    size = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    assert size == member.params
    alone = jax.jit(module.apply)(variables, images).logits
    np.testing.assert_allclose(
      alone, predictions[member.name], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
  ("family", "together"),
  [
    (CifarResNet(32, 100), 1212384),
    (BottleneckResNet("110", 100), 3038944),
    (BottleneckResNet("wide20-8", 100), 17431008),
    (VGG16(100), 30771664),
    (DenseNet(12, 40, 100, final_norm=False), 371488),
  ],
  ids=lambda x: getattr(x, "name", ""),
)
def test_three_peers_and_the_head_are_as_large_as_published(family, together):
  method = methods.pcl(
    [family] * 3,
    members_of_widths((1.0,) * 3, family.cost),
    optax.identity(),
    num_classes=100,
  )
  image = jax.ShapeDtypeStruct((1, 3, 32, 32, 3), jnp.float32)
  shapes = jax.eval_shape(method.init, jax.random.key(0), {"image": image})
  params = jax.tree.leaves(shapes["params"])
  assert sum(math.prod(leaf.shape) for leaf in params) == together


@pytest.mark.parametrize("views", [1, 2])
def test_fewer_views_are_given_in_turn(views):
  method = build(HYPER, views=views)
  own = common.batch(0) if views == 1 else batch(0, views=views)
  run = common.compiled_step(
    functools.partial(build, views=views), num_devices=1
  )
  found = first(run(state(), [own])[1])
  seen = [own["image"]] * 3
  if views == 2:
    seen = [own["image"][:, index] for index in (0, 1, 0)]
  assert method.views == views
  # Terms with labels tell who saw what.
  outputs, _ = jax.jit(forward)(state(), np.stack(seen, 1))
  for name, output in zip(NAMES, outputs, strict=True):
    expected = reference.cross_entropy(output.logits, own["label"]).mean()
    np.testing.assert_allclose(found[f"label/{name}"], expected, rtol=1e-3)


def test_networks_of_different_widths_have_a_wider_head():
  members = common.members(1.0, 0.5)
  method = build(HYPER, views=1, members=members)
  shapes = jax.eval_shape(method.init, jax.random.key(0), common.batch(0))
  assert shapes["params"]["head"]["kernel"].shape == (64 + 32, common.CLASSES)
  assert list(shapes["params"]["networks"]) == ["upper"]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_step_keeps_shapes_and_types(dtype):
  common.assert_keeps_its_types(functools.partial(build, dtype=dtype), batch(0))


def test_four_devices_train_as_one_does():
  batches = [batch(seed) for seed in range(3)]
  one, four = (step(count)(state(), batches) for count in (1, 4))
  common.assert_devices_agree(state(), one, four)
  common.assert_close(
    first(four[0])["mean_teacher"], first(one[0])["mean_teacher"], 1e-5
  )


def test_two_micro_batches_are_a_step():
  halves = [
    {name: part[rows] for name, part in batch(0).items()}
    for rows in (slice(4), slice(4, 8))
  ]
  run = common.compiled_step(functools.partial(build, accumulate=2), 1)
  whole = first(run(state(), [batch(0)])[1])["loss"]
  both = [first(step()(state(), [half])[1])["loss"] for half in halves]
  np.testing.assert_allclose(whole, np.mean(both), rtol=1e-5)
