"""Augmentation inside the compiled step: a random crop and a random flip.

It is split in two. `draw` makes the random choices of a whole GLOBAL batch
from one key; `apply` carries them out and is deterministic. A device that
trains on rows 32 to 63 draws the choices of all 128 rows (some hundred
integers, so it costs nothing) and applies rows 32 to 63 of them: an image is
cropped the same way whether 1, 4 or 8 devices share the batch.

Both work on uint8 images, because moving one byte per pixel is cheaper than
moving four, and because it leaves the pixels exactly as they were.
"""

from collections.abc import Sequence

import chex
import jax
import jax.numpy as jnp
import numpy as np


def draw(
  rng: jax.Array, batch_size: int, *, padding: int, flip: bool
) -> dict[str, jax.Array]:
  """Draws the augmentation of every image of a global batch.

  Args:
    rng: one key per step, the same on every device.
    batch_size: images in the global batch; static.
    padding: pixels that `apply` adds on each side; static.
    flip: whether images may be mirrored; static.

  Returns:
    "offset": int32 [batch_size, 2], the top-left corner (row, column) of the
      crop in the padded image, uniform in [0, 2 * padding]; `padding` is the
      image as it was.
    "flip": bool [batch_size], true with probability 1/2, or all false.
  """
  offset_rng, flip_rng = jax.random.split(rng)
  offset = jax.random.randint(
    offset_rng, (batch_size, 2), 0, 2 * padding + 1, jnp.int32
  )
  if flip:
    mirrored = jax.random.bernoulli(flip_rng, 0.5, (batch_size,))
  else:
    mirrored = jnp.zeros((batch_size,), jnp.bool_)
  return {"offset": offset, "flip": mirrored}


def apply(
  images: jax.Array,
  choices: dict[str, jax.Array],
  *,
  padding: int,
  reflect: bool = False,
) -> jax.Array:
  """Pads, crops at the chosen offset, mirrors left-right.

  Args:
    images: uint8 [N, H, W, C].
    choices: the rows of `draw`'s result that belong to these images:
      "offset" int32 [N, 2] in [0, 2 * padding], "flip" bool [N].
    padding: as given to `draw`; static.
    reflect: whether the padding is the image mirrored at its border, the
      outermost pixels not repeated, and not zeros; static. It must then be
      less than H and W.

  Returns:
    uint8 [N, H, W, C]: every pixel is one of the image's own or zero.
  """
  chex.assert_rank(images, 4)
  chex.assert_type(images, jnp.uint8)
  chex.assert_shape(choices["offset"], (images.shape[0], 2))
  chex.assert_shape(choices["flip"], (images.shape[0],))
  size = images.shape[1:]
  margin = (padding, padding)
  padded = jnp.pad(
    images,
    ((0, 0), margin, margin, (0, 0)),
    mode="reflect" if reflect else "constant",
  )

  def crop(image: jax.Array, offset: jax.Array) -> jax.Array:
    return jax.lax.dynamic_slice(image, (offset[0], offset[1], 0), size)

  cropped = jax.vmap(crop)(padded, choices["offset"])
  mirrored = choices["flip"][:, None, None, None]
  return jnp.where(mirrored, cropped[:, :, ::-1, :], cropped)


def enlarge(images: jax.Array, side: int | None) -> jax.Array:
  """Scales images up, bilinearly.

  On the device, because there a small set stays small: 49 times the pixels of
  CIFAR's would have to be stored or sent otherwise.

  Args:
    images: uint8 [N, H, W, C].
    side: height and width of the result; None for the images as they are.

  Returns:
    uint8 [N, side, side, C], rounded.
  """
  chex.assert_rank(images, 4)
  chex.assert_type(images, jnp.uint8)
  if side is None or images.shape[1:3] == (side, side):
    return images
  shape = (images.shape[0], side, side, images.shape[3])
  larger = jax.image.resize(images.astype(jnp.float32), shape, "bilinear")
  return jnp.round(larger).astype(jnp.uint8)


def normalize(
  images: jax.Array,
  *,
  mean: Sequence[float],
  std: Sequence[float],
) -> jax.Array:
  """Maps pixels 0..255 to (pixel / 255 - mean) / std, channel by channel.

  Args:
    images: uint8 [..., C].
    mean: C numbers, black = 0 and white = 1.
    std: C numbers in the same unit.

  Returns:
    float32 [..., C].
  """
  chex.assert_type(images, jnp.uint8)
  chex.assert_axis_dimension(images, -1, len(mean))
  # One multiply and one add; the constants are made in float64.
  std = np.asarray(std, np.float64)
  channels = (1,) * (images.ndim - 1) + (len(mean),)
  scale = np.float32(1.0 / (255.0 * std)).reshape(channels)
  shift = np.float32(-np.asarray(mean, np.float64) / std).reshape(channels)
  return images.astype(jnp.float32) * scale + shift
