"""Convolution in the form that CPUs compute fastest.

XLA's own convolutions leave most of a CPU's time to layout changes and thin
channels. Here maps are [C, H, W, N]: the batch is the contiguous axis, so any
number of channels fills the vector registers, a shift in the image copies runs
of N numbers, and per-channel parameters are scalars to the inner loops.

A k x k convolution is split into its two directions:

    P = the k horizontal shifts of x, stacked        [k C, H, W', N]
    Y = matrix(kernel) @ P                           [k O, H, W', N]
    out = the k row groups of Y, shifted vertically and added

so the matmul sees k shifts, not k^2 as im2col does, and the rest are sums of
shifted copies. `matrix(kernel)` has rows (kh, o) and columns (kw, c).

Gradients are written by hand: automatic ones would scatter into padded maps
and keep P from the forward pass. Every shift's adjoint is here another shift
(with a stride, shifts of the strided phases, interleaved), and P is rebuilt.

On GPU and TPU the plain convolution is the right one; `layers` chooses.
"""

import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def convolution(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
  """A square convolution, padded by (size - 1) / 2 on all sides.

  Args:
    x: maps [C, H, W, N].
    kernel: [size, size, C, O] of the same type, size odd.
    stride: step in both directions.

  Returns:
    Maps [O, ceil(H / stride), ceil(W / stride), N].
  """
  size, _, _, outputs = kernel.shape
  stacked = _stack_shifts(x, size, stride)
  products = _matmul(_matrix(kernel), stacked)
  products = products.reshape(size, outputs, *stacked.shape[1:])
  return sum(_shift(products[row], 1, row, size, stride) for row in range(size))


def _forward(
  x: jax.Array, kernel: jax.Array, stride: int
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  return convolution(x, kernel, stride), (x, kernel)


def _backward(
  stride: int, saved: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
  x, kernel = saved
  size, _, inputs, outputs = kernel.shape
  height, width = x.shape[1:3]
  spread = jnp.concatenate(
    [_unshift(gradient, 1, row, size, stride, height) for row in range(size)]
  )
  stacked = _stack_shifts(x, size, stride)
  d_matrix = jax.lax.dot_general(
    _flat(spread), _flat(stacked), (((1,), (1,)), ((), ()))
  )
  d_kernel = d_matrix.reshape(size, outputs, size, inputs)
  d_stacked = _matmul(_matrix(kernel).T, spread)
  d_stacked = d_stacked.reshape(size, inputs, *spread.shape[1:])
  d_x = sum(
    _unshift(d_stacked[column], 2, column, size, stride, width)
    for column in range(size)
  )
  return d_x, d_kernel.transpose(0, 2, 3, 1)


convolution.defvjp(_forward, _backward)


def _matrix(kernel: jax.Array) -> jax.Array:
  """[kh, kw, C, O] -> [kh O, kw C]."""
  size, _, inputs, outputs = kernel.shape
  return kernel.transpose(0, 3, 1, 2).reshape(size * outputs, size * inputs)


def _flat(maps: jax.Array) -> jax.Array:
  return maps.reshape(maps.shape[0], -1)


def _matmul(matrix: jax.Array, maps: jax.Array) -> jax.Array:
  """[R, C] times [C, H, W, N] -> [R, H W N]."""
  return matrix @ _flat(maps)


def _stack_shifts(x: jax.Array, size: int, stride: int) -> jax.Array:
  """[C, H, W, N] -> [size C, H, ceil(W / stride), N]."""
  return jnp.concatenate(
    [_shift(x, 2, column, size, stride) for column in range(size)]
  )


def _shift(
  x: jax.Array, axis: int, tap: int, size: int, stride: int
) -> jax.Array:
  """y[i] = x[stride i + tap - pad] along `axis`, zero outside of x."""
  length = x.shape[axis]
  return _window(x, axis, tap - (size - 1) // 2, stride, -(-length // stride))


def _unshift(
  y: jax.Array, axis: int, tap: int, size: int, stride: int, length: int
) -> jax.Array:
  """The adjoint of `_shift`: x[j] = y[(j - tap + pad) / stride], or zero.

  With a stride, x[stride q + phase] is one y[q + offset] for a single phase
  and zero for the others: the phases are stacked next to each other.
  """
  pad = (size - 1) // 2
  count = -(-length // stride)
  phases = []
  for phase in range(stride):
    offset, rest = divmod(phase - tap + pad, stride)
    part = _window(y, axis, offset, 1, count)
    phases.append(jnp.zeros_like(part) if rest else part)
  if stride == 1:
    return phases[0]
  x = jnp.stack(phases, axis + 1)
  shape = (*y.shape[:axis], count * stride, *y.shape[axis + 1 :])
  return jax.lax.slice_in_dim(x.reshape(shape), 0, length, axis=axis)


def _window(
  x: jax.Array, axis: int, start: int, stride: int, count: int
) -> jax.Array:
  """y[i] = x[start + stride i] for i < count, zero outside of x."""
  if start == 0 and stride == 1 and count == x.shape[axis]:
    return x
  end = start + stride * (count - 1) + 1
  low, high = max(0, -start), max(0, end - x.shape[axis])
  padding = [(0, 0, 0)] * x.ndim
  padding[axis] = (low, high, 0)
  x = jax.lax.pad(x, jnp.zeros((), x.dtype), padding)
  return jax.lax.slice_in_dim(x, start + low, end + low, stride, axis)
