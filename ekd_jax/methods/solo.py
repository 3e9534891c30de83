"""Every student alone: the baseline of every claim.

Each member is trained with cross entropy only, under the recipe and on the
batches that the other methods see. The members are independent: the gradient
of the sum of their losses is each one's own.
"""

from collections.abc import Mapping, Sequence

import jax
import optax

from ekd_jax.compression import Member
from ekd_jax.methods.independent import independent_networks
from ekd_jax.methods.interface import Method
from ekd_jax.models.network import Family


def solo(
  families: Sequence[Family],
  members: Sequence[Member],
  optimizer: optax.GradientTransformation,
  *,
  accumulate: int = 1,
) -> Method:
  """Trains each member alone; see `independent_networks`."""

  def label_loss(
    logits: Mapping[str, jax.Array], labels: jax.Array
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    terms = {
      f"label/{name}": optax.losses.softmax_cross_entropy_with_integer_labels(
        values, labels
      ).mean()
      for name, values in logits.items()
    }
    return sum(terms.values()), terms

  return independent_networks(
    families, members, optimizer, label_loss, accumulate=accumulate
  )
