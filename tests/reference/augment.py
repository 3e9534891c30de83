"""Augmentation written pixel by pixel, in NumPy."""

import numpy as np


def crop_and_flip(
  image: np.ndarray, offset: tuple[int, int], flip: bool, padding: int
) -> np.ndarray:
  """One image [H, W, C]: output pixel (r, c) fetched from where it was."""
  height, width, _ = image.shape
  out = np.zeros_like(image)
  for r in range(height):
    for c in range(width):
      column = width - 1 - c if flip else c
      source = (r + offset[0] - padding, column + offset[1] - padding)
      if 0 <= source[0] < height and 0 <= source[1] < width:
        out[r, c] = image[source]
  return out


def normalize(
  images: np.ndarray, mean: tuple[float, ...], std: tuple[float, ...]
) -> np.ndarray:
  """(pixel / 255 - mean) / std in float64."""
  return (images.astype(np.float64) / 255 - np.array(mean)) / np.array(std)
