"""The objective of online ensemble knowledge distillation (EKD).

S networks train at once: the full network and S - 1 thinner ones that share
its stem. Each learns from three sources:

  label    the right class, for every member;
  feature  the full network's block outputs, for the thinner members;
  distill  the mean logits of all members, for every member.

There is no finished teacher, so the targets move while they are followed. They
are constants within a step all the same: the full network must not bend its
features towards the thin ones, nor the ensemble its logits towards one member.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from ekd_jax.losses import (
  _checks,
  _distillation,
  _ensemble,
  _feature,
  _labels,
)

_MAP = "[N, ..., C]"


def ekd_loss(
  logits: Sequence[jax.Array],
  labels: jax.Array,
  student_features: Sequence[Sequence[jax.Array]],
  teacher_features: Sequence[jax.Array],
  *,
  temperature: float | jax.Array = 2.0,
  label_weight: float | jax.Array = 0.7,
  feature_weight: float | jax.Array = 0.15,
  distill_weight: float | jax.Array = 0.15,
  feature_batch_axis: int = 0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  r"""Computes the EKD training loss and the terms it is made of.

  .. math::
    L = \frac{1}{N} \sum_n \Big[
      w_l \sum_{i=1}^{S} \mathrm{CE}(z_i, y)
      + w_f \sum_{i=2}^{S} \sum_{b=1}^{B} \mathrm{MSE}(f_{ib}, f_{1b})
      + w_d \sum_{i=1}^{S} T^2\, \mathrm{KL}(p_E \,\|\, p_i) \Big]

  with :math:`p_E` from the mean logits of all S members, the full network
  among them, and p at temperature T. Sums run over members and blocks, so the
  loss grows with both, and each member's share stays what it would be in a
  smaller family.

  No gradient reaches the ensemble or `teacher_features`: the full network
  (member 0) learns from its labels and its own distillation term, every other
  member from all three.

  Args:
    logits: Unnormalised log-probabilities of the S members, the full network
      first: S >= 1 arrays of shape [N, K], N >= 1. Finite, of any
      floating-point type.
    labels: The right classes, integers in [0, K), with shape [N]. The values
      are not checked; a label outside the range makes the loss NaN.
    student_features: For each of the S - 1 thinner members, in the order of
      `logits`, its B block outputs, already adapted to the shapes of
      `teacher_features`.
    teacher_features: The full network's B block outputs, arrays of shape
      [N, ..., C] such as [N, H, W, C]. B may be 0.
    temperature: T of the distillation term, a finite number above 0.
    label_weight: Weight of the label term, finite and >= 0.
    feature_weight: Weight of the feature term, finite and >= 0.
    distill_weight: Weight of the distillation term, finite and >= 0. Like the
      other three it may be a traced scalar, whose range is then not checked.
    feature_batch_axis: Which axis of the features is N, for maps in another
      order than [N, ..., C].

  Returns:
    The loss, a float32 scalar, and its unweighted float32 terms, each a mean
    over the batch: "label" with shape [S], "feature" with shape [S - 1, B] and
    "distill" with shape [S].

  Raises:
    AssertionError: If a shape, a type or a length is not as said above; the
      message names the argument and what was expected.
    ValueError: If a hyper-parameter is a Python number out of its range.

  References:
    Walawalkar et al, `Online Ensemble Model Compression using Knowledge
    Distillation <https://arxiv.org/abs/2011.07449>`_, 2020: Eq. 3 (features;
    here a mean over the elements, not a sum) and Eq. 6 (distillation; here
    with T^2 and averaged over the batch). The default weights and temperature
    are the ones it found best.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from ekd_jax import losses
    >>> full = jnp.array([[2.0, 0.5, -1.0], [0.1, 0.2, 0.3]])
    >>> thin = jnp.array([[1.0, 1.5, -0.5], [0.0, -0.4, 0.9]])
    >>> labels = jnp.array([0, 2])
    >>> full_maps = [jnp.ones((2, 4, 4, 8))]
    >>> thin_maps = [jnp.zeros((2, 4, 4, 8))]
    >>> loss, terms = losses.ekd_loss(
    ...     [full, thin], labels, [thin_maps], full_maps)
    >>> print(round(loss.item(), 4))
    1.1569
    >>> print(terms["label"].round(4))
    [0.6216 0.7866]
  """
  _check_arrays(
    logits, labels, student_features, teacher_features, feature_batch_axis
  )
  _checks.check_temperature(temperature)
  _checks.check_weight("label_weight", label_weight)
  _checks.check_weight("feature_weight", feature_weight)
  _checks.check_weight("distill_weight", distill_weight)

  ensemble = _ensemble.ensemble_logits(logits)
  label = [_labels.label_loss(z, labels) for z in logits]
  distill = [
    _distillation.distillation_loss(
      z, ensemble, temperature=temperature, stop_teacher_gradient=True
    )
    for z in logits
  ]
  feature = [
    _feature.feature_loss(
      student,
      teacher,
      stop_teacher_gradient=True,
      batch_axis=feature_batch_axis,
    )
    for features in student_features
    for student, teacher in zip(features, teacher_features, strict=True)
  ]
  terms = {
    "label": _labels.batch_means(label),
    "feature": _labels.batch_means(feature).reshape(
      len(student_features), len(teacher_features)
    ),
    "distill": _labels.batch_means(distill),
  }
  weights = {
    "label": label_weight,
    "feature": feature_weight,
    "distill": distill_weight,
  }
  loss = sum(
    jnp.asarray(weights[name], jnp.float32) * jnp.sum(terms[name])
    for name in terms
  )
  return loss, terms


def _check_arrays(
  logits: Sequence[jax.Array],
  labels: jax.Array,
  student_features: Sequence[Sequence[jax.Array]],
  teacher_features: Sequence[jax.Array],
  feature_batch_axis: int,
) -> None:
  batch_size = _labels.assert_batch(logits, labels)
  _checks.assert_sequence(
    "teacher_features", teacher_features, f"B arrays {_MAP}, one per block"
  )
  for b, teacher in enumerate(teacher_features):
    name = f"teacher_features[{b}]"
    _checks.assert_float_array(name, teacher, _MAP)
    _checks.assert_map(name, teacher, _MAP, feature_batch_axis)
    _checks.assert_true(
      teacher.shape[feature_batch_axis] == batch_size,
      f"{name} must have shape {_MAP} with N = {batch_size} on axis"
      f" {feature_batch_axis}, got {teacher.shape}",
    )

  num_thinner, num_blocks = len(logits) - 1, len(teacher_features)
  _checks.assert_sequence(
    "student_features",
    student_features,
    f"S - 1 sequences of arrays {_MAP}, one per thinner member",
  )
  _checks.assert_true(
    len(student_features) == num_thinner,
    f"student_features must have S - 1 = {num_thinner} entries, one per member"
    f" after the first in logits, got {len(student_features)}",
  )
  for i, features in enumerate(student_features):
    name = f"student_features[{i}]"
    _checks.assert_sequence(name, features, f"B arrays {_MAP}, one per block")
    _checks.assert_true(
      len(features) == num_blocks,
      f"{name} must have B = {num_blocks} arrays, one per array in"
      f" teacher_features, got {len(features)}",
    )
    for b, student in enumerate(features):
      block = f"{name}[{b}]"
      _checks.assert_float_array(block, student, _MAP)
      _checks.assert_same_shape(
        block, student, f"teacher_features[{b}]", teacher_features[b], _MAP
      )
