"""Feature fusion learning (FFL).

Kim, Hyun, Chung and Kwak, "Feature Fusion for Online Mutual Knowledge
Distillation", ICPR 2020. Sub-networks trained side by side, whose last maps a
small module fuses into one more classifier. The mean of the sub-networks'
logits teaches the fused classifier, and that teaches each of them. It is
trained through: its labels and its teacher reach the sub-networks too. Any
sub-network can be shipped alone; the fused classifier needs them all.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ekd_jax import losses
from ekd_jax.compression import Member
from ekd_jax.methods import update
from ekd_jax.methods.interface import Method, State, Student
from ekd_jax.methods.peers import (
  init_peers,
  parts_of_peers,
  peers,
  run_peers,
  students_of_peers,
)
from ekd_jax.models.computation import Computation
from ekd_jax.models.fusion import Fusion
from ekd_jax.models.network import Family, apply_network, init_network


def ffl(
  families: Sequence[Family],
  members: Sequence[Member],
  optimizer: optax.GradientTransformation,
  *,
  compute: Computation,
  num_classes: int,
  temperature: float = 3.0,
  ramp: Callable[[jax.Array], jax.Array] = lambda step: jnp.float32(1),
  accumulate: int = 1,
) -> Method:
  """The FFL method for two or more networks.

  The state holds {"params": {"networks", "fusion"}, "batch_stats" likewise,
  "opt_state", "step"}; see `peers` for the networks. "ensemble" is the fused
  classifier.

  Args:
    families: of each sub-network; their last maps have the same sides.
    members: the sub-networks. Equal ones share low layers, see `peers`.
    optimizer: for all parameters; those of the module are under "fusion".
    compute: how the fusion module is computed.
    num_classes: K.
    temperature: of both distillation terms, > 0.
    ramp: step -> weight of the distillation terms.
    accumulate: micro-batches of a step; see `update.gradient_step`.

  Returns:
    The `Method`.
  """
  networks = peers(families, members)
  names = networks.names
  fused_channels = families[0].feature_channels[-1]
  fusion = Fusion(compute, fused_channels, num_classes)

  def init(rng: jax.Array, batch: Mapping[str, jax.Array]) -> State:
    networks_rng, fusion_rng = jax.random.split(rng)
    images = update.shape_of(batch["image"])
    params, batch_stats, outputs = init_peers(networks, networks_rng, images)
    last = [outputs[name].features[-1] for name in names]
    variables, _ = init_network(fusion, fusion_rng, last)
    return update.init_state(
      {"networks": params, "fusion": variables["params"]},
      {"networks": batch_stats, "fusion": variables["batch_stats"]},
      optimizer,
    ) | {"step": jnp.zeros((), jnp.int32)}

  def forward(
    params: Any,
    batch_stats: Any,
    images: jax.Array,
    *,
    train: bool,
    rng: jax.Array | None = None,
  ) -> tuple[dict[str, jax.Array], jax.Array, Any]:
    """Logits of the sub-networks and the fused ones, and the statistics."""
    outputs, network_stats = run_peers(
      networks,
      params["networks"],
      batch_stats["networks"],
      [images],
      train=train,
      rng=rng,
    )
    fused, fusion_stats = apply_network(
      fusion,
      params["fusion"],
      batch_stats["fusion"],
      [outputs[name].features[-1] for name in names],
      train=train,
    )
    new_stats = {"networks": network_stats, "fusion": fusion_stats}
    return {n: outputs[n].logits for n in names}, fused.logits, new_stats

  def train_step(
    state: State, batch: Mapping[str, jax.Array], rng: jax.Array
  ) -> tuple[State, dict[str, jax.Array]]:
    def loss_function(
      params: Any,
      batch_stats: Any,
      batch: Mapping[str, jax.Array],
      rng: jax.Array,
    ) -> tuple[jax.Array, tuple[Any, dict[str, jax.Array]]]:
      logits, fused, new_stats = forward(
        params, batch_stats, batch["image"], train=True, rng=rng
      )
      loss, terms = losses.ffl_loss(
        list(logits.values()),
        fused,
        batch["label"],
        temperature=temperature,
        distill_weight=ramp(state["step"]),
      )
      metrics = {
        "loss": loss,
        **update.named("label", names, terms["label"]),
        **update.named("distill", names, terms["distill"]),
        "distill/ensemble": terms["fused_distill"],
        **update.classification_metrics(logits, batch["label"], fused),
      }
      return loss, (new_stats, metrics)

    next_state, metrics = update.gradient_step(
      state, batch, rng, loss_function, optimizer, parts, accumulate=accumulate
    )
    return next_state | {"step": state["step"] + 1}, metrics

  def parts(params: Any) -> dict[str, Any]:
    return {**parts_of_peers(params["networks"]), "ensemble": params["fusion"]}

  def predict(state: State, images: jax.Array) -> dict[str, jax.Array]:
    logits, fused, _ = forward(
      state["params"], state["batch_stats"], images, train=False
    )
    return {"ensemble": fused, **logits}

  def students(state: State) -> dict[str, Student]:
    return students_of_peers(
      networks, state["params"]["networks"], state["batch_stats"]["networks"]
    )

  return Method(init, train_step, predict, students)
