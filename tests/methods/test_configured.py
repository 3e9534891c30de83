"""FFL, PCL and FFSD from their options to the next state, in NumPy.

Networks of different depths and widths side by side, more of each kind than is
published, all weights set: two steps, at the end of one epoch and at the start
of the next.
"""

import functools
from typing import NamedTuple

import jax
import numpy as np
import pytest

from ekd_jax import build
from ekd_jax import config as configs
from ekd_jax.config import Config
from tests.methods import common
from tests.methods.common import first, paths
from tests.models.common import random_like
from tests.reference import fusion as reference_fusion
from tests.reference import losses as reference
from tests.reference import resnet as reference_resnet
from tests.reference.optimizers import TorchAdam, TorchSGD

STEPS_PER_EPOCH = 2
EPOCHS = 10
FIRST_STEP = 1
COMMON = {
  "dataset": "digits",
  "depth": 8,
  "epochs": EPOCHS,
  "conv": "lax",
  "learning_rate": 0.05,
  "weight_decay": 1e-2,
  "run_dir": "run",
}
OPTIONS = {
  "ffl": {
    "partners": "resnet:14,resnet:8",
    "temperature": 2.5,
    "ramp_up_epochs": 2,
    "fusion_weight_decay": 0.1,
  },
  "pcl": {
    "widths": (1.0, 0.5, 0.25),
    "views": 2,
    "temperature": 1.5,
    "ramp_up_epochs": 5,
    "ramp_up": "as_coded",
    "mean_teacher_decay": 0.6,
  },
  "ffsd": {
    "widths": (1.0, 0.5),
    "common_students": 3,
    "temperature": 1.5,
    "ramp_up_epochs": 5,
    "diversity": "normalized",
    "diversity_weight": 2.0,
    "fusion_weight": 30.0,
    "decoder_weight": 70.0,
    "fusion_weight_decay": 0.1,
    "decoder_learning_rate": 2e-3,
  },
}
# In the first and the second epoch: half of 80 epochs is half of 2, and 0.4076
# is 10 times FFSD's.
RAMPS = {
  "ffl": (0.006738, 0.286505),
  "pcl": (0.006738, 1.0),
  "ffsd": (0.0407622, 0.1652989),
}
METHODS = tuple(OPTIONS)

MEMBERS = {
  "ffl": ("student_0", "student_1", "student_2"),
  "pcl": ("student_0", "student_1", "student_2"),
  "ffsd": ("student_0", "student_1"),
}
COMMON_STUDENTS = ("common_0", "common_1", "common_2")


class Step(NamedTuple):
  """One step: the states around it, the batch, and what was found."""

  before: dict
  batch: dict
  after: dict
  metrics: dict

  @property
  def gradients(self):
    return self.after["opt_state"]["gradients"]


def configured(name):
  """The method as a run has it; its optimizer also keeps the gradients."""
  config = configs.resolve(Config(method=name, **COMMON, **OPTIONS[name]))
  original = build.optimizer
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(
      build,
      "optimizer",
      lambda *what: common.keeping_gradients(original(*what)),
    )
    return build.method(config, STEPS_PER_EPOCH * EPOCHS)


def batch(name, seed):
  views = (2,) if name == "pcl" else ()
  rng = np.random.default_rng([11, seed])
  shape = (common.BATCH, *views, 8, 8, 1)
  return {
    "image": rng.normal(size=shape).astype(np.float32),
    "label": rng.integers(10, size=common.BATCH).astype(np.int32),
  }


@functools.cache
def steps(name):
  """The two steps."""
  method = configured(name)
  shapes = jax.eval_shape(method.init, jax.random.key(0), batch(name, 0))
  opt_state = shapes.pop("opt_state")
  state = {
    **random_like(shapes),
    "opt_state": jax.tree.map(
      lambda leaf: np.zeros(leaf.shape, leaf.dtype), opt_state
    ),
    "step": np.int32(FIRST_STEP),
  }
  run = common.compiled_step(lambda _: method, 1)
  found = []
  for seed in range(2):
    after, metrics = map(first, run(state, [batch(name, seed)], {}))
    found.append(Step(state, batch(name, seed), after, metrics))
    state = after
  return found


# --- the losses -------------------------------------------------------------


def forward(params, batch_stats, images):
  """Logits and compared maps of a whole network."""
  return reference_resnet.forward(params, batch_stats, images, train=True)


def label_metrics(logits, ensemble, labels):
  """What every method has of labels."""
  expected = {
    "label/ensemble": reference.cross_entropy(ensemble, labels).mean(),
    "top1/ensemble": common.top1(ensemble, labels),
  }
  for name, values in logits.items():
    expected[f"label/{name}"] = reference.cross_entropy(values, labels).mean()
    expected[f"top1/{name}"] = common.top1(values, labels)
  return expected


def ffl_metrics(step, ramp):
  params, batch_stats = (step.before[c] for c in ("params", "batch_stats"))
  images, labels = step.batch["image"], step.batch["label"]
  own, own_stats = (t["networks"]["upper"] for t in (params, batch_stats))
  outputs = {n: forward(own[n], own_stats[n], images) for n in MEMBERS["ffl"]}
  logits = {name: output[0] for name, output in outputs.items()}
  (fused, _), _ = reference_fusion.fusion(
    params["fusion"],
    batch_stats["fusion"],
    [features[-1] for _, features in outputs.values()],
    train=True,
  )
  loss, terms = reference.ffl_loss(
    list(logits.values()), fused, labels, 2.5, ramp
  )
  return {
    **label_metrics(logits, fused, labels),
    "loss": loss,
    "distill/ensemble": terms["fused_distill"],
    **{f"distill/{n}": terms["distill"][i] for i, n in enumerate(logits)},
  }


def pcl_metrics(step, ramp):
  params, batch_stats = (step.before[c] for c in ("params", "batch_stats"))
  labels = step.batch["label"]

  def run(own, own_stats):
    return [
      forward(own[name], own_stats[name], step.batch["image"][:, index % 2])
      for index, name in enumerate(MEMBERS["pcl"])
    ]

  outputs = run(params["networks"]["upper"], batch_stats["networks"]["upper"])
  teachers = run(
    step.before["mean_teacher"]["upper"], batch_stats["mean_teacher"]["upper"]
  )
  pooled = [features[-1].mean((1, 2)) for _, features in outputs]
  head = params["head"]
  ensemble = np.concatenate(pooled, 1) @ head["kernel"] + head["bias"]
  logits = dict(zip(MEMBERS["pcl"], (z for z, _ in outputs), strict=True))
  loss, terms = reference.pcl_loss(
    *(list(logits.values()), ensemble, [z for z, _ in teachers]),
    *(labels, 1.5, ramp),
  )
  expected = {**label_metrics(logits, ensemble, labels), "loss": loss}
  for i, name in enumerate(logits):
    expected[f"distill/{name}"] = terms["ensemble"][i]
    expected[f"mean_teacher/{name}"] = terms["mean_teacher"][i]
  return expected


def ffsd_parts(step):
  """What every part computes, and the statistics of the modules afterwards."""
  params, batch_stats = (step.before[c] for c in ("params", "batch_stats"))

  def run(function, kind, name, *what, train=True):
    own = params[kind][name], batch_stats[kind][name]
    return function(*own, *what, train=train)

  outputs = {
    name: forward(own, batch_stats["networks"][name], step.batch["image"])
    for name, own in params["networks"].items()
  }
  together = [outputs[name][1][-1] for name in COMMON_STUDENTS]
  parts = {"outputs": outputs, "together": np.concatenate(together, 3)}
  after = {}
  for kind, function in (
    ("fusion", reference_fusion.fusion),
    ("spread", reference_fusion.spread),
  ):
    for name in MEMBERS["ffsd"]:
      maps = together if kind == "fusion" else outputs[name][1][-1]
      parts[kind, name], after[kind, name] = run(function, kind, name, maps)
  for name in params["decoders"]:
    decoder = functools.partial(run, reference_fusion.decoder, "decoders", name)
    parts["back", name], after["decoders", name] = decoder(outputs[name][1][-1])
    if name in MEMBERS["ffsd"]:
      maps = parts["fusion", name][1]
    else:
      before = COMMON_STUDENTS[COMMON_STUDENTS.index(name) - 1]
      maps = reference.shifted_features(outputs[before][1][-1], normalized=True)
    parts["shown", name], _ = decoder(maps, train=False)
  return parts, after


def attention(mine, theirs):
  """The sum over pairs of maps of the mean over the batch."""
  return sum(
    reference.attention_loss(s, t).mean()
    for s, t in zip(mine, theirs, strict=True)
  )


def ffsd_metrics(step, ramp):
  parts, _ = ffsd_parts(step)
  labels, outputs = step.batch["label"], parts["outputs"]
  apart, maps, back = (ramp * weight for weight in (2.0, 30.0, 70.0))

  def distill(student, teacher):
    return reference.distillation_loss(student, teacher, 1.5).mean()

  terms = {}  # {name: (weight, value)}
  for name, (logits, _) in outputs.items():
    terms[f"label/{name}"] = 1, reference.cross_entropy(logits, labels).mean()
  common_logits = [outputs[name][0] for name in COMMON_STUDENTS]
  mutual = reference.mutual_learning_loss(common_logits, 1.5)
  for name, divergence in zip(COMMON_STUDENTS, mutual, strict=True):
    terms[f"mutual/{name}"] = 1, divergence.mean()
  for before, name in (("common_0", "common_1"), ("common_1", "common_2")):
    features, peer = (outputs[each][1] for each in (name, before))
    diversity = reference.diversity_loss(features[-1], peer[-1], True)
    terms[f"diversity/{name}"] = apart, diversity.mean()
    terms[f"self_distill/{name}"] = (
      apart,
      attention(features[:-1], parts["shown", name]),
    )
  for name in MEMBERS["ffsd"]:
    logits, features = outputs[name]
    fused, fused_maps = parts["fusion", name]
    label = reference.cross_entropy(fused, labels).mean()
    terms[f"fused_label/{name}"] = 1, label
    mean = sum(common_logits) / 3
    terms[f"fused_distill/{name}"] = 1, distill(fused, mean)
    terms[f"distill/{name}"] = 1, distill(logits, fused)
    terms[f"fused_maps/{name}"] = maps, attention(features[-1:], [fused_maps])
    terms[f"all_maps/{name}"] = (
      maps,
      attention([parts["spread", name]], [parts["together"]]),
    )
    terms[f"self_distill/{name}"] = (
      maps,
      attention(features[:-1], parts["shown", name]),
    )
  for name in ("common_1", "common_2", *MEMBERS["ffsd"]):
    found, wanted = parts["back", name], outputs[name][1][:-1]
    raw = sum(
      reference.normalized_feature_loss(s, t).mean()
      for s, t in zip(found, wanted, strict=True)
    )
    terms[f"decoder/{name}"] = back, raw + attention(found, wanted)
  return {
    **label_metrics(
      {name: logits for name, (logits, _) in outputs.items()},
      parts["fusion", "student_0"][0],
      labels,
    ),
    **{name: value for name, (_, value) in terms.items()},
    "loss": sum(weight * value for weight, value in terms.values()),
  }


METRICS = {"ffl": ffl_metrics, "pcl": pcl_metrics, "ffsd": ffsd_metrics}


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("name", METHODS)
def test_metrics_are_those_of_numpy_with_the_weights_of_the_epoch(name, index):
  step = steps(name)[index]
  found = {
    metric: value
    for metric, value in step.metrics.items()
    if not metric.startswith("gradient_norm/")
  }
  expected = METRICS[name](step, RAMPS[name][index])
  assert found.keys() == expected.keys()
  for metric, value in expected.items():
    np.testing.assert_allclose(found[metric], value, rtol=5e-5, err_msg=metric)


# --- the next state ---------------------------------------------------------


def own_gradients(name, gradients):
  """{who: the gradients of what is its own}."""
  if name == "ffsd":
    return {
      who: [of_kind.get(who) for of_kind in gradients.values()]
      for who in gradients["networks"]
    }
  module = gradients["fusion" if name == "ffl" else "head"]
  return {**gradients["networks"]["upper"], "ensemble": module}


@pytest.mark.parametrize("name", METHODS)
def test_norms_are_of_all_that_is_somebody_s_own(name):
  step = steps(name)[0]
  found = {
    metric.removeprefix("gradient_norm/"): value
    for metric, value in step.metrics.items()
    if metric.startswith("gradient_norm/")
  }
  expected = {
    who: np.sqrt(sum(np.square(x, dtype=float).sum() for x in leaves))
    for who, leaves in (
      (who, jax.tree.leaves(tree))
      for who, tree in own_gradients(name, step.gradients).items()
    )
  }
  assert found.keys() == expected.keys()
  for who, value in expected.items():
    assert found[who] == pytest.approx(value, rel=1e-4), who


@pytest.mark.parametrize("name", METHODS)
def test_every_parameter_moves_as_its_kind_does(name):
  """SGD; fusion modules decay otherwise; Adam moves the decoders."""
  found = steps(name)
  kinds = {path.split("/")[0] for path in paths(found[0].gradients)}
  assert (
    kinds
    == {
      "ffl": {"networks", "fusion"},
      "pcl": {"networks", "head"},
      "ffsd": {"networks", "spread", "fusion", "decoders"},
    }[name]
  )
  for path, before in paths(found[0].before["params"]).items():
    kind, rate = path.split("/")[0], 0.05
    optimizer = TorchSGD(0.9, 0.1 if kind == "fusion" else 1e-2)
    if kind == "decoders":
      optimizer, rate = TorchAdam(1e-2), 2e-3
    expected = np.float64(before)
    for step in found:
      last = expected
      expected = optimizer.step(expected, paths(step.gradients)[path], rate)
      error = np.linalg.norm(paths(step.after["params"])[path] - expected)
      assert error <= 1e-3 * np.linalg.norm(expected - last), path


def test_mean_teachers_are_means_of_the_new_parameters():
  """Half after step 1; after step 2 it would be two thirds, but for 0.6."""
  for step, kept in zip(steps("pcl"), (0.5, 0.6), strict=True):
    new = paths(step.after["params"]["networks"])
    before = paths(step.before["mean_teacher"])
    for path, mean in paths(step.after["mean_teacher"]).items():
      np.testing.assert_allclose(
        mean,
        kept * before[path] + (1 - kept) * new[path],
        rtol=1e-5,
        atol=1e-6,
        err_msg=path,
      )


def test_statistics_of_modules_are_those_of_training():
  """Those of decoders are of a network's own maps, not of what they show."""
  for step in steps("ffsd"):
    _, expected = ffsd_parts(step)
    assert len(expected) == 2 + 2 + 4
    for (kind, name), statistics in expected.items():
      common.assert_close(
        step.after["batch_stats"][kind][name], statistics, 1e-4
      )


@pytest.mark.parametrize("name", METHODS)
def test_all_statistics_move_and_steps_are_counted(name):
  for number, step in enumerate(steps(name), start=FIRST_STEP):
    assert (step.before["step"], step.after["step"]) == (number, number + 1)
    before = paths(step.before["batch_stats"])
    for path, after in paths(step.after["batch_stats"]).items():
      assert (after != before[path]).all(), path
