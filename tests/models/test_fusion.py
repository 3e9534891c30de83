"""What stands on top of networks: its values against NumPy, and its sizes."""

import math

import jax
import numpy as np
import pytest

from ekd_jax.models import layers
from ekd_jax.models.computation import Computation
from ekd_jax.models.fusion import Decoder, Fusion, Spread
from tests.models.common import random_like
from tests.models.formulations import normal, relative_error
from tests.reference import fusion as reference

TOGETHER = (3, 5)  # Channels of the networks whose maps are fused.


def shapes_of(module, inputs):
  return jax.eval_shape(
    lambda x: module.init(jax.random.key(0), x, train=False), inputs
  )


def run(module, variables, inputs, *, train):
  """Its output and the statistics afterwards."""

  @jax.jit
  def apply(variables, inputs):
    return module.apply(variables, inputs, train=train, mutable=["batch_stats"])

  output, changed = apply(variables, inputs)
  return output, changed["batch_stats"]


def assert_statistics(after, expected):
  for name, statistics in expected.items():
    for kind, value in statistics.items():
      assert relative_error(after[name][kind], value) < 1e-5, (name, kind)


@pytest.mark.parametrize("train", [True, False])
def test_fusion_is_what_it_is_in_numpy(train, form):
  maps = [normal(i, 4, 3, 5, count) for i, count in enumerate(TOGETHER)]
  module = Fusion(Computation(), 6, 7)
  variables = random_like(shapes_of(module, maps))
  (logits, features), after = run(
    module, variables, [form.maps(x) for x in maps], train=train
  )
  (expected, fused), statistics = reference.fusion(
    variables["params"], variables["batch_stats"], maps, train=train
  )
  assert logits.shape == (4, 7)
  assert relative_error(logits, expected) < 1e-5
  (features,) = features
  assert relative_error(form.plain(features), fused) < 1e-5
  assert (fused >= 0).all()
  assert_statistics(after, statistics)


@pytest.mark.parametrize("train", [True, False])
def test_spreading_is_what_it_is_in_numpy(train, form):
  x = normal(0, 4, 3, 5, 3)
  module = Spread(Computation(), 8)
  variables = random_like(shapes_of(module, x))
  y, after = run(module, variables, form.maps(x), train=train)
  expected, statistics = reference.spread(
    variables["params"], variables["batch_stats"], x, train=train
  )
  assert expected.shape == (4, 3, 5, 8)
  assert relative_error(form.plain(y), expected) < 1e-5
  assert_statistics(after, statistics)


@pytest.mark.parametrize("train", [True, False])
def test_decoding_is_what_it_is_in_numpy(train, form):
  x = normal(0, 4, 2, 3, 8)
  module = Decoder(Computation(), (2, 5))
  variables = random_like(shapes_of(module, x))
  found, after = run(module, variables, form.maps(x), train=train)
  expected, statistics = reference.decoder(
    variables["params"], variables["batch_stats"], x, train=train
  )
  shapes = [maps.shape for maps in expected]
  assert shapes == [(4, 8, 12, 2), (4, 4, 6, 5)]
  for maps, wanted in zip(found, expected, strict=True):
    assert relative_error(form.plain(maps), wanted) < 1e-5
  assert_statistics(after, statistics)


def test_gradients_of_a_transposed_convolution(form):
  """It is linear in both, so that each gradient is on paper."""
  x, kernel = normal(0, 2, 2, 3, 3), normal(1, 3, 3, 3, 4)
  cotangent = normal(2, 2, 4, 6, 4)

  @jax.jit
  def pulled(x, kernel):
    layer = layers.TransposedConvolution(4)
    return jax.vjp(
      lambda x, kernel: form.apply(layer, {"params": {"kernel": kernel}}, x),
      x,
      kernel,
    )[1](cotangent)

  from_x, from_kernel = pulled(x, kernel)
  by_x, by_kernel = np.zeros(x.shape), np.zeros(kernel.shape)
  turned = kernel[::-1, ::-1]
  for r, c, i, j in np.ndindex(2, 3, 3, 3):
    row, column = 2 * r + i - 1, 2 * c + j - 1
    if 0 <= row < 4 and 0 <= column < 6:
      reached = cotangent[:, row, column]
      by_x[:, r, c] += reached @ turned[i, j].T
      by_kernel[2 - i, 2 - j] += x[:, r, c].T @ reached
  assert relative_error(from_x, by_x) < 1e-5
  assert relative_error(from_kernel, by_kernel) < 1e-5


# Measured with the published code: channels of the compared maps, parameters of
# the fusion module, of what spreads a leader's maps, and of a decoder.
PUBLISHED = {
  "resnet20": ((16, 32, 64), 16228, 287476 - 278324, 23136),
  "wide_resnet16-2": ((32, 64, 128), 48740, 739108 - 704420, 92352),
  "plain_densenet_12_40": (
    (168, 312, 456),
    *(472516, 1523140 - 1100428, 1753152),
  ),
  "googlenet": (
    (480, 832, 1024),
    *(2224228, 8371012 - 6258500, 11264576),
  ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_two_networks_modules_are_as_large_as_published(name):
  channels, *sizes = PUBLISHED[name]
  last = channels[-1]
  x = jax.ShapeDtypeStruct((1, 4, 4, last), np.float32)
  how = Computation()
  modules = [
    (Fusion(how, last, 100), [x, x]),
    (Spread(how, 2 * last), x),
    (Decoder(how, channels[:-1]), x),
  ]
  for (module, inputs), size in zip(modules, sizes, strict=True):
    params = jax.tree.leaves(shapes_of(module, inputs)["params"])
    assert sum(math.prod(leaf.shape) for leaf in params) == size


def test_fusion_is_drawn_as_published():
  """Kernels with variance 2 / (k k outputs), the last layer as torch's."""
  module = Fusion(Computation(), 64, 100)
  maps = [np.zeros((1, 2, 2, 64), np.float32)] * 2
  params = module.init(jax.random.key(0), maps, train=False)["params"]
  depthwise, pointwise = (params[f"conv_{i}"]["kernel"] for i in (0, 1))
  assert depthwise.shape == (3, 3, 1, 128)
  assert pointwise.shape == (1, 1, 128, 64)
  assert np.std(depthwise) == pytest.approx((2 / (9 * 128)) ** 0.5, rel=0.1)
  assert np.std(pointwise) == pytest.approx((2 / 64) ** 0.5, rel=0.05)
  head = params["head"]
  for values in (head["kernel"], head["bias"]):
    assert np.abs(values).max() <= 1 / 8
    assert np.std(values) == pytest.approx(1 / 8 / 3**0.5, rel=0.15)
