"""The layers once more, one output pixel at a time, in float64 NumPy."""

import numpy as np

EPSILON = 1e-5
MOMENTUM = 0.9


def convolution(x, kernel, stride=1):
  """torch's Conv2d(padding=(size - 1) // 2), maps NHWC and kernels HWIO."""
  x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
  batch, height, width, _ = x.shape
  size = kernel.shape[0]
  pad = (size - 1) // 2
  padded = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
  rows = (height + 2 * pad - size) // stride + 1
  columns = (width + 2 * pad - size) // stride + 1
  out = np.zeros((batch, rows, columns, kernel.shape[3]))
  for r in range(rows):
    for c in range(columns):
      top, left = r * stride, c * stride
      window = padded[:, top : top + size, left : left + size]
      out[:, r, c] = np.tensordot(window, kernel, axes=3)
  return out


def padded_convolution(x, kernel, stride, before, after, groups=1):
  """A convolution in groups with any padding, from the definition."""
  x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
  pads = ((0, 0), (before, after), (before, after), (0, 0))
  padded = np.pad(x, pads)
  size, _, inputs, outputs = kernel.shape
  rows = (padded.shape[1] - size) // stride + 1
  columns = (padded.shape[2] - size) // stride + 1
  out = np.zeros((len(x), rows, columns, outputs))
  per_group = outputs // groups
  for o in range(outputs):
    group = o // per_group
    own = padded[..., group * inputs : (group + 1) * inputs]
    for r in range(rows):
      for c in range(columns):
        top, left = r * stride, c * stride
        window = own[:, top : top + size, left : left + size]
        out[:, r, c, o] = (window * kernel[..., o]).sum((1, 2, 3))
  return out


def pool(x, size, stride, pad, reduce, filling):
  """What `reduce` makes of every window, [N, H, W, C]."""
  pads = ((0, 0), (pad, pad), (pad, pad), (0, 0))
  padded = np.pad(np.asarray(x, np.float64), pads, constant_values=filling)
  rows = (padded.shape[1] - size) // stride + 1
  columns = (padded.shape[2] - size) // stride + 1
  out = np.zeros((len(x), rows, columns, x.shape[3]))
  for r in range(rows):
    for c in range(columns):
      top, left = r * stride, c * stride
      window = padded[:, top : top + size, left : left + size]
      out[:, r, c] = reduce(window, axis=(1, 2))
  return out


def convolution_gradients(x, kernel, cotangent, stride=1):
  """Gradients of sum(cotangent * convolution(x, kernel, stride)).

  Every output pixel is linear in its window and in the kernel, so its
  cotangent goes back to the window times the kernel, and to the kernel times
  the window. What reaches the padding is dropped.
  """
  x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
  size = kernel.shape[0]
  pad = (size - 1) // 2
  padded = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
  from_padded = np.zeros_like(padded)
  from_kernel = np.zeros_like(kernel)
  for r in range(cotangent.shape[1]):
    for c in range(cotangent.shape[2]):
      top, left = r * stride, c * stride
      window = np.s_[:, top : top + size, left : left + size]
      g = np.asarray(cotangent[:, r, c], np.float64)
      from_padded[window] += np.einsum("no,ijco->nijc", g, kernel)
      from_kernel += np.einsum("no,nijc->ijco", g, padded[window])
  height, width = x.shape[1:3]
  inside = from_padded[:, pad : pad + height, pad : pad + width]
  return {"x": inside, "kernel": from_kernel}


def valid_taps(length, size, stride):
  """How often a 1-D window of `size` meets a real element, not padding."""
  pad = (size - 1) // 2
  outputs = (length + 2 * pad - size) // stride + 1
  return sum(
    0 <= position * stride + tap - pad < length
    for position in range(outputs)
    for tap in range(size)
  )


def moments(x):
  """Mean and biased variance of every channel: [..., C] -> [C], [C]."""
  x = np.asarray(x, np.float64)
  x = x.reshape(-1, x.shape[-1])
  mean = x.sum(0) / len(x)
  return mean, ((x - mean) ** 2).sum(0) / len(x)


def running(previous, batch):
  """The next running statistic."""
  return MOMENTUM * np.asarray(previous, np.float64) + (1 - MOMENTUM) * batch


def batch_norm_relu(x, scale, bias, mean, var, residual=None, relu=True):
  """scale (x - mean) / sqrt(var + eps) + bias, + residual, then ReLU."""
  y = (np.asarray(x, np.float64) - mean) / np.sqrt(var + EPSILON)
  y = y * scale + bias
  if residual is not None:
    y = y + residual
  return np.maximum(y, 0) if relu else y


def batch_norm_relu_gradients(
  x, scale, bias, cotangent, residual=None, relu=True
):
  """Gradients of sum(cotangent * y), y normalised by its own batch.

  With M elements per channel, x^ the normalised input and g the cotangent
  where the ReLU lets it through: dx = scale / sd (g - sum(g) / M - x^ sum(g
  x^) / M).
  """
  x = np.asarray(x, np.float64)
  mean, var = moments(x)
  y = batch_norm_relu(x, scale, bias, mean, var, residual, relu=False)
  g = np.where(y > 0, cotangent, 0) if relu else cotangent
  normalised = (x - mean) / np.sqrt(var + EPSILON)
  axes = tuple(range(x.ndim - 1))
  scale_gradient = (g * normalised).sum(axes)
  centred = g - g.mean(axes) - normalised * (g * normalised).mean(axes)
  return {
    "x": scale / np.sqrt(var + EPSILON) * centred,
    "scale": scale_gradient,
    "bias": g.sum(axes),
    "residual": g,
  }
