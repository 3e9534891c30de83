"""Whole networks side by side: what `solo` and `dml` have in common.

The members share no parameters, each has a stem of its own, yet all of them
run in one compiled step, on the same augmented batch. The two methods differ
only in the loss they make of the members' logits.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import optax

from ekd_jax.compression import Member
from ekd_jax.methods import update
from ekd_jax.methods.interface import Method, State, Student
from ekd_jax.models import Network
from ekd_jax.models.network import Family, apply_network, init_network

# ({member: logits [n, K]}, labels [n]) -> (loss, {metric: scalar})
LogitsLoss = Callable[
  [Mapping[str, jax.Array], jax.Array],
  tuple[jax.Array, dict[str, jax.Array]],
]


def independent_networks(
  families: Sequence[Family],
  members: Sequence[Member],
  optimizer: optax.GradientTransformation,
  loss_of_logits: LogitsLoss,
  *,
  accumulate: int = 1,
) -> Method:
  """The method that trains every member as a network of its own.

  Args:
    families: of each member.
    members: who is trained.
    optimizer: for all parameters.
    loss_of_logits: this device's scalar loss and its terms.
    accumulate: micro-batches of a step; see `update.gradient_step`.

  Returns:
    The `Method`; its state holds {"params": {member}, "batch_stats":
    {member}, "opt_state"}.
  """
  pairs = list(zip(families, members, strict=True))
  networks = {m.name: Network(f.stem(), f.branch(m.width)) for f, m in pairs}

  def init(rng: jax.Array, batch: Mapping[str, jax.Array]) -> State:
    images = update.shape_of(batch["image"])
    variables = {
      name: init_network(network, member_rng, images)[0]
      for (name, network), member_rng in zip(
        networks.items(), jax.random.split(rng, len(networks)), strict=True
      )
    }
    return update.init_state(
      {name: v["params"] for name, v in variables.items()},
      {name: v["batch_stats"] for name, v in variables.items()},
      optimizer,
    )

  def train_step(
    state: State, batch: Mapping[str, jax.Array], rng: jax.Array
  ) -> tuple[State, dict[str, jax.Array]]:
    def loss_function(
      params: Any,
      batch_stats: Any,
      batch: Mapping[str, jax.Array],
      rng: jax.Array,
    ) -> tuple[jax.Array, tuple[Any, dict[str, jax.Array]]]:
      logits, new_stats = {}, {}
      rngs = update.keys_of_networks(rng, len(networks))
      for (name, network), own_rng in zip(networks.items(), rngs, strict=True):
        outputs, new_stats[name] = apply_network(
          network,
          params[name],
          batch_stats[name],
          batch["image"],
          train=True,
          rng=own_rng,
        )
        logits[name] = outputs.logits
      loss, terms = loss_of_logits(logits, batch["label"])
      metrics = update.classification_metrics(logits, batch["label"])
      return loss, (new_stats, {"loss": loss, **terms, **metrics})

    return update.gradient_step(
      state, batch, rng, loss_function, optimizer, dict, accumulate=accumulate
    )

  def predict(state: State, images: jax.Array) -> dict[str, jax.Array]:
    logits = {}
    for name, network in networks.items():
      outputs, _ = apply_network(
        network,
        state["params"][name],
        state["batch_stats"][name],
        images,
        train=False,
      )
      logits[name] = outputs.logits
    return update.with_ensemble(logits)

  def students(state: State) -> dict[str, Student]:
    return {
      m.name: Student(
        Network(f.alone().stem(), f.alone().branch(m.width)),
        {
          "params": state["params"][m.name],
          "batch_stats": state["batch_stats"][m.name],
        },
      )
      for f, m in pairs
    }

  return Method(init, train_step, predict, students)
