"""Peer collaborative learning (PCL).

Wu and Gong, "Peer Collaborative Learning for Online Knowledge Distillation",
AAAI 2021. Peers that each see their own view of an image have two teachers: a
classifier of all their pooled features together (the peer ensemble), and the
running means of the OTHER peers' parameters (the peer mean teachers). A running
mean is what is shipped: a network of the same size that is a little better.
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
from ekd_jax.models import layers
from ekd_jax.models.network import Family, Outputs


def pcl(
  families: Sequence[Family],
  members: Sequence[Member],
  optimizer: optax.GradientTransformation,
  *,
  num_classes: int,
  temperature: float = 3.0,
  ramp: Callable[[jax.Array], jax.Array] = lambda step: jnp.float32(1),
  mean_teacher_decay: float = 0.999,
  views: int = 3,
  accumulate: int = 1,
) -> Method:
  """The PCL method for two or more networks.

  The state holds {"params": {"networks", "head"}, "mean_teacher",
  "batch_stats": {"networks", "mean_teacher"}, "opt_state", "step"}; see `peers`
  for the networks. The members are the mean teachers; the peers that are
  trained are scored too, as "peer_0" and so on.

  Args:
    families: of each peer.
    members: the peers. Equal ones share low layers, see `peers`.
    optimizer: for all parameters.
    num_classes: K.
    temperature: of both distillation terms, > 0.
    ramp: step -> weight of the distillation terms.
    mean_teacher_decay: the largest a of mean = a mean + (1 - a) parameters, in
      [0, 1); step g, counted from 0, uses min(1 - 1 / (g + 1), it).
    views: of each image, >= 1; the peers are given one each, in turn.
    accumulate: micro-batches of a step; see `update.gradient_step`.

  Returns:
    The `Method`.
  """
  networks = peers(families, members)
  names = networks.names
  head = layers.Dense(num_classes, layers.fan_in_uniform)

  def init(rng: jax.Array, batch: Mapping[str, jax.Array]) -> State:
    networks_rng, head_rng = jax.random.split(rng)
    images = update.shape_of(batch["image"])
    if views > 1:
      count, _, *rest = images.shape
      images = jax.ShapeDtypeStruct((count, *rest), images.dtype)
    params, batch_stats, outputs = init_peers(networks, networks_rng, images)
    features = jax.eval_shape(_pooled, [outputs[name] for name in names])
    variables = head.lazy_init(head_rng, features)
    # The decay of the first step is 0: nothing of what is here is kept.
    return update.init_state(
      {"networks": params, "head": variables["params"]},
      {"networks": batch_stats, "mean_teacher": batch_stats},
      optimizer,
    ) | {"mean_teacher": params, "step": jnp.zeros((), jnp.int32)}

  def ensemble_logits(params: Any, outputs: Mapping[str, Outputs]) -> jax.Array:
    features = _pooled([outputs[name] for name in names])
    return head.apply({"params": params["head"]}, features)

  def train_step(
    state: State, batch: Mapping[str, jax.Array], rng: jax.Array
  ) -> tuple[State, dict[str, jax.Array]]:
    def loss_function(
      params: Any,
      batch_stats: Any,
      batch: Mapping[str, jax.Array],
      rng: jax.Array,
    ) -> tuple[jax.Array, tuple[Any, dict[str, jax.Array]]]:
      images = batch["image"]
      seen = [images] if views == 1 else [images[:, v] for v in range(views)]
      peer_rng, teacher_rng = update.keys_of_networks(rng, 2)
      outputs, network_stats = run_peers(
        networks,
        params["networks"],
        batch_stats["networks"],
        seen,
        train=True,
        rng=peer_rng,
      )
      # With batch statistics too, as the peers; its running ones are its own.
      teachers, teacher_stats = run_peers(
        networks,
        state["mean_teacher"],
        batch_stats["mean_teacher"],
        seen,
        train=True,
        rng=teacher_rng,
      )
      ensemble = ensemble_logits(params, outputs)
      logits = {name: outputs[name].logits for name in names}
      loss, terms = losses.pcl_loss(
        list(logits.values()),
        ensemble,
        [teachers[name].logits for name in names],
        batch["label"],
        temperature=temperature,
        distill_weight=ramp(state["step"]),
      )
      metrics = {
        "loss": loss,
        **update.named("label", names, terms["label"]),
        **update.named("distill", names, terms["ensemble"]),
        **update.named("mean_teacher", names, terms["mean_teacher"]),
        **update.classification_metrics(logits, batch["label"], ensemble),
      }
      new_stats = {"networks": network_stats, "mean_teacher": teacher_stats}
      return loss, (new_stats, metrics)

    next_state, metrics = update.gradient_step(
      state, batch, rng, loss_function, optimizer, parts, accumulate=accumulate
    )
    decay = mean_decay(state["step"], mean_teacher_decay)
    mean_teacher = jax.tree.map(
      lambda mean, new: decay * mean + (1 - decay) * new,
      state["mean_teacher"],
      next_state["params"]["networks"],
    )
    return {
      **next_state,
      "mean_teacher": mean_teacher,
      "step": state["step"] + 1,
    }, metrics

  def parts(params: Any) -> dict[str, Any]:
    return {**parts_of_peers(params["networks"]), "ensemble": params["head"]}

  def predict(state: State, images: jax.Array) -> dict[str, jax.Array]:
    outputs, _ = run_peers(
      networks,
      state["params"]["networks"],
      state["batch_stats"]["networks"],
      [images],
      train=False,
    )
    teachers, _ = run_peers(
      networks,
      state["mean_teacher"],
      state["batch_stats"]["mean_teacher"],
      [images],
      train=False,
    )
    return {
      "ensemble": ensemble_logits(state["params"], outputs),
      **{name: teachers[name].logits for name in names},
      **{f"peer_{i}": outputs[n].logits for i, n in enumerate(names)},
    }

  def students(state: State) -> dict[str, Student]:
    return students_of_peers(
      networks, state["mean_teacher"], state["batch_stats"]["mean_teacher"]
    )

  return Method(init, train_step, predict, students, views)


def mean_decay(step: jax.Array, largest: float) -> jax.Array:
  """What part of a running mean is kept: the plain mean's, then `largest`."""
  return jnp.minimum(1 - 1 / (step + 1), largest).astype(jnp.float32)


def ramp_up_as_coded(epoch: jax.Array, length: float) -> jax.Array:
  """The ramp of the public PCL code, which divides the epoch by 1.

  `losses.ramp_up` divides it by the length, as was meant. Here the weight is 1
  in epoch 1, next to nothing from epoch 2 to `length`, and 1 again after it.

  Args:
    epoch: counted from 0.
    length: in epochs.
  """
  weight = jnp.exp(-5.0 * jnp.square(1.0 - epoch))
  return jnp.where(epoch <= length, weight, 1.0).astype(jnp.float32)


def _pooled(outputs: Sequence[Outputs]) -> jax.Array:
  """The means of the last maps of all networks: [N, sum of channels]."""
  pool = layers.GlobalAveragePool()
  return jnp.concatenate([pool(one.features[-1]) for one in outputs], -1)
