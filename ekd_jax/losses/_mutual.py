"""Learning from each other, without a teacher.

In deep mutual learning every member of a group is student and teacher at once:
besides its labels it matches the probabilities of each of its peers. A peer is
a fixed target while it teaches. Were it not, the members would also be pulled
towards whoever learns from them, and could agree by giving up what they know.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from ekd_jax.losses import _checks, _distillation


def mutual_learning_loss(
  logits: Sequence[jax.Array], *, temperature: float | jax.Array
) -> tuple[jax.Array, ...]:
  r"""Computes each member's mean distillation loss from all other members.

  .. math::
    \ell_i = \frac{T^2}{S - 1} \sum_{j \ne i} \mathrm{KL}(p_j \,\|\, p_i),
    \quad p_i = \mathrm{softmax}(z_i / T)

  No gradient reaches the peers :math:`p_j`, so the sum of the S losses trains
  each member by its own loss alone. The temperature and its factor T^2, which
  keeps the gradients' size, are additions of this library; T = 1 is the
  published loss.

  Args:
    logits: Unnormalised log-probabilities of the S members, S >= 1 arrays of
      shape [..., K]. Finite, of any floating-point type.
    temperature: T, a finite number above 0 shared by all members. May be a
      traced scalar, whose range is then not checked.

  Returns:
    S arrays, the loss of each member in the order of `logits`, non-negative up
    to rounding, float32, each with shape [...]. A single member has no peers
    and gets zeros.

  Raises:
    AssertionError: If `logits` is not a list or tuple of at least one
      floating-point array, all of one shape with K >= 1, or `temperature` is
      not a single number.
    ValueError: If `temperature` is a Python number that is not finite and
      above 0.

  References:
    Zhang et al, `Deep Mutual Learning <https://arxiv.org/abs/1706.00384>`_,
    2018: the mimicry loss, in its extension to more than two students.

  Example:
    >>> import jax.numpy as jnp
    >>> from ekd_jax import losses
    >>> sure = jnp.array([[2.0, 0.0]])
    >>> unsure = jnp.array([[0.0, 0.0]])
    >>> loss = losses.mutual_learning_loss([sure, unsure], temperature=1.0)
    >>> print([round(member.item(), 4) for member in loss])
    [0.4338, 0.3278]
  """
  _checks.assert_members("logits", logits)
  _checks.check_temperature(temperature)
  if len(logits) == 1:
    return (jnp.zeros(logits[0].shape[:-1], jnp.float32),)
  losses = []
  for i, member in enumerate(logits):
    from_peers = [
      _distillation.distillation_loss(member, peer, temperature=temperature)
      for j, peer in enumerate(logits)
      if j != i
    ]
    losses.append(jnp.mean(jnp.stack(from_peers), axis=0))
  return tuple(losses)
