"""Convolution in the form that CPUs compute fastest.

XLA's own convolutions leave most of a CPU's time to layout changes and thin
channels. Here maps are [C, H, W, N]: the batch is the contiguous axis, so any
number of channels fills the vector registers, a shift in the image copies runs
of N numbers, and per-channel parameters are scalars to the inner loops.

A k x k convolution is split into its two directions; here with stride 1:

    P = the k horizontal shifts of x, stacked        [k C, H, W, N]
    Y = matrix(kernel) @ P                           [k O, H, W, N]
    out = the k row groups of Y, shifted vertically and added

so the matmul sees k shifts, not k^2 as im2col does, and the rest are sums of
shifted copies. `matrix(kernel)` has rows (kh, o) and columns (kw, c).

With a stride, each row of the kernel meets every stride-th row of x only: rows
2i - 1 and 2i + 1 of x meet the outer rows of a 3 x 3 kernel, rows 2i its middle
one. So x is taken apart into its phases, rows 2i and rows 2i + 1, and each has
a P and a matmul of its own, with the kernel rows that it meets. Columns are
taken apart as P is stacked: it holds those that an output meets, and no others.

Gradients are written by hand: automatic ones would scatter into padded maps.
Every shift's adjoint is the opposite shift, phases are interleaved again, and
P is rebuilt; unless XLA sees that it is the same P and keeps the first one.

On GPU and TPU the plain convolution is the right one; `layers` chooses.
"""

import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def convolution(
  x: jax.Array, kernel: jax.Array, stride: int, pad: int, remat: bool
) -> jax.Array:
  """A square convolution with as many outputs as strides fit into the maps.

  Args:
    x: maps [C, H, W, N].
    kernel: [size, size, C, O] of the same type, size odd.
    stride: step in both directions.
    pad: zeros before the first row and column; after the last there are as
      many as the last output needs.
    remat: whether P, which is `size` times x, is rebuilt for the gradient
      indeed. It halves the scratch memory of a ResNet's step, which takes 5
      to 10 % longer.

  Returns:
    Maps [O, ceil(H / stride), ceil(W / stride), N].
  """
  del remat
  size, _, _, outputs = kernel.shape
  shifted = []
  zero = jnp.zeros((), x.dtype)
  for first, phase, offset in _tap_groups(size, stride, pad):
    rows = kernel[first::stride]
    stacked = _stack_shifts(x, phase, size, stride, pad, zero)
    products = _matrix(rows) @ _flat(stacked)
    products = products.reshape(len(rows), outputs, *stacked.shape[1:])
    shifted += [
      _shift(products[row], 1, offset + row) for row in range(len(rows))
    ]
  return sum(shifted)


def _forward(
  x: jax.Array, kernel: jax.Array, stride: int, pad: int, remat: bool
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  return convolution(x, kernel, stride, pad, remat), (x, kernel)


def _backward(
  stride: int,
  pad: int,
  remat: bool,
  saved: tuple[jax.Array, jax.Array],
  gradient: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  x, kernel = saved
  zero = jnp.zeros((), x.dtype)
  if remat:
    # Zero, which XLA cannot know before there is a gradient: so this P is not
    # the one of the forward pass. As in `once.compute_once`.
    zero = (jnp.square(gradient[0, 0, 0, 0]) < -1).astype(x.dtype)
  size, _, inputs, outputs = kernel.shape
  d_rows = [None] * size
  d_phases = [jnp.zeros((), x.dtype)] * stride**2
  groups = _tap_groups(size, stride, pad)
  for first, phase, offset in groups:
    rows = kernel[first::stride]
    spread = jnp.concatenate(
      [_shift(gradient, 1, -offset - row) for row in range(len(rows))]
    )
    stacked = _stack_shifts(x, phase, size, stride, pad, zero)
    d_matrix = jax.lax.dot_general(
      _flat(spread), _flat(stacked), (((1,), (1,)), ((), ()))
    )
    d_rows[first::stride] = d_matrix.reshape(len(rows), outputs, size, inputs)
    d_stacked = _matrix(rows).T @ _flat(spread)
    d_stacked = d_stacked.reshape(size, inputs, *spread.shape[1:])
    for first_column, column_phase, column_offset in groups:
      d_phases[phase * stride + column_phase] = sum(
        _shift(d_stacked[column], 2, -column_offset - index)
        for index, column in enumerate(range(first_column, size, stride))
      )
  d_x = _join_phases(d_phases, stride, (inputs, *gradient.shape[1:]))
  d_x = d_x[:, : x.shape[1], : x.shape[2]]
  return d_x, jnp.stack(d_rows).transpose(0, 2, 3, 1)


convolution.defvjp(_forward, _backward)


def grouped_convolution(
  x: jax.Array,
  kernel: jax.Array,
  groups: int,
  stride: int,
  pad: int,
  remat: bool,
) -> jax.Array:
  """`convolution` of each of `groups` equal groups of channels by itself.

  Args:
    x: maps [C, H, W, N].
    kernel: [size, size, C / groups, O]; group g makes the outputs
      g O / groups, ... of O.
    groups: a divisor of C and O.
    stride: see `convolution`.
    pad: see `convolution`.
    remat: see `convolution`.

  Returns:
    Maps [O, ceil(H / stride), ceil(W / stride), N].
  """
  size, _, inputs, outputs = kernel.shape
  kernels = kernel.reshape(size, size, inputs, groups, outputs // groups)
  y = jax.vmap(
    lambda x, kernel: convolution(x, kernel, stride, pad, remat),
    in_axes=(0, 3),
  )(x.reshape(groups, inputs, *x.shape[1:]), kernels)
  return y.reshape(outputs, *y.shape[2:])


def depthwise_convolution(
  x: jax.Array, kernel: jax.Array, stride: int, pad: int
) -> jax.Array:
  """Every channel with a kernel of its own: nothing there for a matmul to do.

  Args:
    x: maps [C, H, W, N].
    kernel: [size, size, 1, C].
    stride: see `convolution`.
    pad: see `convolution`.

  Returns:
    Maps [C, ceil(H / stride), ceil(W / stride), N].
  """
  size = len(kernel)
  _, height, width, _ = x.shape
  counts = -(-height // stride), -(-width // stride)
  zero = jnp.zeros((), x.dtype)
  rows = [
    _window(x, 1, row - pad, stride, counts[0], zero) for row in range(size)
  ]
  return sum(
    _window(rows[row], 2, column - pad, stride, counts[1], zero)
    * kernel[row, column, 0][:, None, None, None]
    for row in range(size)
    for column in range(size)
  )


def max_pool(x: jax.Array, stride: int) -> jax.Array:
  """The largest of 3 x 3 at every stride-th place, one row of padding around.

  Where several are equal, one of them has the gradient.

  Args:
    x: maps [C, H, W, N].
    stride: step in both directions.

  Returns:
    Maps [C, ceil(H / stride), ceil(W / stride), N].
  """
  lowest = jnp.array(-jnp.inf, x.dtype)
  for axis in (1, 2):
    count = -(-x.shape[axis] // stride)
    taps = [
      _window(x, axis, tap - 1, stride, count, lowest) for tap in range(3)
    ]
    x = functools.reduce(larger, taps)
  return x


@jax.custom_jvp
def larger(a: jax.Array, b: jax.Array) -> jax.Array:
  """The larger of two arrays, elementwise; the first where they are equal.

  The gradient of `jnp.maximum` asks which of the two equals the result. XLA may
  have computed these anew, with another rounding, and then neither does.
  """
  return jnp.maximum(a, b)


@larger.defjvp
def _larger_jvp(
  primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
  a, b = primals
  return larger(a, b), jnp.where(a >= b, *tangents)


def _tap_groups(size: int, stride: int, pad: int) -> list[tuple[int, int, int]]:
  """The taps of a kernel by the phase of the rows (or columns) they meet.

  Tap t of output i meets x[stride i + t - pad]. The taps first, first + stride,
  ... meet x[stride (i + offset) + phase], x[stride (i + offset + 1) + phase],
  ...

  Returns:
    (first, phase, offset) of every group.
  """
  groups = []
  for first in range(min(size, stride)):
    offset, phase = divmod(first - pad, stride)
    groups.append((first, phase, offset))
  return groups


def _matrix(kernel: jax.Array) -> jax.Array:
  """[kh, kw, C, O] -> [kh O, kw C]."""
  height, width, inputs, outputs = kernel.shape
  return kernel.transpose(0, 3, 1, 2).reshape(height * outputs, width * inputs)


def _flat(maps: jax.Array) -> jax.Array:
  return maps.reshape(maps.shape[0], -1)


def _stack_shifts(
  x: jax.Array, phase: int, size: int, stride: int, pad: int, zero: jax.Array
) -> jax.Array:
  """The rows of one phase: -> [size C, ceil(H / stride), ceil(W / stride), N].

  [tap C + c, i, j] is x[c, stride i + phase, stride j + tap - pad], or `zero`.
  """
  _, height, width, _ = x.shape
  x = _window(x, 1, phase, stride, -(-height // stride), zero)
  columns = -(-width // stride)
  return jnp.concatenate(
    [_window(x, 2, tap - pad, stride, columns, zero) for tap in range(size)]
  )


def _join_phases(
  phases: list[jax.Array], stride: int, shape: tuple[int, ...]
) -> jax.Array:
  """stride^2 maps [C, H, W, N] (or zeros) -> [C, stride H, stride W, N].

  [c, stride i + a, stride j + b] is [c, i, j] of phases[stride a + b].
  """
  if stride == 1:
    return phases[0]
  channels, height, width, images = shape
  phases = [jnp.broadcast_to(phase, shape) for phase in phases]
  rows = [
    jnp.stack(phases[row * stride : (row + 1) * stride], 3)
    for row in range(stride)
  ]
  joined = jnp.stack(rows, 2)
  return joined.reshape(channels, stride * height, stride * width, images)


def _shift(x: jax.Array, axis: int, offset: int) -> jax.Array:
  """y[i] = x[i + offset] along `axis`, zero outside of x."""
  return _window(x, axis, offset, 1, x.shape[axis], jnp.zeros((), x.dtype))


def _window(
  x: jax.Array, axis: int, start: int, stride: int, count: int, zero: jax.Array
) -> jax.Array:
  """y[i] = x[start + stride i] for i < count, `zero` outside of x."""
  if start == 0 and stride == 1 and count == x.shape[axis]:
    return x
  end = start + stride * (count - 1) + 1
  low, high = max(0, -start), max(0, end - x.shape[axis])
  padding = [(0, 0, 0)] * x.ndim
  padding[axis] = (low, high, 0)
  x = jax.lax.pad(x, zero, padding)
  return jax.lax.slice_in_dim(x, start + low, end + low, stride, axis)
