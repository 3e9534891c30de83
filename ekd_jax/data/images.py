"""From the bytes of one image file to the pixels that a network is given.

Everything here is NumPy and Pillow and runs in worker processes. What becomes
of unusual files is decided in one place (`decode`):

    grey, palette, CMYK, transparent   converted to RGB
    16 bits per channel, floats        refused: what is white is not known
    cut short, not an image            refused

Two ways to vary an image while training are offered, each with its own view of
a test image (`Crop`).
"""

import io
from typing import Literal

import numpy as np
from PIL import Image

# random_resized: a random part of the image, of 8 to 100 % of its area and 3:4
# to 4:3 wide, scaled to the size; test images are scaled to 8/7 of it, the
# middle is taken. What nearly all published ImageNet results use.
# rotated: scaled to the size whatever its proportions, a margin of 50/224,
# turned by up to 10 degrees, and a random part of the size; test images are
# scaled only. What the EKD paper did.
Crop = Literal["random_resized", "rotated"]

_AREA = (0.08, 1.0)
_PROPORTION = (3 / 4, 4 / 3)
_TRIES = 10
_TEST_SCALE = 8 / 7
_MARGIN = 50 / 224
_DEGREES = 10.0

# What Pillow raises for files that are no image, or only the start of one; a
# SyntaxError is its word for a broken PNG, a DecompressionBombError for one
# that would fill the memory.
_DAMAGE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)
_SIXTEEN_BITS = ("I", "F")


class BrokenImageError(Exception):
  """A file that is not an image which can be used; says why."""


def decode(content: bytes) -> Image.Image:
  """The image in a file, as RGB.

  Args:
    content: the whole file: JPEG, PNG or whatever else Pillow reads.

  Raises:
    BrokenImageError: it is damaged, or has more than 8 bits per channel.
  """
  try:
    image = Image.open(io.BytesIO(content))
    if image.mode.startswith(_SIXTEEN_BITS) or _is_cut_to_8_bits(image):
      raise BrokenImageError(
        f"it has more than 8 bits per channel (mode {image.mode})"
      )
    image.load()
    if image.mode == "P":  # Else transparency in the palette is warned of.
      image = image.convert("RGBA")
    return image.convert("RGB")
  except _DAMAGE as error:
    reason = " ".join(str(error).split())[:200]
    raise BrokenImageError(reason or type(error).__name__) from error


def _is_cut_to_8_bits(image: Image.Image) -> bool:
  """Whether Pillow would read colours of 16 bits as their upper bytes.

  How the file has them is not in `mode` but in what its decoder is told:
  "RGB;16B", and of a PPM the largest number.
  """
  for tile in image.tile:
    told = tile.args if isinstance(tile.args, tuple) else (tile.args,)
    if any(isinstance(word, str) and ";16" in word for word in told):
      return True
    if tile.codec_name.startswith("ppm") and told[-1] > 255:
      return True
  return False


def for_training(
  image: Image.Image, side: int, crop: Crop, source: np.random.Generator
) -> np.ndarray:
  """A random view of an image; mirrored half of the time.

  Args:
    image: RGB, of any size.
    side: of the view, in pixels.
    crop: which kind of view.
    source: what is random in it.

  Returns:
    uint8 [side, side, 3].
  """
  if crop == "rotated":
    image = _scaled(image, side, side)
    margin = round(_MARGIN * side)
    canvas = Image.new("RGB", (side + 2 * margin,) * 2)
    canvas.paste(image, (margin, margin))
    degrees = source.uniform(-_DEGREES, _DEGREES)
    canvas = canvas.rotate(degrees, Image.Resampling.BILINEAR)
    left, top = source.integers(0, 2 * margin + 1, 2).tolist()
    view = canvas.crop((left, top, left + side, top + side))
  else:
    box = _random_part(image.size, source)
    view = image.resize((side, side), Image.Resampling.BILINEAR, box)
  pixels = np.asarray(view)
  return pixels[:, ::-1] if source.random() < 0.5 else pixels


def for_testing(image: Image.Image, side: int, crop: Crop) -> np.ndarray:
  """The one view that is evaluated: uint8 [side, side, 3]."""
  if crop == "rotated":
    return np.asarray(_scaled(image, side, side))
  scale = round(_TEST_SCALE * side) / min(image.size)
  width, height = (max(side, round(scale * length)) for length in image.size)
  image = _scaled(image, width, height)
  left, top = (width - side) // 2, (height - side) // 2
  return np.asarray(image.crop((left, top, left + side, top + side)))


def _scaled(image: Image.Image, width: int, height: int) -> Image.Image:
  if image.size == (width, height):
    return image
  return image.resize((width, height), Image.Resampling.BILINEAR)


def _random_part(
  size: tuple[int, int], source: np.random.Generator
) -> tuple[int, int, int, int]:
  """Left, top, right, bottom of the part; a middle one where none fits."""
  width, height = size
  for _ in range(_TRIES):
    area = width * height * source.uniform(*_AREA)
    proportion = np.exp(source.uniform(*np.log(_PROPORTION)))
    wide, high = (
      round((area * proportion) ** 0.5),
      round((area / proportion) ** 0.5),
    )
    if 0 < wide <= width and 0 < high <= height:
      left = int(source.integers(0, width - wide + 1))
      top = int(source.integers(0, height - high + 1))
      return left, top, left + wide, top + high
  wide = min(width, max(1, round(height * _PROPORTION[1])))
  high = min(height, max(1, round(width / _PROPORTION[0])))
  left, top = (width - wide) // 2, (height - high) // 2
  return left, top, left + wide, top + high
