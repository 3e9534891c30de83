"""The objective of peer collaborative learning (PCL).

Each of M peers has three sources: the labels; the peer ensemble, a classifier
of all peers' features together that is trained by the labels alone; and the
peer mean teachers, slowly moving averages of the OTHER peers. A peer's own
average says little that it does not know.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from ekd_jax.losses import _checks, _distillation, _labels


def pcl_loss(
  logits: Sequence[jax.Array],
  ensemble_logits: jax.Array,
  mean_teacher_logits: Sequence[jax.Array],
  labels: jax.Array,
  *,
  temperature: float | jax.Array = 3.0,
  distill_weight: float | jax.Array = 1.0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  r"""Computes the PCL training loss and the terms it is made of.

  .. math::
    L = \frac{1}{N} \sum_n \Big[ \mathrm{CE}(z_e, y)
      + \sum_{i=1}^{M} \Big( \mathrm{CE}(z_i, y)
      + w\, T^2\, \mathrm{KL}(p_e \,\|\, p_i)
      + \frac{w\, T^2}{M - 1} \sum_{j \ne i} \mathrm{KL}(\bar p_j \,\|\, p_i)
      \Big) \Big]

  with :math:`z_e` the ensemble's and :math:`\bar z_j` the mean teachers'
  logits, and p at temperature T. Teachers are constants, so the ensemble
  learns from its labels only.

  Args:
    logits: Unnormalised log-probabilities of the M peers, M >= 2 arrays of
      shape [N, K], N >= 1. Finite, of any floating-point type. Where each peer
      sees a view of its own of the N images, so does its mean teacher.
    ensemble_logits: The same of the peer ensemble, with shape [N, K].
    mean_teacher_logits: The same of the M mean teachers, in the order of
      `logits`.
    labels: The right classes, integers in [0, K), with shape [N]. The values
      are not checked; a label outside the range makes the loss NaN.
    temperature: T, a finite number above 0.
    distill_weight: w, finite and >= 0; the published one grows, see `ramp_up`.
      Like T it may be a traced scalar, whose range is then not checked.

  Returns:
    The loss, a float32 scalar, and its unweighted float32 terms, each a mean
    over the batch: "label" with shape [M], "ensemble_label" with shape [],
    "ensemble" (towards it) with shape [M] and "mean_teacher" with shape [M].

  Raises:
    AssertionError: If a shape, a type or a length is not as said above.
    ValueError: If a hyper-parameter is a Python number out of its range.

  References:
    Wu and Gong, `Peer Collaborative Learning for Online Knowledge Distillation
    <https://arxiv.org/abs/2006.04147>`_, 2021, with three peers and a
    temperature of 3.

  Example:
    >>> import jax.numpy as jnp
    >>> from ekd_jax import losses
    >>> first = jnp.array([[2.0, 0.5, -1.0], [0.1, 0.2, 0.3]])
    >>> second = jnp.array([[1.0, 1.5, -0.5], [0.0, -0.4, 0.9]])
    >>> ensemble = jnp.array([[0.7, 0.1, -0.3], [-0.2, 0.0, 0.8]])
    >>> loss, terms = losses.pcl_loss(
    ...     [first, second], ensemble, [first, second], jnp.array([0, 2]))
    >>> print([round(term.item(), 4) for term in terms["ensemble"]])
    [0.1922, 0.1223]
  """
  _labels.assert_batch(logits, labels)
  _labels.assert_peers(logits)
  _checks.assert_logits("ensemble_logits", ensemble_logits, "[N, K]")
  _checks.assert_same_shape(
    "ensemble_logits", ensemble_logits, "logits[0]", logits[0], "[N, K]"
  )
  _checks.assert_members("mean_teacher_logits", mean_teacher_logits, "[N, K]")
  _checks.assert_true(
    len(mean_teacher_logits) == len(logits),
    f"mean_teacher_logits must hold one array for each of the {len(logits)}"
    f" peers, got {len(mean_teacher_logits)}",
  )
  _checks.assert_same_shape(
    "mean_teacher_logits[0]",
    mean_teacher_logits[0],
    "logits[0]",
    logits[0],
    "[N, K]",
  )
  _checks.check_temperature(temperature)
  _checks.check_weight("distill_weight", distill_weight)

  def distill(student: jax.Array, teacher: jax.Array) -> jax.Array:
    return _distillation.distillation_loss(
      student, teacher, temperature=temperature, stop_teacher_gradient=True
    )

  def from_others(index: int) -> jax.Array:
    others = [
      distill(logits[index], teacher)
      for j, teacher in enumerate(mean_teacher_logits)
      if j != index
    ]
    return jnp.mean(jnp.stack(others), axis=0)

  terms = {
    "label": _labels.batch_means(
      [_labels.label_loss(z, labels) for z in logits]
    ),
    "ensemble_label": jnp.mean(_labels.label_loss(ensemble_logits, labels)),
    "ensemble": _labels.batch_means(
      [distill(z, ensemble_logits) for z in logits]
    ),
    "mean_teacher": _labels.batch_means(
      [from_others(index) for index in range(len(logits))]
    ),
  }
  weight = jnp.asarray(distill_weight, jnp.float32)
  loss = jnp.sum(terms["label"]) + terms["ensemble_label"]
  loss += weight * jnp.sum(terms["ensemble"] + terms["mean_teacher"])
  return loss, terms
