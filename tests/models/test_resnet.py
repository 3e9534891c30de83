"""CIFAR ResNets against the published table, NumPy, and XLA's own count."""

import dataclasses
from fractions import Fraction

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ekd_jax.errors import UserError
from ekd_jax.models import CifarResNet, Outputs, layers
from tests.models import formulations
from tests.models.common import random_like, shapes
from tests.reference import resnet as reference

WIDTHS = (1.0, 0.8, 0.6, 0.4, 0.2)
CHANNELS = (
  (16, 32, 64),
  (12, 25, 51),
  (9, 19, 38),
  (6, 12, 25),
  (3, 6, 12),
)

# (depth, classes): parameters of the five students, stem included. Counted on
# the authors' own code; the paper's Table 1 rounds the same numbers.
PUBLISHED = {
  (20, 10): (272474, 171536, 97018, 42231, 10773),
  (32, 10): (466906, 293560, 165442, 71555, 17745),
  (44, 10): (661338, 415584, 233866, 100879, 24717),
  (56, 100): (861620, 542288, 305800, 132543, 32859),
  (110, 10): (1730714, 1086716, 610198, 262161, 63063),
  (110, 100): (1736564, 1091396, 613708, 264501, 64233),
}
STEM_PARAMETERS = 464

TABLE = [
  pytest.param(*network, width, count, id=f"{network}-{width}")
  for network, counts in PUBLISHED.items()
  for width, count in zip(WIDTHS, counts, strict=True)
]


def elements(tree):
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


# --- sizes ------------------------------------------------------------------


@pytest.mark.parametrize(("depth", "classes", "width", "count"), TABLE)
def test_cost_counts_the_published_parameters(depth, classes, width, count):
  assert CifarResNet(depth, classes).cost(width).params == count


@pytest.mark.parametrize(("depth", "classes", "width", "count"), TABLE)
def test_initialised_variables_have_the_published_size(
  depth, classes, width, count
):
  _, variables = shapes(CifarResNet(depth, classes), width)
  assert elements(variables["params"]["stem"]) == STEM_PARAMETERS
  assert elements(variables["params"]) == count


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("channels", CHANNELS, ids=str)
def test_cost_of_depth_1202_equals_a_closed_form(classes, channels):
  a, b, c = channels
  n = 200

  def stage(inputs, outputs, projected):
    """n blocks of two convolutions and two norms, perhaps one projection."""
    kernels = 9 * inputs * outputs + (2 * n - 1) * 9 * outputs**2
    norms = 2 * n * 2 * outputs
    return kernels + norms + projected * (inputs * outputs + 2 * outputs)

  expected = (
    (27 * 16 + 2 * 16)
    + stage(16, a, a != 16)
    + stage(a, b, True)
    + stage(b, c, True)
    + (c + 1) * classes
  )
  width = WIDTHS[CHANNELS.index(channels)]
  assert CifarResNet(1202, classes).cost(width).params == expected


def test_sizes_round_to_those_of_he_et_al():
  """Their Table 6, in millions."""
  published = {20: 0.27, 32: 0.46, 44: 0.66, 56: 0.85, 110: 1.7, 1202: 19.4}
  for depth, millions in published.items():
    count = CifarResNet(depth, 10).cost(1.0).params
    # Their shortcuts have no parameters, ours 2,752: less than half a digit.
    np.testing.assert_allclose(count / 1e6, millions, rtol=0.02)


@pytest.mark.parametrize("width", [1.0, 0.6, 0.2, 1 / 16])
@pytest.mark.parametrize("image_shape", [(32, 32, 3), (8, 8, 1), (9, 14, 3)])
def test_cost_equals_the_sum_over_the_reference_s_convolutions(
  width, image_shape
):
  network = CifarResNet(14, 7, image_shape)
  channels = tuple(int(c * Fraction(width)) for c in (16, 32, 64))
  if width in WIDTHS:
    channels = CHANNELS[WIDTHS.index(width)]
  convolutions = reference.convolutions(14, channels, image_shape)
  head = channels[-1] * 7
  cost = network.cost(width)
  assert cost.macs == head + sum(c.weights * c.positions for c in convolutions)
  norms = sum(2 * c.outputs for c in convolutions)
  assert cost.params == head + 7 + norms + sum(c.weights for c in convolutions)
  assert cost.params == elements(shapes(network, width)[1]["params"])


def without_batch_norm(next_function, args, kwargs, context):
  """Leaves of every `BatchNormReLU` only its residual sum."""
  if isinstance(context.module, layers.BatchNormReLU):
    residual = kwargs.get("residual")
    return args[0] if residual is None else args[0] + residual
  return next_function(*args, **kwargs)


@pytest.mark.parametrize("image_shape", [(16, 16, 3), (9, 14, 3)])
@pytest.mark.parametrize(
  ("width", "channels"), [(1.0, (16, 32, 64)), (0.4, (6, 12, 25))]
)
def test_macs_are_xla_s_and_the_taps_on_the_padding(
  width, channels, image_shape
):
  """XLA counts 2 operations per MAC, none on zero padding, all the rest.

  Without batch norm the rest is countable: the residual sums, the pooling (a
  sum and a division) and the head's bias. Images are small because XLA keeps
  its count in float32, which is exact up to 2^24.
  """
  classes = 10
  network = CifarResNet(14, classes, image_shape)
  module, variables = shapes(network, width)
  images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
  with nn.intercept_methods(without_batch_norm):
    lowered = jax.jit(lambda v, x: module.apply(v, x).logits).lower(
      variables, images
    )
  flops = lowered.cost_analysis()["flops"]
  convolutions = reference.convolutions(14, channels, image_shape)
  on_padding = sum(c.weights * c.positions - c.valid_macs for c in convolutions)
  sums = reference.block_outputs(14, channels, image_shape)
  last = convolutions[-1]
  pooling = last.positions * last.outputs
  macs = network.cost(width).macs
  assert on_padding > 0.03 * macs
  assert flops < 2**24
  assert flops == 2 * (macs - on_padding) + sums + pooling + classes


# --- widths -----------------------------------------------------------------


@pytest.mark.parametrize(
  ("student", "channels"), list(enumerate(CHANNELS)), ids=str
)
def test_five_students_have_the_published_channels(student, channels):
  network = CifarResNet(20, 10)
  assert network.stage_channels((5 - student) / 5) == channels
  assert network.stage_channels(WIDTHS[student]) == channels
  _, variables = shapes(network, WIDTHS[student])
  branch = variables["params"]["branch"]
  for stage, c in enumerate(channels):
    assert branch[f"stage_{stage}_block_1"]["conv_1"]["kernel"].shape == (
      3,
      3,
      c,
      c,
    )
  assert branch["head"]["kernel"].shape == (channels[-1], 10)
  assert variables["params"]["stem"]["conv"]["kernel"].shape == (3, 3, 3, 16)


@pytest.mark.parametrize("parts", [100, 1000, 64, 7])
def test_channels_are_truncated_as_whole_numbers_would_be(parts):
  """As integers, whatever k / parts is rounded to."""
  network = CifarResNet(20, 10)
  for k in range(-(-parts // 16), parts + 1):
    expected = tuple(c * k // parts for c in (16, 32, 64))
    assert network.stage_channels(k / parts) == expected


@pytest.mark.parametrize("width", [0.0, 0.05, 0.0624, -1.0])
def test_a_width_without_channels_is_refused(width):
  network = CifarResNet(20, 10)
  for refused in (network.stage_channels, network.branch, network.cost):
    with pytest.raises(UserError, match=f"{width:g}.*width is 0.0625"):
      refused(width)
  # The width that the message names is possible.
  assert network.stage_channels(0.0625) == (1, 2, 4)


@pytest.mark.parametrize("depth", [-4, 0, 2, 5, 7, 10, 19, 21, 100, 1200])
def test_a_depth_that_is_not_6n_plus_2_is_refused(depth):
  with pytest.raises(ValueError, match=f"depth is {depth}: .*6n \\+ 2"):
    CifarResNet(depth, 10)


@pytest.mark.parametrize("depth", [8, 14, 20, 32, 44, 56, 110, 1202])
def test_a_depth_of_6n_plus_2_is_accepted_and_named(depth):
  network = CifarResNet(depth, 10)
  assert 6 * network.blocks_per_stage + 2 == depth
  assert network.name == f"resnet{depth}"


def test_width_candidates_are_all_different_networks_and_all_there_are():
  network = CifarResNet(20, 10)
  candidates = network.width_candidates()
  channels = [network.stage_channels(w) for w in candidates]
  assert candidates[-1] == 1.0
  assert list(candidates) == sorted(candidates)
  assert len(set(channels)) == len(channels)
  sweep = np.linspace(1 / 16, 1, 4001)
  assert {network.stage_channels(w) for w in sweep} == set(channels)


def test_only_thin_students_project_in_their_first_block():
  for width in WIDTHS:
    _, variables = shapes(CifarResNet(14, 10), width)
    branch = variables["params"]["branch"]
    projected = {name for name in branch if "shortcut_conv" in branch[name]}
    expected = {"stage_1_block_0", "stage_2_block_0"}
    if width < 1:
      expected |= {"stage_0_block_0"}
    assert projected == expected


# --- outputs ----------------------------------------------------------------


@pytest.mark.parametrize(
  ("width", "channels"), list(zip(WIDTHS, CHANNELS, strict=True)), ids=str
)
def test_features_are_three_maps_of_32_16_and_8(width, channels):
  network = CifarResNet(20, 100)
  assert network.feature_channels == (16, 32, 64)
  module, variables = shapes(network, width)
  images = jax.ShapeDtypeStruct((5, 32, 32, 3), jnp.float32)
  outputs = jax.eval_shape(module.apply, variables, images)
  assert isinstance(outputs, Outputs)
  assert outputs.logits.shape == (5, 100)
  assert [f.shape for f in outputs.features] == [
    (5, side, side, c) for side, c in zip((32, 16, 8), channels, strict=True)
  ]


@pytest.mark.parametrize("formulation", formulations.NAMES)
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(
  ("depth", "width", "image_shape"),
  [(14, 1.0, (8, 8, 3)), (8, 0.4, (9, 6, 1))],
)
def test_the_network_computes_what_numpy_does(
  depth, width, image_shape, train, formulation
):
  network = CifarResNet(depth, 10, image_shape, formulation=formulation)
  module, variables = shapes(network, width)
  variables = random_like(variables, seed=1)
  images = np.random.default_rng(0).normal(size=(4, *image_shape))

  def run(variables, images):
    return module.apply(
      variables, images, train=train, mutable=train and ["batch_stats"]
    )

  outputs = jax.jit(run)(variables, images.astype(np.float32))
  logits, features = outputs[0] if train else outputs
  expected, expected_features = reference.forward(
    variables["params"], variables["batch_stats"], images, train=train
  )
  np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-4)
  assert len(features) == len(expected_features) == 3
  form = formulations.Formulation(formulation)
  for maps, value in zip(features, expected_features, strict=True):
    actual = form.plain(maps)
    np.testing.assert_allclose(actual, value, rtol=1e-3, atol=1e-4)


def test_a_network_is_its_stem_and_then_its_branch():
  network = CifarResNet(8, 10, (8, 8, 3))
  module, variables = shapes(network, 0.5)
  assert set(variables) == {"params", "batch_stats"}
  variables = random_like(variables)
  images = np.random.default_rng(0).normal(size=(2, 8, 8, 3))

  def part(name):
    return {collection: tree[name] for collection, tree in variables.items()}

  @jax.jit
  def both(images):
    hidden = network.stem().apply(part("stem"), images, train=False)
    return (
      network.branch(0.5).apply(part("branch"), hidden, train=False),
      # Evaluation is what a network does unless told otherwise.
      module.apply(variables, images),
    )

  apart, whole = both(images)
  assert isinstance(whole, Outputs)
  jax.tree.map(np.testing.assert_array_equal, apart, whole)


@pytest.mark.parametrize("formulation", formulations.NAMES)
def test_bfloat16_networks_keep_float32_parameters_and_logits(formulation):
  network = CifarResNet(8, 10, (8, 8, 3), formulation=formulation)
  low = dataclasses.replace(network, dtype=jnp.bfloat16)
  module, variables = shapes(low, 0.5)
  assert all(v.dtype == jnp.float32 for v in jax.tree.leaves(variables))
  variables = random_like(variables)
  images = np.random.default_rng(0).normal(size=(8, 8, 8, 3))

  def run(variables, images):
    outputs, changed = module.apply(
      variables, images, train=True, mutable=["batch_stats"]
    )
    return outputs, changed["batch_stats"]

  outputs, stats = jax.jit(run)(variables, images.astype(np.float32))
  assert outputs.logits.dtype == jnp.float32
  features, _ = layers.arrays_of(outputs.features)
  assert {f.dtype for f in features} == {jnp.dtype(jnp.bfloat16)}
  assert {s.dtype for s in jax.tree.leaves(stats)} == {jnp.dtype("float32")}
  logits, _ = reference.forward(
    variables["params"], variables["batch_stats"], images, train=True
  )
  # Nine layers, each rounded to 8 bits.
  error = np.linalg.norm(outputs.logits - logits) / np.linalg.norm(logits)
  assert error < 0.03
