"""Deep mutual learning (DML).

Zhang, Xiang, Hospedales and Lu, "Deep Mutual Learning", CVPR 2018: networks
trained side by side, each towards the labels and towards the mean divergence
from its peers' predictions. As in the paper the two terms weigh the same and
the temperature is 1. All members step at once on the same predictions (the
paper alternates).
"""

from collections.abc import Mapping, Sequence

import jax
import optax

from ekd_jax import losses
from ekd_jax.compression import Member
from ekd_jax.methods.independent import independent_networks
from ekd_jax.methods.interface import Method
from ekd_jax.models.network import Family


def dml(
  families: Sequence[Family],
  members: Sequence[Member],
  optimizer: optax.GradientTransformation,
  *,
  temperature: float = 1.0,
  accumulate: int = 1,
) -> Method:
  """Trains the members towards the labels and each other.

  Args:
    families: of each member.
    members: who is trained.
    optimizer: for all parameters.
    temperature: of the mutual term, > 0; 1 in the paper.
    accumulate: micro-batches of a step; see `update.gradient_step`.

  Returns:
    The `Method`; see `independent_networks` for its state.
  """

  def label_and_mutual_loss(
    logits: Mapping[str, jax.Array], labels: jax.Array
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    mutual = losses.mutual_learning_loss(
      list(logits.values()), temperature=temperature
    )
    terms = {}
    for (name, values), divergence in zip(logits.items(), mutual, strict=True):
      cross_entropy = optax.losses.softmax_cross_entropy_with_integer_labels(
        values, labels
      )
      terms[f"label/{name}"] = cross_entropy.mean()
      terms[f"mutual/{name}"] = divergence.mean()
    return sum(terms.values()), terms

  return independent_networks(
    families, members, optimizer, label_and_mutual_loss, accumulate=accumulate
  )
