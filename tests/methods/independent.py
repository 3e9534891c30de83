"""What tests of the methods without shared parameters have in common."""

import functools

import jax
import numpy as np

from ekd_jax.models import Network
from tests.methods import common
from tests.methods.common import batch, first
from tests.reference import resnet as reference_resnet

WIDTHS = (1.0, 0.5, 0.25)
NAMES = ("student_0", "student_1", "student_2")
MEMBERS = common.members(*WIDTHS)


def reference_logits(state, images, *, train):
  """{member: logits} as NumPy computes them."""
  return {
    name: reference_resnet.forward(
      params, state["batch_stats"][name], images, train=train
    )[0]
    for name, params in state["params"].items()
  }


@functools.partial(jax.jit, static_argnums=0)
def _pull_back(width, params, batch_stats, images, cotangent):
  family = common.family(axis_name=None)
  module = Network(family.stem(), family.branch(width))

  def logits(params):
    variables = {"params": params, "batch_stats": batch_stats}
    outputs, _ = module.apply(
      variables, images, train=True, mutable=["batch_stats"]
    )
    return outputs.logits

  return jax.vjp(logits, params)[1](cotangent)[0]


def assert_gradients_are_pulled_back(state, found, by_logits):
  """Each member's gradient is that of its own logits, and nothing more.

  Args:
    state: before the step on the first batch.
    found: the gradients that the step used.
    by_logits: derivatives of the loss by every member's logits.
  """
  widths = dict(zip(NAMES, WIDTHS, strict=True))
  for name, cotangent in zip(state["params"], by_logits, strict=True):
    expected = _pull_back(
      widths[name],
      state["params"][name],
      state["batch_stats"][name],
      batch(0)["image"],
      np.float32(cotangent),
    )
    actual = common.paths(found[name])
    for path, value in common.paths(expected).items():
      np.testing.assert_allclose(
        actual[path],
        value,
        rtol=0,
        atol=1e-4 * np.abs(value).max(),
        err_msg=f"{name} {path}",
      )


def with_another(state, name):
  """The state with other parameters of one member."""
  other = jax.tree.map(lambda leaf: leaf[::-1] + 0.1, state["params"][name])
  return {**state, "params": {**state["params"], name: other}}


def assert_predicts_as_numpy(method, members, state):
  """Evaluation mode, members in order, the ensemble their mean."""
  names = [member.name for member in members]
  images = batch(0)["image"]
  predictions = jax.jit(method.predict)(state, images)
  assert list(predictions) == ["ensemble", *names]
  expected = reference_logits(state, images, train=False)
  expected["ensemble"] = sum(expected.values()) / len(names)
  for name, logits in expected.items():
    np.testing.assert_allclose(
      predictions[name], logits, rtol=1e-3, atol=1e-4, err_msg=name
    )
  students = method.students(state)
  assert list(students) == names
  for member in members:
    module, variables = students[member.name]
    size = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    assert size == member.params
    logits = jax.jit(module.apply)(variables, images).logits
    np.testing.assert_allclose(
      logits, predictions[member.name], rtol=1e-5, atol=1e-5
    )


def assert_moves_everything(state, after):
  """One step of the recipe on the gradients, and new statistics."""
  after = first(after)
  found = common.paths(after["opt_state"]["gradients"])
  for path, old in common.paths(state["params"]).items():
    new = common.paths(after["params"])[path]
    expected = old - 0.05 * 1.9 * (found[path] + 1e-2 * old)
    np.testing.assert_allclose(
      new, expected, rtol=1e-5, atol=1e-6, err_msg=path
    )
    assert np.abs(new - old).max() > 1e-5, path
  statistics = common.paths(after["batch_stats"])
  for path, old in common.paths(state["batch_stats"]).items():
    assert (statistics[path] != old).all(), path
