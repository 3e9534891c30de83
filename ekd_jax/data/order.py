"""The order of the examples, as a function of (seed, epoch) and nothing else.

There is no iterator to save in a checkpoint: epoch 7's order can be computed
without having lived through epochs 0 to 6, so a resumed run needs the step
number only.
"""

import jax
import jax.numpy as jnp


def epoch_order(
  key: jax.Array, epoch: int | jax.Array, num_examples: int
) -> jax.Array:
  """Returns the order in which one epoch visits the examples.

  Args:
    key: the run's data key, the same for every epoch.
    epoch: which epoch, counted from 0; may be traced.
    num_examples: how many training examples there are; static.

  Returns:
    int32 [num_examples]: a permutation of 0 .. num_examples - 1.
  """
  order = jax.random.permutation(jax.random.fold_in(key, epoch), num_examples)
  return order.astype(jnp.int32)
