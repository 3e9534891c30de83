import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ekd_jax.data import augment
from tests.reference import augment as reference


@pytest.fixture(autouse=True)
def strict_ranks():
  with jax.numpy_rank_promotion("raise"):
    yield


def _images(count, shape=(8, 8, 3)):
  # No zeros, so that padding can be told from pixels.
  rng = np.random.default_rng(count)
  return rng.integers(1, 256, (count, *shape), np.uint8)


def _all_choices(padding):
  """Every offset with and without the flip."""
  side = range(2 * padding + 1)
  grid = [(r, c, f) for r in side for c in side for f in (False, True)]
  return {
    "offset": jnp.array([choice[:2] for choice in grid], jnp.int32),
    "flip": jnp.array([choice[2] for choice in grid]),
  }


@pytest.mark.parametrize("padding", [0, 1, 4])
@pytest.mark.parametrize("shape", [(8, 8, 1), (6, 9, 3)])
def test_every_crop_and_flip_moves_pixels_as_the_reference_does(padding, shape):
  choices = _all_choices(padding)
  images = _images(len(choices["flip"]), shape)
  got = jax.jit(functools.partial(augment.apply, padding=padding))(
    images, choices
  )
  assert got.dtype == jnp.uint8
  wanted = [
    reference.crop_and_flip(image, tuple(offset), flip, padding)
    for image, offset, flip in zip(
      images,
      np.asarray(choices["offset"]),
      np.asarray(choices["flip"]),
      strict=True,
    )
  ]
  np.testing.assert_array_equal(got, np.stack(wanted))


@pytest.mark.parametrize("padding", [1, 4])
def test_a_reflected_margin_is_numpy_s(padding):
  choices = _all_choices(padding)
  images = _images(len(choices["flip"]), (6, 9, 3))
  got = augment.apply(images, choices, padding=padding, reflect=True)
  margin = (padding, padding)
  padded = np.pad(images, ((0, 0), margin, margin, (0, 0)), mode="reflect")
  for index, image in enumerate(padded):
    row, column = np.asarray(choices["offset"][index])
    wanted = image[row : row + 6, column : column + 9]
    if choices["flip"][index]:
      wanted = wanted[:, ::-1]
    np.testing.assert_array_equal(got[index], wanted)


def test_the_middle_offset_is_the_image_itself():
  images = _images(5)
  choices = {"offset": jnp.full((5, 2), 4), "flip": jnp.zeros((5,), bool)}
  np.testing.assert_array_equal(
    augment.apply(images, choices, padding=4), images
  )


def test_every_choice_is_drawn_and_none_outside():
  choices = augment.draw(jax.random.key(0), 20_000, padding=4, flip=True)
  offset, flip = np.asarray(choices["offset"]), np.asarray(choices["flip"])
  assert offset.dtype == np.int32
  assert flip.dtype == np.bool_
  assert offset.shape == (20_000, 2)
  assert flip.shape == (20_000,)
  assert (offset.min(), offset.max()) == (0, 8)
  cells = np.bincount((offset[:, 0] * 9 + offset[:, 1]) * 2 + flip)
  # 162 equally likely outcomes, 123 expected of each, deviation 11.
  assert cells.size == 162
  assert cells.min() > 123 - 5 * 11
  assert cells.max() < 123 + 5 * 11


def test_no_flip_where_none_is_wanted():
  choices = augment.draw(jax.random.key(0), 100, padding=1, flip=False)
  assert not choices["flip"].any()
  assert np.unique(choices["offset"]).tolist() == [0, 1, 2]


def test_the_same_key_draws_the_same_and_another_key_does_not():
  draw = functools.partial(augment.draw, padding=4, flip=True)
  first, again = draw(jax.random.key(1), 64), draw(jax.random.key(1), 64)
  other = draw(jax.random.key(2), 64)
  jitted = jax.jit(draw, static_argnums=1)(jax.random.key(1), 64)
  for name in ("offset", "flip"):
    np.testing.assert_array_equal(first[name], again[name])
    np.testing.assert_array_equal(first[name], jitted[name])
    assert (first[name] != other[name]).any()


def test_offset_and_flip_are_independent():
  choices = augment.draw(jax.random.key(0), 20_000, padding=4, flip=True)
  together = np.column_stack([choices["offset"], choices["flip"]])
  correlation = np.corrcoef(together, rowvar=False)
  assert np.abs(correlation - np.eye(3)).max() < 0.03


def test_devices_that_share_a_batch_augment_it_as_one_would():
  devices = jax.local_device_count()
  rows = 4
  images = _images(devices * rows)
  key = jax.random.key(5)

  def whole(images):
    choices = augment.draw(key, len(images), padding=2, flip=True)
    return augment.apply(images, choices, padding=2)

  def share(images):
    choices = augment.draw(key, devices * rows, padding=2, flip=True)
    start = jax.lax.axis_index("batch") * rows
    mine = {
      name: jax.lax.dynamic_slice_in_dim(choice, start, rows)
      for name, choice in choices.items()
    }
    return augment.apply(images, mine, padding=2)

  shared = jax.pmap(share, axis_name="batch")(
    images.reshape(devices, rows, *images.shape[1:])
  )
  np.testing.assert_array_equal(
    shared.reshape(images.shape), whole(jnp.asarray(images))
  )


@pytest.mark.parametrize("rows", [1, 3, 6])
def test_the_rows_of_a_batch_do_not_depend_on_each_other(rows):
  images = _images(6)
  choices = augment.draw(jax.random.key(5), 6, padding=2, flip=True)
  part = {name: choice[:rows] for name, choice in choices.items()}
  np.testing.assert_array_equal(
    augment.apply(images[:rows], part, padding=2),
    augment.apply(images, choices, padding=2)[:rows],
  )


def test_normalize_is_the_reference():
  images = np.arange(256, dtype=np.uint8).reshape(2, 8, 16, 1)
  images = np.concatenate([images] * 3, -1)
  mean, std = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
  got = augment.normalize(images, mean=mean, std=std)
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(
    got, reference.normalize(images, mean, std), rtol=0, atol=1e-6
  )


def test_what_is_not_a_batch_of_bytes_is_refused():
  choices = augment.draw(jax.random.key(0), 4, padding=1, flip=True)
  with pytest.raises(AssertionError):
    augment.apply(_images(4).astype(np.float32), choices, padding=1)
  with pytest.raises(AssertionError):
    augment.apply(_images(3), choices, padding=1)
  with pytest.raises(AssertionError):
    augment.normalize(_images(3), mean=(0.5,), std=(0.5,))
