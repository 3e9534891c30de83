"""Ways to compute one network: formulations, loops, rematerialisation.

All have the same parameters and, up to rounding, give the same values and
gradients.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ekd_jax.models import CifarResNet, Network
from ekd_jax.models.network import scans
from tests.models import formulations
from tests.models.common import random_like, shapes
from tests.reference import resnet as reference

# Two equal blocks in every stage, so that one could be taken for the other;
# odd channel counts; sides that are odd, and odd again when halved.
DEPTH, WIDTH, IMAGE_SHAPE = 20, 0.3, (9, 14, 3)
WAYS = [
  *((name, scan) for name in formulations.NAMES for scan in ("off", "on")),
  *((name, "off", True) for name in formulations.NAMES),
]


def variant(formulation="lax", scan="off", remat=False):
  return CifarResNet(
    *(DEPTH, 10, IMAGE_SHAPE),
    formulation=formulation,
    scan=scan,
    remat=remat,
  )


def values_and_gradients(network, variables, images, cotangents):
  """Logits, features [N, H, W, C], statistics, and what is pulled back.

  Without cotangents, those of evaluation, where nothing is pulled back.
  """
  module = Network(network.stem(), network.branch(WIDTH))
  form = formulations.Formulation(network.formulation)

  def run(params, images):
    outputs, changed = module.apply(
      {**variables, "params": params},
      images,
      train=cotangents is not None,
      mutable=["batch_stats"],
    )
    plain = [form.plain(maps) for maps in outputs.features]
    return (outputs.logits, plain), changed["batch_stats"]

  @jax.jit
  def both(params, images):
    if cotangents is None:
      outputs, stats = run(params, images)
      return {"outputs": outputs, "stats": stats}
    outputs, pull, stats = jax.vjp(run, params, images, has_aux=True)
    gradients = pull(cotangents)
    return {"outputs": outputs, "stats": stats, "gradients": gradients}

  return jax.tree.map(np.asarray, both(variables["params"], images))


def assert_leaves_close(actual, expected, tolerance):
  """Every leaf, as a whole, is within a fraction of the expected one's norm."""
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  pairs = zip(
    jax.tree_util.tree_leaves_with_path(actual),
    jax.tree.leaves(expected),
    strict=True,
  )
  differences = {
    jax.tree_util.keystr(path): np.linalg.norm(a - b) / np.linalg.norm(b)
    for (path, a), b in pairs
  }
  assert {k: d for k, d in differences.items() if not d <= tolerance} == {}


@pytest.mark.parametrize("train", [True, False], ids=["training", "evaluation"])
def test_formulations_and_loops_give_the_same_values_and_gradients(
  train, smooth
):
  _, variables = shapes(variant(), WIDTH)
  variables = random_like(variables, seed=1)
  rng = np.random.default_rng(2)

  def normal(*shape):
    return rng.normal(size=shape).astype(np.float32)

  images = normal(4, *IMAGE_SHAPE)
  sides = [(9, 14), (5, 7), (3, 4)]
  channels = variant().stage_channels(WIDTH)
  assert channels == (4, 9, 19)
  cotangents = (
    normal(4, 10),
    [normal(4, *s, c) for s, c in zip(sides, channels, strict=True)],
  )
  if not train:
    cotangents = None
  found = {
    way: values_and_gradients(variant(*way), variables, images, cotangents)
    for way in WAYS
  }
  # Nothing is zero or, in training, as it was; else equality says little.
  first = found["lax", "off"]
  assert all(np.linalg.norm(leaf) > 0 for leaf in jax.tree.leaves(first))
  for old, new in zip(
    jax.tree.leaves(variables["batch_stats"]),
    jax.tree.leaves(first["stats"]),
    strict=True,
  ):
    assert (new != old).all() if train else (new == old).all()
  # Over three seeds 4e-6, 3e-7 and 3e-5 were seen.
  tolerances = {"outputs": 3e-5, "stats": 3e-6, "gradients": 3e-4}
  for way in WAYS[1:]:
    for what, expected in first.items():
      assert_leaves_close(found[way][what], expected, tolerances[what])


def test_parameters_do_not_depend_on_the_formulation_or_the_loop():
  """Names, shapes and, for one key, every bit: checkpoints fit all."""
  images = jax.ShapeDtypeStruct((16, *IMAGE_SHAPE), jnp.float32)

  def initial(way):
    network = variant(*way)
    module = Network(network.stem(), network.branch(WIDTH))
    return module.lazy_init(jax.random.key(5), images)

  first, *others = (
    initial(way) for way in [*WAYS, ("auto", "auto"), ("auto", "on")]
  )
  block = first["params"]["branch"]["stage_1_block_2"]
  assert block["conv_0"]["kernel"].shape == (3, 3, 9, 9)
  for other in others:
    assert jax.tree.structure(other) == jax.tree.structure(first)
    jax.tree.map(np.testing.assert_array_equal, other, first)


def test_less_is_kept_for_the_gradient_in_the_plain_layout():
  """Counted in what the backward pass is given; XLA decides what it holds."""

  def kept(remat):
    module, variables = shapes(variant("lax", "off", remat), WIDTH)
    images = jnp.zeros((8, *IMAGE_SHAPE))

    def backward(params):
      return jax.vjp(
        lambda params: (
          module.apply(
            {**variables, "params": params},
            images,
            train=True,
            mutable=["batch_stats"],
          )[0].logits
        ),
        params,
      )[1]

    variables = random_like(variables)
    given = jax.eval_shape(backward, variables["params"])
    return sum(leaf.size for leaf in jax.tree.leaves(given))

  # Parameters, which both need, are a seventh of it.
  assert kept(remat=True) < 0.6 * kept(remat=False)


@pytest.mark.parametrize(
  ("scan", "formulation", "count", "expected"),
  [
    ("auto", "split", 17, False),
    ("auto", "split", 23, False),
    ("auto", "split", 24, True),
    ("auto", "lax", 24, False),
    ("on", "lax", 1, True),
    ("on", "split", 1, True),
    ("on", "split", 0, False),
    ("off", "split", 17, False),
    ("off", "lax", 17, False),
  ],
)
def test_many_equal_blocks_are_scanned_in_the_split_formulation(
  scan, formulation, count, expected
):
  maps = formulations.Formulation(formulation).maps(jnp.zeros((2, 3, 3, 4)))
  assert scans(scan, maps, count) is expected


@pytest.mark.parametrize(
  ("depth", "formulation", "loops"),
  [(152, "split", 3), (146, "split", 0), (152, "lax", 0)],
)
def test_very_deep_networks_are_compiled_as_three_loops(
  depth, formulation, loops
):
  network = CifarResNet(
    depth, 10, (8, 8, 3), formulation=formulation, scan="auto"
  )
  module, variables = shapes(network, 0.25)
  jaxpr = jax.make_jaxpr(module.apply)(variables, jnp.zeros((2, 8, 8, 3)))
  assert str(jaxpr).count(" scan[") == loops


@pytest.mark.parametrize("scan", ["off", "on"])
def test_a_network_alone_gives_plain_features_on_any_device(scan):
  family = dataclasses.replace(variant("split", scan), axis_name="batch")
  alone = family.alone()
  module, variables = shapes(alone, WIDTH)
  variables = random_like(variables)
  images = np.random.default_rng(0).normal(size=(16, *IMAGE_SHAPE))
  outputs = jax.jit(module.apply)(variables, images.astype(np.float32))
  _, expected = reference.forward(
    variables["params"], variables["batch_stats"], images, train=False
  )
  for actual, value in zip(outputs.features, expected, strict=True):
    assert isinstance(actual, jax.Array)
    np.testing.assert_allclose(actual, value, rtol=1e-3, atol=1e-4)
  # Training it needs no device axis either, which the family's own does.
  jax.eval_shape(
    lambda v: module.apply(v, images, train=True, mutable=["batch_stats"]),
    variables,
  )
  own = Network(family.stem(), family.branch(WIDTH))
  with pytest.raises(NameError, match="unbound axis name: batch"):
    jax.eval_shape(
      lambda v: own.apply(v, images, train=True, mutable=["batch_stats"]),
      variables,
    )
