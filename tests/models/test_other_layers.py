"""Layers that CIFAR ResNets have no use for, against NumPy, in both layouts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ekd_jax.models import layers
from tests.models.formulations import normal, relative_error
from tests.reference import layers as reference


def gradients_by_difference(function, x, cotangent, step=1e-3):
  """Of sum(cotangent * function(x)), one direction per element of x."""
  found = np.zeros(x.shape)
  for index in np.ndindex(x.shape):
    moved = np.array([x, x], np.float64)
    moved[0][index] += step
    moved[1][index] -= step
    up, down = (np.sum(cotangent * function(m)) for m in moved)
    found[index] = (up - down) / (2 * step)
  return found


def pulled_back(form, function, x, cotangent):
  """Our gradient of the same."""

  @jax.jit
  def run(x):
    y, pull = jax.vjp(lambda x: form.plain(function(form.maps(x))), x)
    return y, pull(cotangent)[0]

  return run(x)


@pytest.mark.parametrize(
  ("sides", "size", "stride", "padding"),
  [
    ((5, 7), 1, 1, "even"),
    ((5, 7), 1, 2, "even"),
    ((5, 7), 3, 1, "even"),
    ((5, 7), 3, 2, "even"),
    ((6, 8), 3, 2, "even"),
    ((5, 7), 3, 1, "late"),
    ((5, 7), 3, 2, "late"),
    ((6, 8), 3, 2, "late"),
    ((5, 7), 5, 1, "even"),
    ((6, 8), 5, 2, "even"),
    ((5, 7), 5, 2, "late"),
    ((6, 8), 7, 2, "even"),
  ],
)
@pytest.mark.parametrize(
  ("groups", "inputs", "outputs"), [(1, 3, 4), (2, 4, 6), (4, 4, 4)]
)
def test_convolutions_in_groups_and_with_either_padding(
  sides, groups, inputs, outputs, size, stride, padding, form
):
  x = normal(0, 2, *sides, inputs)
  kernel = normal(1, size, size, inputs // groups, outputs)
  layer = layers.Convolution(
    outputs, size, stride, groups=groups, padding=padding
  )
  total = max(size - stride, 0) if padding == "late" else size - 1
  pads = total // 2, total - total // 2

  def expected(x, kernel):
    return reference.padded_convolution(x, kernel, stride, *pads, groups)

  cotangent = normal(2, *expected(x, kernel).shape)

  @jax.jit
  def run(x, kernel):
    y, pull = jax.vjp(
      lambda x, kernel: form.apply(layer, {"params": {"kernel": kernel}}, x),
      x,
      kernel,
    )
    return y, pull(cotangent)

  y, (from_x, from_kernel) = run(x, kernel)
  assert relative_error(y, expected(x, kernel)) < 2e-6
  # It is linear in both, so differences are exact but for rounding.
  into_x, into_y = float(np.sum(from_x * x)), float(np.sum(y * cotangent))
  assert into_x == pytest.approx(into_y, rel=1e-4)
  if size == 3 and stride == 2 and sides == (5, 7):
    by_x = gradients_by_difference(lambda x: expected(x, kernel), x, cotangent)
    by_kernel = gradients_by_difference(
      lambda kernel: expected(x, kernel), kernel, cotangent
    )
    assert relative_error(from_x, by_x) < 1e-5
    assert relative_error(from_kernel, by_kernel) < 1e-5


def _max_pool_in_place(maps):
  return layers.max_pool(maps, 1)


@pytest.mark.parametrize("sides", [(6, 8), (5, 7), (1, 2)])
@pytest.mark.parametrize(
  ("pool", "window"),
  [
    (layers.max_pool, (3, 2, 1)),
    (_max_pool_in_place, (3, 1, 1)),
    (layers.max_pool_squares, (2, 2, 0)),
  ],
)
def test_max_pooling(pool, window, sides, form):
  if sides == (1, 2) and window[0] == 2:
    sides = (2, 2)
  x = normal(0, 2, *sides, 3)

  def expected(x):
    return reference.pool(x, *window, np.max, -np.inf)

  cotangent = normal(1, *expected(x).shape)
  y, gradient = pulled_back(form, pool, x, cotangent)
  np.testing.assert_array_equal(y, expected(x).astype(np.float32))
  by_x = gradients_by_difference(expected, x, cotangent, step=1e-5)
  np.testing.assert_allclose(gradient, by_x, atol=1e-4)


@pytest.mark.parametrize("sides", [(6, 8), (5, 7)])
def test_average_pooling_leaves_an_odd_row_out(sides, form):
  x = normal(0, 2, *sides, 3)
  whole = x[:, : sides[0] // 2 * 2, : sides[1] // 2 * 2]
  expected = reference.pool(whole, 2, 2, 0, np.mean, 0)
  cotangent = normal(1, *expected.shape)
  y, gradient = pulled_back(form, layers.average_pool, x, cotangent)
  np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
  by_x = np.zeros_like(x)
  spread = cotangent.repeat(2, 1).repeat(2, 2) / 4
  by_x[:, : spread.shape[1], : spread.shape[2]] = spread
  np.testing.assert_allclose(gradient, by_x, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
  "pool", [layers.max_pool, _max_pool_in_place, layers.max_pool_squares]
)
def test_of_equal_numbers_one_has_the_gradient(pool, form):
  """A window's gradient goes somewhere in it once, also where all are 0."""
  x = np.zeros((2, 4, 4, 3), np.float32)
  cotangent = np.ones(pool(jnp.array(x)).shape, np.float32)
  _, gradient = pulled_back(form, pool, x, cotangent)
  assert gradient.sum() == cotangent.size


@pytest.mark.parametrize("sides", [(3, 5), (1, 1)])
def test_a_transposed_convolution_doubles_the_sides(sides, form):
  """torch's ConvTranspose2d(3, stride=2, padding=1, output_padding=1)."""
  x, kernel = normal(0, 2, *sides, 3), normal(1, 3, 3, 3, 4)
  height, width = sides
  # Each pixel adds the kernel, times its value, around twice its place.
  full = np.zeros((2, 2 * height + 2, 2 * width + 2, 4))
  for row in range(height):
    for column in range(width):
      added = np.einsum("nc,hwco->nhwo", x[:, row, column], kernel)
      full[:, 2 * row : 2 * row + 3, 2 * column : 2 * column + 3] += added
  expected = full[:, 1:-1, 1:-1]
  layer = layers.TransposedConvolution(4)
  turned = {"params": {"kernel": kernel[::-1, ::-1]}}
  y = form.apply(layer, turned, x)
  assert relative_error(y, expected) < 2e-6


@pytest.mark.parametrize("size", [1, 3])
def test_a_bias_is_added_to_every_pixel(size, form):
  x, kernel = normal(0, 2, 4, 5, 3), normal(1, size, size, 3, 4)
  bias = normal(2, 4)
  layer = layers.Convolution(4, size, use_bias=True)
  y = form.apply(layer, {"params": {"kernel": kernel, "bias": bias}}, x)
  expected = reference.convolution(x, kernel) + bias
  assert relative_error(y, expected) < 2e-6


def test_momentum_is_what_running_statistics_keep(form):
  x = normal(0, 4, 3, 3, 2, mean=2.0)
  variables = {
    "params": {"scale": np.ones(2), "bias": np.zeros(2)},
    "batch_stats": {"mean": np.full(2, 5.0), "var": np.full(2, 7.0)},
  }
  layer = layers.BatchNormReLU(momentum=0.1)
  _, statistics = form.train_norm(layer, variables, x)
  mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
  np.testing.assert_allclose(statistics["mean"], 0.5 + 0.9 * mean, rtol=1e-5)
  np.testing.assert_allclose(statistics["var"], 0.7 + 0.9 * var, rtol=1e-5)


def test_maps_side_by_side_have_all_channels(form):
  maps = [
    normal(seed, 2, 3, 4, channels) for seed, channels in ((0, 2), (1, 3))
  ]
  together = layers.concatenate([form.maps(x) for x in maps])
  np.testing.assert_array_equal(
    form.plain(together), np.concatenate(maps, axis=3)
  )


def test_swish(form):
  x = normal(0, 2, 3, 4, 5, std=3)
  cotangent = normal(1, *x.shape)

  def expected(x):
    return x / (1 + np.exp(-x))

  y, gradient = pulled_back(form, layers.swish, x, cotangent)
  x = x.astype(np.float64)
  np.testing.assert_allclose(y, expected(x), rtol=1e-5, atol=1e-6)
  slope = (expected(x + 1e-4) - expected(x - 1e-4)) / 2e-4
  np.testing.assert_allclose(gradient, slope * cotangent, atol=1e-5)


def test_appended_channels_come_last(form):
  x, new = normal(0, 2, 3, 4, 5), normal(1, 2, 3, 4, 2)
  cotangent = normal(2, 2, 3, 4, 7)

  @jax.jit
  def run(x, new):
    y, pull = jax.vjp(
      lambda *both: form.plain(layers.append(*map(form.maps, both))), x, new
    )
    return y, pull(cotangent)

  y, (from_x, from_new) = run(x, new)
  np.testing.assert_array_equal(y, np.concatenate([x, new], 3))
  np.testing.assert_array_equal(from_x, cotangent[..., :5])
  np.testing.assert_array_equal(from_new, cotangent[..., 5:])


def test_squeeze_and_excite(form):
  x = normal(0, 3, 4, 5, 6)
  params = {
    "reduce": {"kernel": normal(1, 6, 2), "bias": normal(2, 2)},
    "expand": {"kernel": normal(3, 2, 6), "bias": normal(4, 6)},
  }
  means = x.astype(np.float64).mean((1, 2))
  hidden = means @ params["reduce"]["kernel"] + params["reduce"]["bias"]
  hidden = hidden / (1 + np.exp(-hidden))
  gate = hidden @ params["expand"]["kernel"] + params["expand"]["bias"]
  expected = x / (1 + np.exp(-gate))[:, None, None]
  y = form.apply(layers.SqueezeExcite(2), {"params": params}, x)
  assert relative_error(y, expected) < 1e-5


# --- what is random ---------------------------------------------------------


def apply_noise(form, layer, x, seed=0):
  y = layer.apply(
    {}, form.maps(x), train=True, rngs={"dropout": jax.random.key(seed)}
  )
  return np.asarray(form.plain(y))


def test_drop_connect_drops_whole_images_and_keeps_the_mean(form):
  x = normal(0, 4000, 1, 2, 3)
  y = apply_noise(form, layers.DropConnect(0.2), x)
  kept = (y != 0).all((1, 2, 3))
  assert ((y == 0).all((1, 2, 3)) | kept).all()
  np.testing.assert_allclose(y[kept], x[kept] / 0.8, rtol=1e-6)
  # Four standard deviations of a binomial.
  assert abs(kept.mean() - 0.8) < 4 * (0.16 / 4000) ** 0.5
  assert (apply_noise(form, layers.DropConnect(0.2), x) == y).all()
  assert (apply_noise(form, layers.DropConnect(0.2), x, seed=1) != y).any()


def test_dropout_drops_elements_and_keeps_the_mean():
  x = normal(0, 200, 50)
  y = np.asarray(
    layers.Dropout(0.5).apply(
      {}, x, train=True, rngs={"dropout": jax.random.key(0)}
    )
  )
  kept = y != 0
  np.testing.assert_allclose(y[kept], 2 * x[kept], rtol=1e-6)
  assert abs(kept.mean() - 0.5) < 4 * (0.25 / x.size) ** 0.5
  # Neither by rows nor by columns.
  assert 0 < kept[0].mean() < 1
  assert 0 < kept[:, 0].mean() < 1


@pytest.mark.parametrize("train", [False, True])
def test_nothing_is_dropped_in_evaluation_or_at_rate_0(train, form):
  x = normal(0, 8, 2, 2, 3)
  rate = 0.0 if train else 0.5
  y = layers.DropConnect(rate).apply({}, form.maps(jnp.array(x)), train=train)
  np.testing.assert_array_equal(form.plain(y), x)
  y = layers.Dropout(rate).apply({}, x[:, 0, 0], train=train)
  np.testing.assert_array_equal(y, x[:, 0, 0])


def test_dropout_of_maps_is_the_same_in_both_formulations(form):
  x = normal(0, 6, 3, 4, 5)
  rngs = {"dropout": jax.random.key(0)}
  y = form.apply(layers.Dropout(0.3), {}, x, train=True, rngs=rngs)
  plain = layers.Dropout(0.3).apply({}, x, train=True, rngs=rngs)
  np.testing.assert_array_equal(y, plain)
  kept = np.asarray(y) != 0
  np.testing.assert_allclose(y[kept], x[kept] / 0.7, rtol=1e-6)
  assert abs(kept.mean() - 0.7) < 4 * (0.21 / x.size) ** 0.5


def test_what_is_dropped_does_not_depend_on_the_number_of_devices():
  x = jnp.ones((8, 5))

  def dropped(devices):
    layer = layers.Dropout(0.5, axis_name="batch")

    def of_device(x):
      key = jax.random.key(3)
      return layer.apply({}, x, train=True, rngs={"dropout": key})

    run = jax.pmap(
      of_device, axis_name="batch", devices=jax.devices()[:devices]
    )
    return np.asarray(run(x.reshape(devices, -1, 5))).reshape(8, 5)

  np.testing.assert_array_equal(dropped(1), dropped(4))
  assert (dropped(1) == 0).any()


# --- initialisation ---------------------------------------------------------


@pytest.mark.parametrize(
  ("init", "std"),
  [
    # 3 x 3 kernels from 40 to 50 channels.
    (layers.fan_out_normal, (2 / (9 * 50)) ** 0.5),
    (layers.uniform(9 * 40), (9 * 40) ** -0.5 / 3**0.5),
  ],
  ids=["fan_out_normal", "uniform"],
)
def test_kernels_are_drawn_with_the_deviation_on_paper(init, std):
  kernel = np.asarray(init(jax.random.key(0), (3, 3, 40, 50), jnp.float32))
  assert kernel.std() == pytest.approx(std, rel=0.03)
  assert abs(kernel.mean()) < 4 * std / kernel.size**0.5
