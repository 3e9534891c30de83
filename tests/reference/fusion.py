"""What stands on top of whole networks (FFL, FFSD), in float64 NumPy.

Everything takes a module's parameters, its running statistics and whether to
train, and returns what it computes and the statistics afterwards.
"""

import numpy as np

from tests.reference import layers


def fusion(params, batch_stats, maps, *, train):
  """Logits [N, K] and the fused maps, of maps [N, H, W, C_i]."""
  together = np.concatenate([np.asarray(x, np.float64) for x in maps], axis=3)
  fused, after = spread(params, batch_stats, together, train=train)
  head = params["head"]
  logits = fused.mean((1, 2)) @ head["kernel"] + head["bias"]
  return (logits, fused), after


def spread(params, batch_stats, x, *, train):
  """A 3x3 kernel for each map, then a 1x1 for all; after each, norm and ReLU.

  Also what fusion begins with.
  """
  x = layers.padded_convolution(
    x, params["conv_0"]["kernel"], 1, 1, 1, groups=x.shape[3]
  )
  x, first = _norm_relu(params, batch_stats, "norm_0", x, train)
  x = layers.convolution(x, params["conv_1"]["kernel"])
  x, second = _norm_relu(params, batch_stats, "norm_1", x, train)
  return x, {"norm_0": first, "norm_1": second}


def decoder(params, batch_stats, x, *, train):
  """The maps of every step back, the last one first: so the largest first."""
  found, after = [], {}
  for index in reversed(range(len(params) // 2)):
    # Ours are turned by 180 degrees.
    kernel = params[f"conv_{index}"]["kernel"][::-1, ::-1]
    x = transposed_convolution(x, kernel)
    name = f"norm_{index}"
    x, after[name] = _norm_relu(params, batch_stats, name, x, train)
    found.insert(0, x)
  return found, after


def transposed_convolution(x, kernel):
  """torch's ConvTranspose2d(3, stride=2, padding=1, output_padding=1).

  Pixel (r, c) of [N, H, W, C] adds itself, times kernel[i, j] of [3, 3, C, O],
  to pixel (2 r + i - 1, 2 c + j - 1) of [N, 2 H, 2 W, O].
  """
  x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
  images, height, width, _ = x.shape
  out = np.zeros((images, 2 * height, 2 * width, kernel.shape[3]))
  for r, c, i, j in np.ndindex(height, width, 3, 3):
    row, column = 2 * r + i - 1, 2 * c + j - 1
    if 0 <= row < 2 * height and 0 <= column < 2 * width:
      out[:, row, column] += x[:, r, c] @ kernel[i, j]
  return out


def _norm_relu(params, batch_stats, name, x, train):
  own, before = params[name], batch_stats[name]
  mean, var = layers.moments(x) if train else (before["mean"], before["var"])
  y = layers.batch_norm_relu(x, own["scale"], own["bias"], mean, var)
  if not train:
    return y, before
  after = {
    "mean": layers.running(before["mean"], mean),
    "var": layers.running(before["var"], var),
  }
  return y, after
