"""Learning from a wider network's feature maps.

Logits teach only through the last layer. Comparing the maps after each block
gives the thin network a target in the middle as well. The maps must first be
brought to one width, usually by a learned 1x1 convolution on the student's
side; that adapter belongs to the model, so both inputs here already match.
"""

import jax
import jax.numpy as jnp
import optax

from ekd_jax.losses import _checks


def feature_loss(
  student_features: jax.Array,
  teacher_features: jax.Array,
  *,
  stop_teacher_gradient: bool = True,
  batch_axis: int = 0,
) -> jax.Array:
  r"""Computes the mean squared difference of two feature maps, per example.

  .. math::
    \ell_n = \frac{1}{M} \sum_m (s_{nm} - t_{nm})^2

  with m over all M elements of one example's map. The mean, unlike the squared
  norm, keeps blocks of different sizes comparable under one weight.

  Args:
    student_features: Maps with shape [N, ..., C], adapted to the teacher's
      shape. Finite, of any floating-point type.
    teacher_features: The target maps, with shape [N, ..., C].
    stop_teacher_gradient: Whether the teacher is a constant target (the
      default). False also pulls the teacher towards the student.
    batch_axis: Which axis of the maps is N, for maps in another order than
      [N, ..., C].

  Returns:
    The loss of each example, non-negative, float32, with shape [N].

  Raises:
    AssertionError: If the maps are not floating-point arrays of one shape
      [N, ..., C] with at least one element per example.

  References:
    Walawalkar et al, `Online Ensemble Model Compression using Knowledge
    Distillation <https://arxiv.org/abs/2011.07449>`_, 2020, Eq. 3, which sums
    over the elements where this takes their mean.

  Example:
    >>> import jax.numpy as jnp
    >>> from ekd_jax import losses
    >>> student = jnp.zeros((2, 4, 4, 8))
    >>> teacher = jnp.full((2, 4, 4, 8), 0.5)
    >>> print(losses.feature_loss(student, teacher))
    [0.25 0.25]
  """
  shape = "[N, ..., C]"
  _checks.assert_float_array("student_features", student_features, shape)
  _checks.assert_float_array("teacher_features", teacher_features, shape)
  _checks.assert_same_shape(
    "student_features",
    student_features,
    "teacher_features",
    teacher_features,
    shape,
  )
  _checks.assert_map("features", student_features, shape, batch_axis)
  if stop_teacher_gradient:
    teacher_features = jax.lax.stop_gradient(teacher_features)
  squared_errors = optax.losses.squared_error(
    jnp.asarray(student_features, jnp.float32),
    jnp.asarray(teacher_features, jnp.float32),
  )
  axes = list(range(squared_errors.ndim))
  del axes[batch_axis]
  return jnp.mean(squared_errors, axis=axes)
