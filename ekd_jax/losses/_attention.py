"""Learning where another network looks.

Where the squares of a map's channels are large, the network has found
something. Their mean over the channels, an attention map, has no channels any
more, so networks of different widths can be compared without an adapter. Maps
are normalised first: what counts is where a network looks, not how strongly.

The second half is FFSD's: a target that turns another network's attention
around, which sets networks apart that would otherwise become the same.
"""

import math

import jax
import jax.numpy as jnp

from ekd_jax.losses import _checks

# A shorter map is divided by this and has no gradient.
_LEAST_NORM = 1e-12


def attention_map(
  features: jax.Array, *, batch_axis: int = 0, channel_axis: int = -1
) -> jax.Array:
  """Computes the mean over the channels of the squares of a map.

  Args:
    features: Maps with shape [N, ..., C]. Finite, of any floating-point type.
    batch_axis: Which axis is N, for maps in another order.
    channel_axis: Which axis is C.

  Returns:
    The attention maps, float32, with shape [N, ...]: without C, and N first
    wherever it was.

  Raises:
    AssertionError: If `features` is not a floating-point array with a batch
      axis and another channel axis, and at least one element per example.

  References:
    Zagoruyko and Komodakis, `Paying More Attention to Attention
    <https://arxiv.org/abs/1612.03928>`_, 2017 (there a sum).

  Example:
    >>> import jax.numpy as jnp
    >>> from ekd_jax import losses
    >>> print(losses.attention_map(jnp.array([[[1.0, 3.0], [0.0, 2.0]]])))
    [[5. 2.]]
  """
  return _attention("features", features, batch_axis, channel_axis)


def normalized_feature_loss(
  student_features: jax.Array,
  teacher_features: jax.Array,
  *,
  stop_teacher_gradient: bool = True,
  batch_axis: int = 0,
) -> jax.Array:
  r"""Computes the mean squared difference of two maps of unit length.

  .. math::
    \ell_n = \frac{1}{M} \sum_m \Big(
      \frac{s_{nm}}{\|s_n\|} - \frac{t_{nm}}{\|t_n\|} \Big)^2

  with m over all M elements of one example's map. At most 4 / M, so it takes
  large weights. A map of zeros stays one, and has no gradient.

  Args:
    student_features: Maps with shape [N, ..., C]. Finite, of any
      floating-point type.
    teacher_features: The target maps, of the same shape.
    stop_teacher_gradient: Whether the teacher is a constant target.
    batch_axis: Which axis is N, for maps in another order.

  Returns:
    The loss of each example, non-negative, float32, with shape [N].

  Raises:
    AssertionError: If the maps are not floating-point arrays of one shape with
      at least one element per example.

  References:
    Li et al, `Distilling a Powerful Student Model via Online Knowledge
    Distillation <https://arxiv.org/abs/2103.14473>`_, 2021.

  Example:
    >>> import jax.numpy as jnp
    >>> from ekd_jax import losses
    >>> loss = losses.normalized_feature_loss(
    ...     jnp.array([[3.0, 0.0]]), jnp.array([[0.0, 0.5]]))
    >>> print(loss)
    [1.]
  """
  shape = "[N, ..., C]"
  names = "student_features", "teacher_features"
  for name, features in zip(
    names, (student_features, teacher_features), strict=True
  ):
    _checks.assert_float_array(name, features, shape)
    _checks.assert_map(name, features, shape, batch_axis)
  _checks.assert_same_shape(
    names[0], student_features, names[1], teacher_features, shape
  )
  return _difference(
    _rows(student_features, batch_axis),
    _rows(teacher_features, batch_axis),
    stop_teacher_gradient,
  )


def attention_loss(
  student_features: jax.Array,
  teacher_features: jax.Array,
  *,
  stop_teacher_gradient: bool = True,
  batch_axis: int = 0,
  channel_axis: int = -1,
) -> jax.Array:
  """Computes `normalized_feature_loss` of the attention maps.

  With a single place there is nowhere else to look: the loss is 0, unless one
  of the two maps is.

  Args:
    student_features: Maps with shape [N, ..., C]. Finite, of any
      floating-point type.
    teacher_features: The target maps, of the same shape but for the number of
      channels.
    stop_teacher_gradient: Whether the teacher is a constant target.
    batch_axis: Which axis is N, for maps in another order.
    channel_axis: Which axis is C.

  Returns:
    The loss of each example, non-negative, float32, with shape [N].

  Raises:
    AssertionError: If the maps are not floating-point arrays with axes N and C
      and otherwise of one shape, with at least one element per example.

  References:
    Li et al, `Distilling a Powerful Student Model via Online Knowledge
    Distillation <https://arxiv.org/abs/2103.14473>`_, 2021.

  Example:
    >>> import jax.numpy as jnp
    >>> from ekd_jax import losses
    >>> narrow = jnp.array([[[2.0], [0.0]]])
    >>> wide = jnp.array([[[1.0, 1.0], [0.0, 0.0]]])
    >>> print(losses.attention_loss(narrow, wide))
    [0.]
  """
  student, teacher = _attention_pair(
    ("student_features", student_features),
    ("teacher_features", teacher_features),
    batch_axis,
    channel_axis,
  )
  return _difference(
    _rows(student, 0), _rows(teacher, 0), stop_teacher_gradient
  )


def diversity_loss(
  student_features: jax.Array,
  peer_features: jax.Array,
  *,
  normalized: bool = False,
  batch_axis: int = 0,
  channel_axis: int = -1,
) -> jax.Array:
  r"""Computes how far a network's attention is from a peer's turned around.

  With a the peer's attention map of P places, :math:`n = \|a\|` and y = a / n,

  .. math::
    \ell = \frac{1}{P} \sum_p (x_p - t_p)^2, \quad
    t_p = (n / 2 - y_p)\, \mathrm{sign}(y_p - \theta) + n / 2

  with x the student's normalised attention and :math:`\theta` the
  floor(P / 3)-th smallest y: where the peer looks least the target is what it
  has, elsewhere n less that, and n / 2 at the threshold itself.

  The published target mixes n, the length of the map as it was, with y, which
  has length 1: for large n it is nearly n in two thirds of the places, the loss
  is of the order of n^2, and the published weight is 1e-5.

  Args:
    student_features: Maps with shape [N, ..., C]. Finite, of any
      floating-point type.
    peer_features: Those of the peer, a constant; of the same shape but for the
      number of channels. Three places at least.
    normalized: Whether 1 takes the place of n in the target.
    batch_axis: Which axis is N, for maps in another order.
    channel_axis: Which axis is C.

  Returns:
    The loss of each example, non-negative, float32, with shape [N].

  Raises:
    AssertionError: If the maps are not floating-point arrays with axes N and C
      and otherwise of one shape, or have fewer than three places.

  References:
    Li et al, `Distilling a Powerful Student Model via Online Knowledge
    Distillation <https://arxiv.org/abs/2103.14473>`_, 2021, as its code is.

  Example:
    >>> import jax.numpy as jnp
    >>> from ekd_jax import losses
    >>> peer = jnp.array([[[1.0], [0.0], [0.0]]])
    >>> loss = losses.diversity_loss(peer, peer, normalized=True)
    >>> print(loss.round(4))
    [0.5]
  """
  student, peer = _attention_pair(
    ("student_features", student_features),
    ("peer_features", peer_features),
    batch_axis,
    channel_axis,
  )
  peer = jax.lax.stop_gradient(peer)
  ours, _ = _normalized(_rows(student, 0))
  _, target, _ = _turned_around("peer_features", peer, normalized)
  return jnp.mean(jnp.square(ours - target), axis=1)


def shifted_features(
  features: jax.Array,
  *,
  normalized: bool = False,
  batch_axis: int = 0,
  channel_axis: int = -1,
) -> jax.Array:
  r"""Moves maps towards the target that `diversity_loss` makes of them.

  With t, y and n as there, :math:`(t - y)\, n / C` is added to each of the C
  channels. Gradients pass, through the target too; whoever shows the result to
  a network as an example stops them.

  Args:
    features: Maps with shape [N, ..., C], three places at least. Finite, of
      any floating-point type.
    normalized: Whether 1 takes the place of n, both here and in t.
    batch_axis: Which axis is N, for maps in another order.
    channel_axis: Which axis is C.

  Returns:
    Maps of the shape of `features`, float32.

  Raises:
    AssertionError: If `features` is not a floating-point array with axes N and
      C, or has fewer than three places.

  References:
    Li et al, `Distilling a Powerful Student Model via Online Knowledge
    Distillation <https://arxiv.org/abs/2103.14473>`_, 2021, as its code is.

  Example:
    >>> import jax.numpy as jnp
    >>> from ekd_jax import losses
    >>> maps = jnp.array([[[1.0], [0.0], [0.0]]])
    >>> print(losses.shifted_features(maps).ravel())
    [0.  0.5 0.5]
  """
  attention = _attention("features", features, batch_axis, channel_axis)
  batch_axis, channel_axis = _axes(
    "features", features, batch_axis, channel_axis
  )
  now, target, length = _turned_around("features", attention, normalized)
  shift = (target - now) * length / features.shape[channel_axis]
  shift = jnp.moveaxis(
    shift.reshape(attention.shape), 0, batch_axis - (channel_axis < batch_axis)
  )
  return jnp.asarray(features, jnp.float32) + jnp.expand_dims(
    shift, channel_axis
  )


def _attention(
  name: str, features: jax.Array, batch_axis: int, channel_axis: int
) -> jax.Array:
  """`attention_map` of the argument called `name`."""
  batch_axis, channel_axis = _axes(name, features, batch_axis, channel_axis)
  squares = jnp.square(jnp.asarray(features, jnp.float32))
  attention = jnp.mean(squares, axis=channel_axis)
  return jnp.moveaxis(attention, batch_axis - (channel_axis < batch_axis), 0)


def _attention_pair(
  ours: tuple[str, jax.Array],
  theirs: tuple[str, jax.Array],
  batch_axis: int,
  channel_axis: int,
) -> tuple[jax.Array, jax.Array]:
  """Attention maps of two named arguments that differ in C at most."""
  first, second = (
    _attention(name, features, batch_axis, channel_axis)
    for name, features in (ours, theirs)
  )
  _checks.assert_true(
    first.shape == second.shape,
    f"{ours[0]} and {theirs[0]} must have one shape but for the channels, got"
    f" {ours[1].shape} and {theirs[1].shape}",
  )
  return first, second


def _difference(
  student: jax.Array, teacher: jax.Array, stop_teacher_gradient: bool
) -> jax.Array:
  """Mean squared difference [N] of rows [N, M], normalised."""
  if stop_teacher_gradient:
    teacher = jax.lax.stop_gradient(teacher)
  student, _ = _normalized(student)
  teacher, _ = _normalized(teacher)
  return jnp.mean(jnp.square(student - teacher), axis=1)


def _turned_around(
  name: str, attention: jax.Array, normalized: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Normalised attention [N, P], what it becomes, and the length [N, 1]."""
  rows = _rows(attention, 0)
  _checks.assert_true(
    rows.shape[1] >= 3,
    f"{name} must have at least three places, got {rows.shape[1]}",
  )
  now, norm = _normalized(rows)
  length = jnp.ones_like(norm) if normalized else norm
  side = _side_of_smallest(now, rows.shape[1] // 3)
  target = (length / 2 - now) * side + length / 2
  return now, target, length


def _side_of_smallest(rows: jax.Array, k: int) -> jax.Array:
  """Sign [N, P] of rows [N, P] less their k-th smallest element."""
  places = jax.lax.broadcasted_iota(jnp.int32, rows.shape, 1)
  # Compared as the sort returns them, then put back. A compiler may compute
  # `rows` once for the sort and once more for a comparison outside, different
  # in the last bit, and an element would not equal itself.
  ordered, order = jax.lax.sort(
    (jax.lax.stop_gradient(rows), places), dimension=1, num_keys=1
  )
  sides = jnp.sign(ordered - ordered[:, k - 1, None])
  return jax.lax.sort((order, sides), dimension=1, num_keys=1)[1]


def _rows(features: jax.Array, batch_axis: int) -> jax.Array:
  """[N, M], one row per example, float32."""
  features = jnp.moveaxis(jnp.asarray(features, jnp.float32), batch_axis, 0)
  return features.reshape(features.shape[0], math.prod(features.shape[1:]))


def _normalized(rows: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Rows of length 1, and the lengths [N, 1]; zeros stay zeros."""
  squares = jnp.sum(jnp.square(rows), axis=1, keepdims=True)
  # Before the root, whose derivative at 0 is infinite.
  norm = jnp.sqrt(jnp.maximum(squares, _LEAST_NORM**2))
  # A gradient of 1 / norm, 1e12 there, would wreck what produced the zeros.
  rows = jnp.where(squares < _LEAST_NORM**2, jax.lax.stop_gradient(rows), rows)
  return rows / norm, norm


def _axes(
  name: str, features: jax.Array, batch_axis: int, channel_axis: int
) -> tuple[int, int]:
  """Both axes counted from the first."""
  shape = "[N, ..., C]"
  _checks.assert_float_array(name, features, shape)
  _checks.assert_map(name, features, shape, batch_axis)
  _checks.assert_true(
    -features.ndim <= channel_axis < features.ndim,
    f"{name} must have shape {shape} with the channels on axis {channel_axis},"
    f" got {features.shape}",
  )
  axes = batch_axis % features.ndim, channel_axis % features.ndim
  _checks.assert_true(
    axes[0] != axes[1],
    f"{name} must have N and C on two axes, got {batch_axis} and"
    f" {channel_axis} for shape {features.shape}",
  )
  return axes
