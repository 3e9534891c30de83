"""Image files of every kind, and the views that networks are given."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from ekd_jax.data import images

RED = (250, 10, 20)


def encoded(image, form="PNG", **options):
  file = io.BytesIO()
  image.save(file, form, **options)
  return file.getvalue()


def gradient(width=40, height=30):
  """Red grows to the right, green downwards."""
  x, y = np.meshgrid(np.arange(width), np.arange(height))
  pixels = np.stack([255 * x // (width - 1), 255 * y // (height - 1), 0 * x], 2)
  return Image.fromarray(pixels.astype(np.uint8))


def source(seed=0):
  return np.random.default_rng(seed)


@pytest.mark.parametrize(
  ("image", "form", "expected"),
  [
    (Image.new("RGB", (3, 2), RED), "PNG", RED),
    (Image.new("L", (3, 2), 77), "PNG", (77, 77, 77)),
    (Image.new("1", (3, 2), 1), "PNG", (255, 255, 255)),
    (Image.new("RGBA", (3, 2), (*RED, 0)), "PNG", RED),
    (Image.new("LA", (3, 2), (77, 5)), "PNG", (77, 77, 77)),
    (Image.new("RGB", (3, 2), RED).quantize(2), "PNG", RED),
    (Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", (255, 0, 0)),
    (Image.new("L", (16, 16), 77), "JPEG", (77, 77, 77)),
  ],
  ids=lambda x: getattr(x, "mode", ""),
)
def test_every_kind_becomes_rgb(image, form, expected):
  found = images.decode(encoded(image, form))
  assert found.mode == "RGB"
  assert found.size == image.size
  np.testing.assert_allclose(np.asarray(found)[0, 0], expected, atol=3)


@pytest.mark.parametrize(
  ("number", "form"),
  [(np.uint16, "PNG"), (np.int32, "TIFF"), (np.float32, "TIFF")],
)
def test_more_than_8_bits_are_refused(number, form):
  content = encoded(Image.fromarray(np.full((2, 3), 40000, number)), form)
  with pytest.raises(images.BrokenImageError, match="more than 8 bits"):
    images.decode(content)


def png_of_16_bits(colour_type, channels):
  """By hand: Pillow cannot write one in colour."""

  def chunk(kind, data):
    body = kind + data
    return (
      struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))
    )

  header = struct.pack(">IIBBBBB", 3, 2, 16, colour_type, 0, 0, 0)
  row = b"\0" + np.full(3 * channels, 300, ">u2").tobytes()
  return (
    b"\x89PNG\r\n\x1a\n"
    + chunk(b"IHDR", header)
    + chunk(b"IDAT", zlib.compress(2 * row))
    + chunk(b"IEND", b"")
  )


@pytest.mark.parametrize(
  "content",
  [
    png_of_16_bits(2, 3),
    png_of_16_bits(4, 2),
    png_of_16_bits(6, 4),
    b"P6 3 2 65535\n" + np.full(18, 300, ">u2").tobytes(),
  ],
  ids=["RGB", "grey and alpha", "RGBA", "PPM"],
)
def test_colours_of_16_bits_are_refused_and_not_cut(content):
  with pytest.raises(images.BrokenImageError, match="more than 8 bits"):
    images.decode(content)


@pytest.mark.parametrize(
  "content",
  [
    b"",
    b"no image at all",
    encoded(gradient(), "JPEG")[:300],
    encoded(gradient())[:60],
  ],
  ids=["empty", "text", "cut JPEG", "cut PNG"],
)
def test_what_is_no_whole_image_is_refused(content):
  with pytest.raises(images.BrokenImageError):
    images.decode(content)


@pytest.mark.parametrize("crop", ["random_resized", "rotated"])
@pytest.mark.parametrize("size", [(40, 30), (30, 40), (7, 90), (1, 1)])
def test_views_have_the_side_and_depend_on_the_source_only(crop, size):
  image = gradient(*size) if min(size) > 1 else Image.new("RGB", size, RED)
  views = [images.for_training(image, 24, crop, source(s)) for s in (0, 0, 1)]
  for view in views:
    assert (view.shape, view.dtype) == ((24, 24, 3), np.uint8)
  np.testing.assert_array_equal(views[0], views[1])
  if min(size) > 1:
    assert (views[0] != views[2]).any()
  assert images.for_testing(image, 24, crop).shape == (24, 24, 3)


def test_a_random_part_has_the_area_and_proportions_that_are_allowed():
  boxes = np.array(
    [images._random_part((400, 300), s) for s in map(source, range(300))]
  )
  left, top, right, bottom = boxes.T
  assert (left >= 0).all() and (top >= 0).all()
  assert (right <= 400).all() and (bottom <= 300).all()
  width, height = right - left, bottom - top
  areas, proportions = width * height / 120000, width / height
  assert areas.min() > 0.07 and areas.max() <= 1
  assert areas.min() < 0.15 and areas.max() > 0.8
  assert proportions.min() > 0.74 and proportions.max() < 1.35


def test_half_of_the_views_are_mirrored():
  mirrored = []
  for seed in range(200):
    view = images.for_training(gradient(), 8, "random_resized", source(seed))
    mirrored.append(int(view[4, 0, 0]) > int(view[4, -1, 0]))
  assert 70 < sum(mirrored) < 130


def test_a_test_view_is_the_middle_of_the_scaled_image():
  # 8/7 of 28 is 32: the image as it is, of which 28 x 28 are taken.
  image = gradient(48, 32)
  view = images.for_testing(image, 28, "random_resized")
  np.testing.assert_array_equal(view, np.asarray(image)[2:30, 10:38])


def test_the_papers_test_view_is_scaled_only():
  image = gradient(48, 32)
  view = images.for_testing(image, 32, "rotated")
  expected = image.resize((32, 32), Image.Resampling.BILINEAR)
  np.testing.assert_array_equal(view, np.asarray(expected))


def test_the_papers_view_is_shifted_by_up_to_its_margin():
  white = Image.new("RGB", (56, 56), (255, 255, 255))
  empty = []
  for seed in range(100):
    view = images.for_training(white, 56, "rotated", source(seed))
    empty.append((view == 0).all(2).mean())
  # A margin of 50/224 of the side can be seen on two sides at most.
  margin = round(56 * 50 / 224) / 56
  assert max(empty) > margin
  assert max(empty) < 1 - (1 - margin) ** 2 + 0.15
  assert min(empty) < 0.1
