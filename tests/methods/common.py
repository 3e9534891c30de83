"""What tests of methods have in common: tiny networks, noise, compiled steps.

A step is compiled once per number of devices: everything a test varies, the
weights of the terms and the optimizer's hyper-parameters, is an argument of
the compiled program. The optimizer keeps the gradients it was given in its
state, where tests read them.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ekd_jax.compression import members_of_widths
from ekd_jax.methods import AXIS_NAME
from ekd_jax.models import CifarResNet
from ekd_jax.training import parallel
from ekd_jax.training.optimizers import nesterov_sgd
from tests.models.common import random_like

CLASSES = 4
BATCH = 8
IMAGE_SHAPE = (8, 8, 3)
HYPER = {
  "learning_rate": 0.05,
  "momentum": 0.9,
  "weight_decay": 1e-2,
  "adapter_multiplier": 0.5,
  "temperature": 2.0,
  "label_weight": 0.7,
  "feature_weight": 0.15,
  "distill_weight": 0.15,
}


def family(axis_name=AXIS_NAME, dtype=jnp.float32, formulation="lax"):
  """ResNet-8 on 8x8 images."""
  return CifarResNet(
    *(8, CLASSES, IMAGE_SHAPE),
    axis_name=axis_name,
    dtype=dtype,
    formulation=formulation,
  )


def run_alone(module, variables, kind, x, *, train=True):
  """A module by itself, on one device.

  Args:
    module: a Linen module without a device axis.
    variables: a state's "params" and "batch_stats".
    kind: where its variables are in them, "a/b/c".
    x: what it takes.
    train: whether it uses batch statistics.

  Returns:
    Its output and its statistics afterwards.
  """
  own = {}
  for collection in ("params", "batch_stats"):
    tree = variables[collection]
    for name in kind.split("/"):
      tree = tree[name]
    own[collection] = tree
  if not train:
    return module.apply(own, x, train=False), own["batch_stats"]
  output, changed = module.apply(own, x, train=True, mutable=["batch_stats"])
  return output, changed["batch_stats"]


def members(*widths):
  return members_of_widths(widths, family().cost)


def optimizer(hyper):
  """The library's optimizer; its state also holds the last gradients."""
  return keeping_gradients(
    nesterov_sgd(
      lambda step: hyper["learning_rate"],
      momentum=hyper["momentum"],
      weight_decay=hyper["weight_decay"],
      adapter_multiplier=hyper["adapter_multiplier"],
    )
  )


def keeping_gradients(inner):
  """An optimizer whose state also holds the last gradients."""

  def init(params):
    return {
      "gradients": jax.tree.map(jnp.zeros_like, params),
      "inner": inner.init(params),
    }

  def update(gradients, state, params):
    updates, next_inner = inner.update(gradients, state["inner"], params)
    return updates, {"gradients": gradients, "inner": next_inner}

  return optax.GradientTransformation(init, update)


def compiled_step(build, num_devices):
  """Compiles the training step of `build(hyper)`.

  Args:
    build: {name: number} -> Method.
    num_devices: how many of the CPU devices run it.

  Returns:
    (state, batches, hyper) -> (state, metrics) after one step per batch, as
    NumPy arrays with a leading device axis.
  """
  devices = jax.devices()[:num_devices]

  def step(state, batch, hyper):
    return build(hyper).train_step(state, batch, jax.random.key(0))

  mapped = parallel.per_device(step, devices)

  def run(state, batches, hyper=HYPER):
    state, hyper = parallel.replicate((state, hyper), devices)
    for batch in batches:
      state, metrics = mapped(state, parallel.shard(batch, devices), hyper)
    return jax.tree.map(np.asarray, (state, metrics))

  return run


def first(tree):
  """What the first device has."""
  return jax.tree.map(lambda leaf: leaf[0], tree)


def batch(seed, count=BATCH):
  """Random-noise images and random labels."""
  rng = np.random.default_rng([42, seed])
  return {
    "image": rng.normal(size=(count, *IMAGE_SHAPE)).astype(np.float32),
    "label": rng.integers(CLASSES, size=count).astype(np.int32),
  }


def state_shapes(build, count=BATCH):
  """The state's shapes and types, nothing computed."""
  method = build(HYPER)
  return jax.eval_shape(method.init, jax.random.key(0), batch(0, count))


def random_state(build, seed=0):
  """A state with random parameters and statistics, step 0."""
  shapes = state_shapes(build)
  return {
    **random_like({k: v for k, v in shapes.items() if k != "opt_state"}, seed),
    "opt_state": jax.tree.map(
      lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes["opt_state"]
    ),
  }


def paths(tree):
  """Flattens nested containers to {"a/b/c": leaf}."""
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def relative_differences(actual, expected, scale=None):
  """|actual - expected| / |scale| for every leaf, as Euclidean norms.

  The norm of a whole leaf is what training sees; one element in thousands may
  be nearly 0, where a relative difference says nothing.
  """
  scale = paths(expected if scale is None else scale)
  actual, expected = paths(actual), paths(expected)
  assert actual.keys() == expected.keys() == scale.keys()
  return {
    path: np.linalg.norm(actual[path] - expected[path])
    / np.linalg.norm(scale[path])
    for path in expected
  }


def assert_close(actual, expected, tolerance, scale=None):
  """No leaf's `relative_differences` is above the tolerance."""
  differences = relative_differences(actual, expected, scale)
  too_far = {p: d for p, d in differences.items() if not d <= tolerance}
  assert not too_far


def assert_same_on_all_devices(tree):
  for path, leaf in paths(tree).items():
    for device in range(1, len(leaf)):
      np.testing.assert_array_equal(leaf[device], leaf[0], err_msg=path)


def terms_of(metrics, parts):
  """The metrics but for the gradients' norms, of which each part has one.

  The norms themselves are compared in test_update.py.
  """
  norms = {f"gradient_norm/{part}" for part in parts}
  assert norms <= metrics.keys()
  assert all(np.isfinite(metrics[name]) and metrics[name] > 0 for name in norms)
  return {k: v for k, v in metrics.items() if k not in norms}


def names_of_predictions(method, state):
  """In the order in which the method returns them; a compiled one sorts."""
  names = []

  def predict(state, images):
    names.extend(method.predict(state, images))

  jax.eval_shape(predict, state, batch(0)["image"])
  return names


def assert_keeps_its_types(build, examples=None):
  """One step returns the types and shapes it was given, scalars as metrics.

  Args:
    build: {name: number} -> Method.
    examples: a batch, if not one of this file.
  """
  examples = batch(0) if examples is None else examples
  state = jax.eval_shape(build(HYPER).init, jax.random.key(0), examples)
  one_device = jax.eval_shape(
    jax.vmap(
      lambda state, batch: build(HYPER).train_step(
        state, batch, jax.random.key(0)
      ),
      axis_name=AXIS_NAME,
    ),
    *jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape), leaf.dtype),
      (state, examples),
    ),
  )
  next_state, metrics = one_device
  expected = jax.tree.map(lambda leaf: ((1, *leaf.shape), leaf.dtype), state)
  actual = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), next_state)
  assert actual == expected
  assert {m.shape for m in metrics.values()} == {(1,)}
  assert {m.dtype for m in metrics.values()} == {jnp.dtype("float32")}


def top1(logits, labels):
  return 100 * np.mean(np.argmax(logits, -1) == labels)


# Devices add float32 numbers in another order, which changes sums by about 1e-6
# of their size. That is compared with how far training moved: the parameters
# themselves hardly move in a few steps, so next to them nothing would show. The
# learning rate is large enough for the rounding of the parameters (6e-8 of
# them) to be small beside the move, and images are noise, of which few
# activations are so near 0 that rounding opens or shuts their ReLU. Differences
# were at most 2.3e-5 over eight seeds; batch norm per device makes them larger
# than 0.1.
DEVICE_TOLERANCE = 1e-4


def assert_formulations_agree(before, by_lax, by_split):
  """Training went to one state in both formulations, momentum included.

  Args:
    before: the state before training.
    by_lax: (state, metrics) after it on one device, with the device axis.
    by_split: the same on any number of devices.
  """
  # Another order of sums is all there is between them, as between devices.
  assert_devices_agree(before, by_lax, by_split)
  lax, split = (
    paths(first(state)["opt_state"]) for state, _ in (by_lax, by_split)
  )
  assert lax.keys() == split.keys()
  for path, value in lax.items():
    assert value.any(), path
    error = np.linalg.norm(split[path] - value) / np.linalg.norm(value)
    assert error <= DEVICE_TOLERANCE, path


def assert_devices_agree(before, on_one, on_four):
  """Training on four devices went where training on one did.

  Args:
    before: the state before training.
    on_one: (state, metrics) after it on one device, with the device axis.
    on_four: the same on four.
  """
  assert_same_on_all_devices(on_four)
  (one, one_metrics), (four, four_metrics) = first(on_one), first(on_four)
  for collection in ("params", "batch_stats"):
    moved = jax.tree.map(np.subtract, one[collection], before[collection])
    assert_close(
      four[collection], one[collection], DEVICE_TOLERANCE, scale=moved
    )
  assert one_metrics.keys() == four_metrics.keys()
  for name, value in one_metrics.items():
    np.testing.assert_allclose(
      four_metrics[name], value, rtol=DEVICE_TOLERANCE, err_msg=name
    )
