"""What the methods with one optimizer and one backward pass share."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from ekd_jax import losses
from ekd_jax.methods.interface import AXIS_NAME, State

# params, batch_stats, batch, rng -> loss, (new batch_stats, metrics)
LossFunction = Callable[
  [Any, Any, Any, jax.Array], tuple[jax.Array, tuple[Any, dict]]
]


def init_state(
  params: Any, batch_stats: Any, optimizer: optax.GradientTransformation
) -> State:
  """The state of such a method."""
  return {
    "params": params,
    "batch_stats": batch_stats,
    # As one program: run op by op, every shape would be one of its own.
    "opt_state": jax.jit(optimizer.init)(params),
  }


def gradient_step(
  state: State,
  batch: Any,
  rng: jax.Array,
  loss_function: LossFunction,
  optimizer: Any,
  parts: Callable[[Any], Mapping[str, Any]],
  *,
  accumulate: int = 1,
) -> tuple[State, dict[str, jax.Array]]:
  """One step of one optimizer on the gradients of one loss.

  Args:
    state: as made by `init_state`.
    batch: this device's examples.
    rng: key of what is random in the loss.
    loss_function: this device's mean loss, new statistics and metrics.
    optimizer: an optax.GradientTransformation.
    parts: the parameters that belong to each member, of a pytree like them.
    accumulate: micro-batches that the batch is taken in, one after the other;
      a divisor of its examples. The gradient is that of the whole batch, but
      for batch norm, whose statistics are each micro-batch's own.

  Returns:
    The next state and the metrics, both averaged over the devices. To the
    metrics of `loss_function` come "gradient_norm/PART", the Euclidean norm of
    the global batch's gradient, without weight decay: not finite if any
    element is not, which tells of a gradient that overflows under a finite
    loss, and in whom.
  """
  gradients, batch_stats, metrics = _gradients(
    loss_function, state, batch, rng, accumulate
  )
  gradients, batch_stats, metrics = average_over_devices(
    (gradients, batch_stats, metrics)
  )
  norms = {
    f"gradient_norm/{name}": optax.tree.norm(part)
    for name, part in parts(gradients).items()
  }
  updates, opt_state = optimizer.update(
    gradients, state["opt_state"], state["params"]
  )
  params = optax.apply_updates(state["params"], updates)
  next_state = {
    "params": params,
    "batch_stats": batch_stats,
    "opt_state": opt_state,
  }
  return next_state, metrics | norms


def _gradients(
  loss_function: LossFunction,
  state: State,
  batch: Any,
  rng: jax.Array,
  accumulate: int,
) -> tuple[Any, Any, dict[str, jax.Array]]:
  """Gradients, the statistics after the batch, and metrics, of this device."""
  params = state["params"]
  gradient_function = jax.grad(loss_function, has_aux=True)
  if accumulate == 1:
    gradients, (batch_stats, metrics) = gradient_function(
      params, state["batch_stats"], batch, rng
    )
    return gradients, batch_stats, metrics

  def of_part(batch_stats: Any, numbered: Any) -> tuple[Any, Any]:
    index, part = numbered
    gradients, (batch_stats, metrics) = gradient_function(
      params, batch_stats, part, jax.random.fold_in(rng, index)
    )
    return batch_stats, (gradients, metrics)

  def add_part(carry: Any, numbered: Any) -> tuple[Any, None]:
    batch_stats, sums = carry
    batch_stats, terms = of_part(batch_stats, numbered)
    return (batch_stats, jax.tree.map(jnp.add, sums, terms)), None

  parts = jax.tree.map(
    lambda x: x.reshape(accumulate, len(x) // accumulate, *x.shape[1:]), batch
  )
  numbered = jnp.arange(accumulate), parts
  _, shapes = jax.eval_shape(
    of_part, state["batch_stats"], jax.tree.map(lambda x: x[0], numbered)
  )
  nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  # A loop, so that only one part's maps are held at a time, whatever XLA does.
  (batch_stats, sums), _ = jax.lax.scan(
    add_part, (state["batch_stats"], nothing), numbered
  )
  gradients, metrics = jax.tree.map(lambda x: x / accumulate, sums)
  return gradients, batch_stats, metrics


def shape_of(array: jax.Array) -> jax.ShapeDtypeStruct:
  """Its shape and type."""
  return jax.ShapeDtypeStruct(array.shape, array.dtype)


def keys_of_networks(
  rng: jax.Array | None, count: int
) -> list[jax.Array | None]:
  """One key for the dropout of each network; no keys from no key."""
  if rng is None:
    return [None] * count
  return [jax.random.fold_in(rng, index) for index in range(count)]


def average_over_devices(tree: Any) -> Any:
  """The mean of a float32 pytree over `AXIS_NAME`, in one all-reduce.

  One, because on small networks an all-reduce costs its latency, not its
  bytes: gradients, statistics and metrics travel together. The others of a
  step are those of batch norm (`batch_norm._global`), two per layer, which
  cannot wait for each other.
  """
  if jax.lax.axis_size(AXIS_NAME) == 1:
    return tree
  flat, unravel = ravel_pytree(tree)
  return unravel(jax.lax.pmean(flat, AXIS_NAME))


def classification_metrics(
  logits: Mapping[str, jax.Array],
  labels: jax.Array,
  ensemble: jax.Array | None = None,
) -> dict[str, jax.Array]:
  """What every method reports of a training batch.

  Args:
    logits: {member: [n, K]} of every member.
    labels: [n] integers.
    ensemble: logits [n, K] of what teaches the members; their mean by default.

  Returns:
    "top1/MEMBER" of every member and "top1/ensemble", in percent, and
    "label/ensemble", the ensemble's cross entropy (that of the mean is never
    optimised).
  """
  if ensemble is None:
    ensemble = losses.ensemble_logits(list(logits.values()))
  metrics = {
    f"top1/{name}": _top1(values, labels) for name, values in logits.items()
  }
  metrics["top1/ensemble"] = _top1(ensemble, labels)
  metrics["label/ensemble"] = (
    optax.losses.softmax_cross_entropy_with_integer_labels(
      ensemble, labels
    ).mean()
  )
  return metrics


def with_ensemble(logits: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
  """The logits of all members, and of their ensemble under its own name."""
  ensemble = losses.ensemble_logits(list(logits.values()))
  return {"ensemble": ensemble, **logits}


def named(
  prefix: str, names: Sequence[str], values: jax.Array
) -> dict[str, jax.Array]:
  """Metrics "prefix/name" of an array with one value per name."""
  return {f"{prefix}/{name}": values[i] for i, name in enumerate(names)}


def _top1(logits: jax.Array, labels: jax.Array) -> jax.Array:
  return 100.0 * jnp.mean(jnp.argmax(logits, -1) == labels)
