"""The layers against NumPy: values, gradients, initialisation.

Whatever takes maps is tested in both formulations. Batch norm has a file of
its own.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ekd_jax.models import layers
from tests.models import formulations
from tests.models.formulations import (
  HALF_STEP,
  bfloat16,
  normal,
  relative_error,
)
from tests.reference import layers as reference

# --- maps -------------------------------------------------------------------


@pytest.mark.parametrize(
  ("formulation", "platform", "images", "expected"),
  [
    ("auto", "cpu", 16, "split"),
    ("auto", "cpu", 128, "split"),
    ("auto", "cpu", 15, "lax"),
    ("auto", "cpu", 1, "lax"),
    ("auto", "gpu", 128, "lax"),
    ("auto", "tpu", 128, "lax"),
    ("lax", "cpu", 128, "lax"),
    ("lax", "gpu", 128, "lax"),
    ("split", "cpu", 1, "split"),
    ("split", "gpu", 2, "split"),
  ],
)
def test_the_formulation_is_chosen_by_platform_and_batch_unless_given(
  formulation, platform, images, expected, monkeypatch
):
  monkeypatch.setattr(jax, "default_backend", lambda: platform)
  x = normal(0, images, 2, 3, 4)
  maps = layers.enter(jnp.asarray(x), formulation)
  form = formulations.Formulation(expected)
  np.testing.assert_array_equal(form.plain(maps), x)
  assert layers.channels(maps) == 4


def test_losses_get_the_arrays_of_maps_and_their_batch_axis(form):
  plain = [normal(0, 5, 2, 3, 4), normal(1, 5, 1, 2, 7)]
  arrays, batch_axis = layers.arrays_of([form.maps(x) for x in plain])
  assert batch_axis == {"lax": 0, "split": 3}[form.name]
  assert len(arrays) == 2
  for array, x in zip(arrays, plain, strict=True):
    np.testing.assert_array_equal(
      np.moveaxis(array, batch_axis, 0),
      x if form.name == "lax" else x.transpose(0, 3, 1, 2),
    )


# --- convolution ------------------------------------------------------------

# Odd and even sides, sides below the kernel's, one image, one channel.
SHAPES = [
  ((2, 6, 6, 3), 4),
  ((2, 7, 7, 1), 5),
  ((3, 5, 8, 2), 1),
  ((1, 4, 3, 5), 3),
  ((2, 1, 1, 4), 4),
]


@pytest.mark.parametrize(("shape", "outputs"), SHAPES, ids=str)
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 3, 5])
@pytest.mark.parametrize("remat", [False, True])
def test_convolution_pads_symmetrically_as_torch_does(
  remat, size, stride, shape, outputs, form
):
  """Values, and the gradients of both operands, as the definition has them."""
  x = normal(0, *shape)
  kernel = normal(1, size, size, shape[-1], outputs)
  layer = layers.Convolution(outputs, size, stride, remat=remat)
  expected = reference.convolution(x, kernel, stride)
  cotangent = normal(2, *expected.shape)

  @jax.jit
  def run(x, kernel, cotangent):
    y, pull = jax.vjp(
      lambda x, kernel: form.apply(layer, {"params": {"kernel": kernel}}, x),
      x,
      kernel,
    )
    return y, pull(cotangent)

  y, (from_x, from_kernel) = run(x, kernel, cotangent)
  # Single precision over at most 125 terms here.
  assert relative_error(y, expected) < 2e-6
  gradients = reference.convolution_gradients(x, kernel, cotangent, stride)
  assert relative_error(from_x, gradients["x"]) < 2e-6
  assert relative_error(from_kernel, gradients["kernel"]) < 2e-6


def test_convolution_has_a_kernel_and_no_bias():
  shapes = jax.eval_shape(
    layers.Convolution(6).init, jax.random.key(0), jnp.zeros((1, 4, 4, 5))
  )
  assert list(shapes) == ["params"]
  assert list(shapes["params"]) == ["kernel"]
  assert shapes["params"]["kernel"].shape == (3, 3, 5, 6)


@pytest.mark.parametrize("size", [2, 4])
def test_a_kernel_without_a_middle_is_refused(size, form):
  """The formulations would not even agree on the shape of the result."""
  with pytest.raises(ValueError, match=f"size is {size}: .*odd"):
    layers.Convolution(4, size).init(
      jax.random.key(0), form.maps(jnp.zeros((1, 6, 6, 3)))
    )


# --- the rest ---------------------------------------------------------------


def test_dense_is_a_product_and_a_bias():
  x, kernel, bias = normal(0, 5, 7), normal(1, 7, 3), normal(2, 3)
  params = {"kernel": kernel, "bias": bias}
  y = layers.Dense(3).apply({"params": params}, x)
  expected = x.astype(np.float64) @ kernel + bias
  np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


def test_pooling_takes_the_mean_of_each_map(form):
  x = normal(0, 2, 3, 5, 4)
  y = layers.GlobalAveragePool().apply({}, form.maps(x))
  expected = x.astype(np.float64).reshape(2, 15, 4).sum(1) / 15
  np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)


def test_adapter_maps_channels_pixel_by_pixel(form):
  x, cotangent = normal(0, 2, 3, 5, 4), normal(3, 2, 3, 5, 6)
  kernel, bias = normal(1, 1, 1, 4, 6), normal(2, 6)
  params = {"kernel": kernel, "bias": bias}

  def adapt(x, params):
    return form.apply(layers.Adapter(6), {"params": params}, x)

  y, pull = jax.vjp(adapt, x, params)
  expected = x.astype(np.float64) @ kernel[0, 0] + bias
  np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
  from_x, from_params = pull(cotangent)
  gradients = reference.convolution_gradients(x, kernel, cotangent)
  assert relative_error(from_x, gradients["x"]) < 2e-6
  assert relative_error(from_params["kernel"], gradients["kernel"]) < 2e-6
  assert relative_error(from_params["bias"], cotangent.sum((0, 1, 2))) < 2e-6


# --- bfloat16 ---------------------------------------------------------------


@pytest.mark.parametrize(
  "module",
  [layers.Convolution(4, dtype=jnp.bfloat16), layers.Adapter(4)],
  ids=["convolution", "adapter"],
)
def test_bfloat16_layers_keep_float32_kernels(module, form):
  # An adapter computes in the type of the features it is given.
  x = jnp.asarray(normal(0, 2, 5, 5, 3), jnp.bfloat16)
  variables = module.init(jax.random.key(0), form.maps(x))
  assert all(v.dtype == jnp.float32 for v in jax.tree.leaves(variables))
  y = form.apply(module, variables, x)
  assert y.dtype == jnp.bfloat16
  kernel = bfloat16(variables["params"]["kernel"])
  expected = reference.convolution(bfloat16(x), kernel)
  expected += variables["params"].get("bias", 0)
  # The result is rounded once or twice; the operands above, exactly.
  np.testing.assert_allclose(
    y.astype(np.float32), expected, rtol=2 * HALF_STEP, atol=3 * HALF_STEP
  )
  gradients = jax.grad(lambda v: form.apply(module, v, x).sum())(variables)
  assert all(g.dtype == jnp.float32 for g in jax.tree.leaves(gradients))


def test_head_and_pool_return_float32_for_bfloat16_maps(form):
  x = jnp.asarray(normal(0, 2, 3, 3, 4), jnp.bfloat16)
  pooled = layers.GlobalAveragePool().apply({}, form.maps(x))
  assert pooled.dtype == jnp.float32
  np.testing.assert_allclose(
    pooled, np.asarray(x, np.float64).mean((1, 2)), rtol=1e-5, atol=1e-6
  )
  logits = layers.Dense(2).init_with_output(jax.random.key(0), pooled)[0]
  assert logits.dtype == jnp.float32


# --- initialisation ---------------------------------------------------------


def test_convolution_kernels_are_xavier_normal():
  kernel = layers.Convolution(96).init(
    jax.random.key(0), jnp.zeros((1, 3, 3, 32))
  )["params"]["kernel"]
  std = (2 / (9 * 32 + 9 * 96)) ** 0.5
  # 27,648 numbers: four standard errors of their spread are 1.7 %.
  np.testing.assert_allclose(np.std(kernel), std, rtol=0.017)
  np.testing.assert_allclose(np.mean(kernel), 0, atol=4 * std / 166)
  # Of a whole normal distribution, 4.55 % lie beyond two deviations; four
  # standard errors are 0.5 %. A truncated one has none there.
  beyond = np.mean(np.abs(kernel) > 2 * std)
  np.testing.assert_allclose(beyond, 0.0455, atol=0.005)


def test_numbers_do_not_depend_on_how_a_layer_is_initialised(form):
  plain = jnp.zeros((1, 3, 3, 4))
  x = form.maps(plain)
  rng = jax.random.key(3)
  for layer in (layers.Convolution(5), layers.Adapter(5)):
    eager = layer.init(rng, x)
    compiled = jax.jit(layer.init)(rng, x)
    chex.assert_trees_all_equal(eager, compiled)
    chex.assert_trees_all_equal(eager, layer.init(rng, plain))
    other = layer.init(jax.random.key(4), x)
    assert not np.array_equal(
      eager["params"]["kernel"], other["params"]["kernel"]
    )


def test_dense_kernels_are_xavier_normal_and_biases_uniform():
  params = layers.Dense(400).init(jax.random.key(0), jnp.zeros((1, 64)))[
    "params"
  ]
  std = (2 / (64 + 400)) ** 0.5
  # 25,600 numbers: four standard errors are 1.8 %.
  np.testing.assert_allclose(np.std(params["kernel"]), std, rtol=0.018)
  assert_uniform(params["bias"], 1 / 64**0.5)


def test_adapters_are_drawn_as_torch_draws_convolutions():
  params = layers.Adapter(500).init(
    jax.random.key(0), jnp.zeros((1, 2, 2, 25))
  )["params"]
  assert_uniform(params["kernel"], 1 / 25**0.5)
  assert_uniform(params["bias"], 1 / 25**0.5)


def assert_uniform(values, bound):
  """Fills +-bound, whose spread is bound / sqrt(3), and no more."""
  assert np.abs(values).max() <= bound
  assert values.min() < -0.97 * bound
  assert values.max() > 0.97 * bound
  np.testing.assert_allclose(np.std(values), bound / 3**0.5, rtol=0.1)
