"""The objective of feature fusion learning (FFL).

M sub-networks and a classifier of their fused features teach each other. The
sub-networks' mean logits are the target of the fused classifier, and that is
the target of every sub-network; all of them have the labels too.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from ekd_jax.losses import _checks, _distillation, _ensemble, _labels


def ffl_loss(
  logits: Sequence[jax.Array],
  fused_logits: jax.Array,
  labels: jax.Array,
  *,
  temperature: float | jax.Array = 3.0,
  distill_weight: float | jax.Array = 1.0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  r"""Computes the FFL training loss and the terms it is made of.

  .. math::
    L = \frac{1}{N} \sum_n \Big[
      \sum_{m=1}^{M} \mathrm{CE}(z_m, y) + \mathrm{CE}(z_f, y)
      + w\, T^2 \Big( \sum_{m=1}^{M} \mathrm{KL}(p_f \,\|\, p_m)
      + \mathrm{KL}(p_E \,\|\, p_f) \Big) \Big]

  with :math:`p_E` from the sub-networks' mean logits, and p at temperature T.
  Each target is a constant. If the fused classifier is computed from the
  sub-networks' features, both of its terms train these as well.

  The published code adds 1e-7 to every target probability; that changes a term
  by a few 1e-6 and is left out.

  Args:
    logits: Unnormalised log-probabilities of the M sub-networks, M >= 2 arrays
      of shape [N, K], N >= 1. Finite, of any floating-point type.
    fused_logits: The same of the fused classifier, with shape [N, K].
    labels: The right classes, integers in [0, K), with shape [N]. The values
      are not checked; a label outside the range makes the loss NaN.
    temperature: T, a finite number above 0.
    distill_weight: w, finite and >= 0; the published one grows, see `ramp_up`.
      Like T it may be a traced scalar, whose range is then not checked.

  Returns:
    The loss, a float32 scalar, and its unweighted float32 terms, each a mean
    over the batch: "label" with shape [M], "fused_label" with shape [],
    "distill" with shape [M] and "fused_distill" with shape [].

  Raises:
    AssertionError: If a shape, a type or a length is not as said above.
    ValueError: If a hyper-parameter is a Python number out of its range.

  References:
    Kim et al, `Feature Fusion for Online Mutual Knowledge Distillation
    <https://arxiv.org/abs/1904.09058>`_, 2019: mutual knowledge distillation,
    there with two sub-networks, a temperature of 3 and a ramp of 80 epochs.

  Example:
    >>> import jax.numpy as jnp
    >>> from ekd_jax import losses
    >>> first = jnp.array([[2.0, 0.5, -1.0], [0.1, 0.2, 0.3]])
    >>> second = jnp.array([[1.0, 1.5, -0.5], [0.0, -0.4, 0.9]])
    >>> fused = jnp.array([[0.2, -0.3, 0.4], [1.2, 0.7, -0.6]])
    >>> loss, terms = losses.ffl_loss(
    ...     [first, second], fused, jnp.array([0, 2]))
    >>> print(round(loss.item(), 4))
    4.9177
    >>> print([round(term.item(), 4) for term in terms["distill"]])
    [0.6008, 0.6557]
  """
  _labels.assert_batch(logits, labels)
  _labels.assert_peers(logits)
  _checks.assert_logits("fused_logits", fused_logits, "[N, K]")
  _checks.assert_same_shape(
    "fused_logits", fused_logits, "logits[0]", logits[0], "[N, K]"
  )
  _checks.check_temperature(temperature)
  _checks.check_weight("distill_weight", distill_weight)

  def distill(student: jax.Array, teacher: jax.Array) -> jax.Array:
    return _distillation.distillation_loss(
      student, teacher, temperature=temperature, stop_teacher_gradient=True
    )

  ensemble = _ensemble.ensemble_logits(logits)
  terms = {
    "label": _labels.batch_means(
      [_labels.label_loss(z, labels) for z in logits]
    ),
    "fused_label": jnp.mean(_labels.label_loss(fused_logits, labels)),
    "distill": _labels.batch_means([distill(z, fused_logits) for z in logits]),
    "fused_distill": jnp.mean(distill(fused_logits, ensemble)),
  }
  weight = jnp.asarray(distill_weight, jnp.float32)
  loss = jnp.sum(terms["label"]) + terms["fused_label"]
  loss += weight * (jnp.sum(terms["distill"]) + terms["fused_distill"])
  return loss, terms
