"""Batch norm against NumPy: values, statistics, gradients, devices.

In both formulations.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ekd_jax.models import layers
from ekd_jax.training import parallel
from tests.models.formulations import HALF_STEP, bfloat16, normal
from tests.reference import layers as reference

CHANNELS = 3


def norm_variables(seed=7):
  """Random parameters and running statistics of a batch norm."""
  rng = np.random.default_rng(seed)

  def uniform(low, high):
    return rng.uniform(low, high, CHANNELS).astype(np.float32)

  return {
    "params": {"scale": uniform(0.5, 2), "bias": uniform(-1, 1)},
    "batch_stats": {"mean": uniform(-1, 1), "var": uniform(0.5, 2)},
  }


def reference_norm(variables, x, mean, var, **kwargs):
  """What NumPy makes of it."""
  params = variables["params"]
  return reference.batch_norm_relu(
    x, params["scale"], params["bias"], mean, var, **kwargs
  )


# --- batch norm on one device -----------------------------------------------


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("batch", [1, 4])
def test_training_normalises_with_the_batch(relu, with_residual, batch, form):
  variables = norm_variables()
  x = normal(0, batch, 3, 5, CHANNELS, mean=1, std=3)
  residual = normal(1, *x.shape) if with_residual else None
  layer = layers.BatchNormReLU(relu=relu)
  y, _ = form.train_norm(layer, variables, x, residual)
  expected = reference_norm(
    variables, x, *reference.moments(x), residual=residual, relu=relu
  )
  np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
  # Both sides of the ReLU were seen.
  assert (y.min() == 0) if relu else (y.min() < 0 < y.max())


def test_running_statistics_take_a_tenth_of_the_biased_batch_statistics(form):
  variables = norm_variables()
  mean = variables["batch_stats"]["mean"].astype(np.float64)
  var = variables["batch_stats"]["var"].astype(np.float64)
  unbiased_var = var
  layer = layers.BatchNormReLU()
  for step in range(4):
    x = normal(step, 2, 3, 3, CHANNELS, mean=step, std=1 + step)
    _, stats = form.train_norm(layer, variables, x)
    variables = {**variables, "batch_stats": stats}
    batch_mean, batch_var = reference.moments(x)
    mean = reference.running(mean, batch_mean)
    var = reference.running(var, batch_var)
    unbiased_var = reference.running(unbiased_var, batch_var * 18 / 17)
  np.testing.assert_allclose(stats["mean"], mean, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(stats["var"], var, rtol=1e-5)
  # torch's formula would be far outside of this tolerance.
  assert (np.abs(unbiased_var / var - 1) > 0.02).all()


def test_evaluation_normalises_with_the_running_statistics(form):
  variables = norm_variables()
  x = normal(0, 2, 3, 3, CHANNELS, mean=5)
  residual = normal(1, *x.shape)
  layer = layers.BatchNormReLU()
  # Nothing is mutable here, so writing a statistic would be an error.
  y = form.apply(layer, variables, x, form.maps(residual), train=False)
  stats = variables["batch_stats"]
  expected = reference_norm(
    variables, x, stats["mean"], stats["var"], residual=residual
  )
  np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("keep_gradient", [True, False])
@pytest.mark.parametrize("relu", [True, False])
def test_batch_norm_gradients_equal_the_closed_form(relu, keep_gradient, form):
  variables = norm_variables()
  x = normal(0, 3, 4, 2, CHANNELS, mean=1, std=2)
  residual, cotangent = normal(1, *x.shape), normal(2, *x.shape)
  layer = layers.BatchNormReLU(relu=relu, keep_gradient=keep_gradient)

  def loss(params, x, residual):
    own = {**variables, "params": params}
    y, _ = form.train_norm(layer, own, x, residual)
    return jnp.sum(cotangent * y)

  params, from_x, from_residual = jax.grad(loss, (0, 1, 2))(
    variables["params"], x, residual
  )
  expected = reference.batch_norm_relu_gradients(
    x,
    variables["params"]["scale"],
    variables["params"]["bias"],
    cotangent,
    residual,
    relu,
  )
  actual = {**params, "x": from_x, "residual": from_residual}
  for name, value in expected.items():
    np.testing.assert_allclose(
      actual[name], value, rtol=1e-4, atol=1e-5, err_msg=name
    )


@pytest.mark.parametrize("deviations", [0, 1, -4])
def test_the_variance_about_a_large_mean_is_exact_where_the_running_one_is_near(
  deviations, form
):
  """The mean square less the squared mean would leave two digits of it."""
  x = normal(0, 8, 6, 6, CHANNELS, mean=1000, std=1)
  # Rounding the mean to float32 must not be what is measured.
  mean, var = reference.moments(x)
  naive = np.mean(x**2, (0, 1, 2)) - np.mean(x, (0, 1, 2)) ** 2
  assert np.abs(naive / var - 1).max() > 1e-3
  center = (mean + deviations).astype(np.float32)
  variables = norm_variables()
  # From a running variance of zero, a tenth of the batch's is what is left.
  variables["batch_stats"] = {"mean": center, "var": np.zeros_like(center)}
  layer = layers.BatchNormReLU(relu=False)
  y, stats = form.train_norm(layer, variables, x)
  # Of the mean square about the center, 1 + deviations^2, the 1 is wanted.
  np.testing.assert_allclose(
    stats["var"], 0.1 * var, rtol=3e-6 * (1 + deviations**2)
  )
  np.testing.assert_allclose(
    stats["mean"], reference.running(center, mean), rtol=2e-7
  )
  # The numbers themselves have four digits behind the point.
  np.testing.assert_allclose(
    y, reference_norm(variables, x, mean, var, relu=False), atol=1e-3
  )


@pytest.mark.parametrize("constant", [0.0, 0.1, 7.3, 1000.1, -333.3])
def test_a_constant_channel_stays_finite(constant, form):
  """E[x^2] - E[x]^2 of a constant may round to less than 0."""
  variables = norm_variables()
  x = normal(0, 3, 5, 5, CHANNELS)
  x[..., 1] = constant
  layer = layers.BatchNormReLU()

  def loss(x):
    y, stats = form.train_norm(layer, variables, x)
    return jnp.sum(y), (y, stats)

  gradient, (y, stats) = jax.grad(loss, has_aux=True)(x)
  assert np.isfinite(y).all()
  assert np.isfinite(gradient).all()
  assert np.isfinite(stats["var"]).all()
  assert stats["var"][1] >= 0.9 * variables["batch_stats"]["var"][1]
  # Its neighbours do not notice.
  expected = reference_norm(variables, x, *reference.moments(x))
  np.testing.assert_allclose(y[..., ::2], expected[..., ::2], atol=1e-5)


@pytest.mark.parametrize("keep_gradient", [True, False])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_comes_out_and_stays_in_its_channel(
  bad, keep_gradient, form
):
  variables = norm_variables()
  sound, cotangent = (normal(seed, 3, 5, 5, CHANNELS) for seed in (0, 1))
  x = sound.copy()
  x[1, 2, 3, 0] = bad
  layer = layers.BatchNormReLU(keep_gradient=keep_gradient)

  def loss(x):
    y, stats = form.train_norm(layer, variables, x)
    return jnp.sum(cotangent * y), (y, stats)

  gradient, (y, stats) = jax.grad(loss, has_aux=True)(x)
  for maps in (y, gradient):
    assert np.isnan(maps[..., 0]).any()
  assert not np.isfinite(stats["mean"][0])
  # The other channels are as if nothing had happened.
  params = variables["params"]
  mean, var = reference.moments(sound)
  expected = reference.batch_norm_relu_gradients(
    sound, params["scale"], params["bias"], cotangent
  )
  for actual, wanted in (
    (y, reference_norm(variables, sound, mean, var)),
    (gradient, expected["x"]),
    (
      stats["mean"],
      reference.running(variables["batch_stats"]["mean"], mean),
    ),
  ):
    np.testing.assert_allclose(
      actual[..., 1:], wanted[..., 1:], rtol=1e-4, atol=1e-5
    )


def test_initialising_in_training_leaves_the_statistics_at_zero_and_one(form):
  variables = layers.BatchNormReLU("batch").init(
    jax.random.key(0), form.maps(normal(0, 2, 2, 2, 4, mean=3)), train=True
  )
  expected = {
    "params": {"scale": np.ones(4), "bias": np.zeros(4)},
    "batch_stats": {"mean": np.zeros(4), "var": np.ones(4)},
  }
  jax.tree.map(np.testing.assert_array_equal, variables, expected)


# --- batch norm on several devices ------------------------------------------


def on_devices(form, axis_name, x, cotangent, residual):
  """Runs a batch norm on 4 devices: outputs, statistics and gradients."""
  devices = jax.devices()[:4]
  layer = layers.BatchNormReLU(axis_name)
  variables = norm_variables()

  def step(params, x, cotangent, residual):
    def loss(params, x):
      own = {**variables, "params": params}
      y, stats = form.train_norm(layer, own, x, residual)
      return jnp.sum(cotangent * y), (y, stats)

    return jax.grad(loss, (0, 1), has_aux=True)(params, x)

  (params, from_x), (y, stats) = parallel.per_device(step, devices)(
    parallel.replicate(variables["params"], devices),
    *parallel.shard((x, cotangent, residual), devices),
  )
  return (
    np.asarray(y).reshape(x.shape),
    jax.tree.map(np.asarray, stats),
    jax.tree.map(lambda g: np.asarray(g).sum(0), params),
    np.asarray(from_x).reshape(x.shape),
  )


def different_shards():
  """A batch whose quarters have different means and spreads."""
  x = np.concatenate(
    [normal(d, 2, 3, 3, CHANNELS, mean=2 * d, std=1 + d) for d in range(4)]
  )
  return x, normal(4, *x.shape), normal(5, *x.shape)


def test_statistics_over_devices_are_those_of_the_global_batch(form):
  x, cotangent, residual = different_shards()
  y, stats, params, from_x = on_devices(form, "batch", x, cotangent, residual)
  variables = norm_variables()
  mean, var = reference.moments(x)
  np.testing.assert_allclose(
    y,
    reference_norm(variables, x, mean, var, residual=residual),
    rtol=1e-4,
    atol=1e-5,
  )
  for name, batch in (("mean", mean), ("var", var)):
    expected = reference.running(variables["batch_stats"][name], batch)
    for device in range(4):
      np.testing.assert_allclose(stats[name][device], expected, rtol=1e-5)
  # Gradients cross the devices too.
  expected = reference.batch_norm_relu_gradients(
    x,
    variables["params"]["scale"],
    variables["params"]["bias"],
    cotangent,
    residual,
  )
  for name, actual in {**params, "x": from_x}.items():
    np.testing.assert_allclose(
      actual, expected[name], rtol=1e-4, atol=1e-5, err_msg=name
    )


def test_without_an_axis_name_every_device_uses_its_own_statistics(form):
  x, cotangent, residual = different_shards()
  y, stats, _, _ = on_devices(form, None, x, cotangent, residual)
  variables = norm_variables()
  for device in range(4):
    own = slice(2 * device, 2 * device + 2)
    mean, var = reference.moments(x[own])
    np.testing.assert_allclose(
      y[own],
      reference_norm(variables, x[own], mean, var, residual=residual[own]),
      rtol=1e-4,
      atol=1e-5,
    )
    for name, batch in (("mean", mean), ("var", var)):
      expected = reference.running(variables["batch_stats"][name], batch)
      np.testing.assert_allclose(stats[name][device], expected, rtol=1e-5)
  whole = reference_norm(variables, x, *reference.moments(x), residual=residual)
  assert np.abs(y - whole).max() > 0.5


# --- bfloat16 ---------------------------------------------------------------


def test_bfloat16_batch_norm_keeps_float32_statistics(form):
  variables = norm_variables()
  x = jnp.asarray(normal(0, 4, 5, 5, CHANNELS, mean=2), jnp.bfloat16)
  layer = layers.BatchNormReLU(dtype=jnp.bfloat16)
  y, stats = form.train_norm(layer, variables, x)
  assert y.dtype == jnp.bfloat16
  exact = np.asarray(x, np.float64)
  mean, var = reference.moments(exact)
  np.testing.assert_allclose(
    y.astype(np.float32),
    reference_norm(variables, exact, mean, var),
    rtol=HALF_STEP,
    atol=1e-5,
  )
  for name, batch in (("mean", mean), ("var", var)):
    assert stats[name].dtype == jnp.float32
    expected = reference.running(variables["batch_stats"][name], batch)
    # Thousands of times finer than bfloat16.
    np.testing.assert_allclose(stats[name], expected, rtol=2e-6)


@pytest.mark.parametrize("deviations", [0, 4])
def test_bfloat16_batch_norm_gradients_are_rounded_no_more_than_its_maps(
  deviations, form
):
  """However far the running mean is from that of the batch."""
  variables = norm_variables()
  x = bfloat16(normal(0, 8, 5, 5, CHANNELS))
  # It goes with x, and most of it cancels: what is kept of x shows.
  cotangent = bfloat16(x + 0.3 * normal(1, *x.shape))
  mean, var = reference.moments(x)
  variables["batch_stats"]["mean"] = np.float32(mean + deviations * var**0.5)
  layer = layers.BatchNormReLU(relu=False, dtype=jnp.bfloat16)

  def loss(x):
    y, _ = form.train_norm(layer, variables, x)
    return jnp.sum(cotangent * y.astype(jnp.float32))

  actual = jax.grad(loss)(x)
  params = variables["params"]
  expected = reference.batch_norm_relu_gradients(
    x, params["scale"], params["bias"], cotangent, relu=False
  )["x"]
  # The result is rounded; in the split formulation so is what is kept of x,
  # its distance to the running mean, which enters with a factor of up to 3.
  distance = {"lax": 0, "split": 4 + deviations}[form.name]
  tolerance = HALF_STEP * (1.1 * np.abs(expected).max() + 3 * distance)
  np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)


def test_a_residual_of_another_type_gets_a_gradient_of_its_own(form):
  layer = layers.BatchNormReLU(dtype=jnp.bfloat16)
  x, residual = normal(0, 2, 3, 3, CHANNELS), normal(1, 2, 3, 3, CHANNELS)

  def total(x, residual):
    y, _ = form.train_norm(layer, norm_variables(), x, residual)
    return y.astype(jnp.float32).sum()

  gradients = jax.grad(total, (0, 1))(x, residual)
  assert [g.dtype for g in gradients] == 2 * [jnp.dtype("float32")]
