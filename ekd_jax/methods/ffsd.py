"""Feature fusion and self-distillation (FFSD).

Li et al., "Distilling a Powerful Student Model via Online Knowledge
Distillation", 2021. Common students teach each other; a fusion module makes a
classifier of their last maps, and that teaches a leader, by its logits and by
where its maps are active. Each common student but the first is also pushed
away from the one before it, and decoders, trained to go from a network's last
maps back to its shallower ones, show the shallow stages what deeper maps would
ask of them. Nothing is shared and the leader alone is shipped.

Every term trains one part and takes the others as constants. So one gradient
of the sum of all terms is each part's own, and all parts step at once on the
same forward pass, as in the original, whose losses are all computed before
any update.
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
from ekd_jax.models import Network, Outputs, layers
from ekd_jax.models.computation import Computation
from ekd_jax.models.fusion import Decoder, Fusion, Spread
from ekd_jax.models.layers import Maps
from ekd_jax.models.network import Family, apply_network, init_network


def ffsd(
  family: Family,
  members: Sequence[Member],
  optimizer: optax.GradientTransformation,
  *,
  compute: Computation,
  num_classes: int,
  common_students: int = 2,
  temperature: float = 2.0,
  diversity_weight: float = 1e-5,
  fusion_weight: float = 10.0,
  decoder_weight: float = 1000.0,
  normalized_diversity: bool = False,
  ramp: Callable[[jax.Array], jax.Array] = lambda step: jnp.float32(1),
  accumulate: int = 1,
) -> Method:
  """The FFSD method for one family of networks.

  The members are leaders, each with a fusion module of its own: the published
  method has one, at full width. The common students, "common_0" and so on, are
  at full width. The state holds {"params": {"networks": {member or common
  student}, "spread": {member}, "fusion": {member}, "decoders": {member or
  common student}}, "batch_stats" likewise, "opt_state", "step"}. "ensemble" is
  the classifier that teaches the first member.

  Args:
    family: the network, at any width; the sides of its compared maps halve
      from one to the next.
    members: the leaders.
    optimizer: for all parameters.
    compute: how the modules besides the networks are computed.
    num_classes: K.
    common_students: how many, >= 2.
    temperature: of all distillation terms, > 0.
    diversity_weight: of the terms that only common students have.
    fusion_weight: of the leaders' terms on maps.
    decoder_weight: of the decoders' terms.
    normalized_diversity: see `losses.diversity_loss`.
    ramp: step -> factor of these three weights.
    accumulate: micro-batches of a step; see `update.gradient_step`.

  Returns:
    The `Method`.
  """
  leaders = [member.name for member in members]
  common = [f"common_{index}" for index in range(common_students)]
  widths = {m.name: m.width for m in members} | dict.fromkeys(common, 1.0)
  networks = {
    name: Network(family.stem(), family.branch(width))
    for name, width in widths.items()
  }

  def modules(outputs: Mapping[str, Outputs]) -> dict[str, dict[str, Any]]:
    """What there is besides the networks, by their maps' channels."""
    channels = {
      name: tuple(map(layers.channels, outputs[name].features))
      for name in networks
    }
    together = sum(channels[name][-1] for name in common)
    return {
      "spread": {name: Spread(compute, together) for name in leaders},
      "fusion": {
        name: Fusion(compute, channels[name][-1], num_classes)
        for name in leaders
      },
      "decoders": {
        name: Decoder(compute, channels[name][:-1])
        for name in [*common[1:], *leaders]
      },
    }

  def init(rng: jax.Array, batch: Mapping[str, jax.Array]) -> State:
    images = update.shape_of(batch["image"])
    variables: dict[str, dict[str, Any]] = {"networks": {}}
    outputs = {}
    keys = iter(jax.random.split(rng, 4 * len(networks)))
    for name, network in networks.items():
      variables["networks"][name], outputs[name] = init_network(
        network, next(keys), images
      )
    inputs = {
      "spread": lambda name: outputs[name].features[-1],
      "fusion": lambda name: [outputs[n].features[-1] for n in common],
      "decoders": lambda name: outputs[name].features[-1],
    }
    for kind, by_name in modules(outputs).items():
      variables[kind] = {
        name: init_network(module, next(keys), inputs[kind](name))[0]
        for name, module in by_name.items()
      }
    return update.init_state(
      _collection("params", variables),
      _collection("batch_stats", variables),
      optimizer,
    ) | {"step": jnp.zeros((), jnp.int32)}

  def run_networks(
    params: Any,
    batch_stats: Any,
    images: jax.Array,
    *,
    train: bool,
    rng: jax.Array | None = None,
  ) -> tuple[dict[str, Outputs], dict[str, Any]]:
    outputs, new_stats = {}, {}
    rngs = update.keys_of_networks(rng, len(networks))
    for (name, network), own_rng in zip(networks.items(), rngs, strict=True):
      outputs[name], new_stats[name] = apply_network(
        network,
        params["networks"][name],
        batch_stats["networks"][name],
        images,
        train=train,
        rng=own_rng,
      )
    return outputs, new_stats

  def train_step(
    state: State, batch: Mapping[str, jax.Array], rng: jax.Array
  ) -> tuple[State, dict[str, jax.Array]]:
    weight = ramp(state["step"])

    def loss_function(
      params: Any,
      batch_stats: Any,
      batch: Mapping[str, jax.Array],
      rng: jax.Array,
    ) -> tuple[jax.Array, tuple[Any, dict[str, jax.Array]]]:
      outputs, network_stats = run_networks(
        params, batch_stats, batch["image"], train=True, rng=rng
      )
      new_stats = {kind: dict(stats) for kind, stats in batch_stats.items()}
      new_stats["networks"] = network_stats
      own = modules(outputs)
      labels = batch["label"]
      logits = {name: outputs[name].logits for name in networks}
      last = {name: outputs[name].features[-1] for name in networks}
      together = layers.stop_gradient([last[name] for name in common])

      def run(kind: str, name: str, inputs: Any, *, train: bool = True) -> Any:
        result, stats = apply_network(
          own[kind][name],
          params[kind][name],
          batch_stats[kind][name],
          inputs,
          train=train,
        )
        if train:
          new_stats[kind][name] = stats
        return result

      def decoded(name: str, maps: Maps) -> Any:
        """As its decoder, trained on the network's own maps, sees others."""
        return run("decoders", name, layers.stop_gradient(maps), train=False)

      terms = {}
      common_logits = [logits[name] for name in common]
      mutual = losses.mutual_learning_loss(
        common_logits, temperature=temperature
      )
      for name, divergence in zip(common, mutual, strict=True):
        terms[f"label/{name}"] = 1.0, _label_loss(logits[name], labels)
        terms[f"mutual/{name}"] = 1.0, divergence.mean()
      for before, name in zip(common, common[1:], strict=False):
        axes = layers.axes_of(last[name])
        maps, peer = layers.arrays_of([last[name], last[before]])[0]
        terms[f"diversity/{name}"] = (
          diversity_weight * weight,
          losses.diversity_loss(
            maps, peer, normalized=normalized_diversity, **axes
          ).mean(),
        )
        shifted = losses.shifted_features(
          peer, normalized=normalized_diversity, **axes
        )
        terms[f"self_distill/{name}"] = (
          diversity_weight * weight,
          _attention(
            outputs[name].features[:-1],
            decoded(name, layers.like(last[name], shifted)),
          ),
        )
      teacher = losses.ensemble_logits(common_logits)
      fused = {}
      for name in leaders:
        fused[name], (maps,) = run("fusion", name, together)
        terms[f"fused_label/{name}"] = 1.0, _label_loss(fused[name], labels)
        terms[f"fused_distill/{name}"] = (
          1.0,
          losses.distillation_loss(
            fused[name], teacher, temperature=temperature
          ).mean(),
        )
        terms[f"label/{name}"] = 1.0, _label_loss(logits[name], labels)
        terms[f"distill/{name}"] = (
          1.0,
          losses.distillation_loss(
            logits[name], fused[name], temperature=temperature
          ).mean(),
        )
        terms[f"fused_maps/{name}"] = (
          fusion_weight * weight,
          _attention([last[name]], [maps]),
        )
        terms[f"all_maps/{name}"] = (
          fusion_weight * weight,
          _attention(
            [run("spread", name, last[name])], [layers.concatenate(together)]
          ),
        )
        terms[f"self_distill/{name}"] = (
          fusion_weight * weight,
          _attention(outputs[name].features[:-1], decoded(name, maps)),
        )
      for name in own["decoders"]:
        back = run("decoders", name, layers.stop_gradient(last[name]))
        terms[f"decoder/{name}"] = (
          decoder_weight * weight,
          _both(back, outputs[name].features[:-1]),
        )
      loss = sum(factor * term for factor, term in terms.values())
      first = leaders[0]
      metrics = {
        "loss": loss,
        **{name: term for name, (_, term) in terms.items()},
        **update.classification_metrics(logits, labels, fused[first]),
      }
      return loss, (new_stats, metrics)

    next_state, metrics = update.gradient_step(
      state, batch, rng, loss_function, optimizer, parts, accumulate=accumulate
    )
    return next_state | {"step": state["step"] + 1}, metrics

  def parts(params: Any) -> dict[str, Any]:
    return {
      name: [params[kind].get(name) for kind in params] for name in networks
    }

  def predict(state: State, images: jax.Array) -> dict[str, jax.Array]:
    outputs, _ = run_networks(
      state["params"], state["batch_stats"], images, train=False
    )
    together = [outputs[name].features[-1] for name in common]
    fused = {}
    for name, module in modules(outputs)["fusion"].items():
      found, _ = apply_network(
        module,
        state["params"]["fusion"][name],
        state["batch_stats"]["fusion"][name],
        together,
        train=False,
      )
      fused[name] = found.logits
    first, *others = leaders
    return {
      "ensemble": fused[first],
      **{name: outputs[name].logits for name in [*leaders, *common]},
      **{f"ensemble_of_{name}": fused[name] for name in others},
    }

  def students(state: State) -> dict[str, Student]:
    plain = family.alone()
    return {
      member.name: Student(
        Network(plain.stem(), plain.branch(member.width)),
        {
          "params": state["params"]["networks"][member.name],
          "batch_stats": state["batch_stats"]["networks"][member.name],
        },
      )
      for member in members
    }

  return Method(init, train_step, predict, students)


def _collection(kind: str, variables: Any) -> dict[str, dict[str, Any]]:
  return {
    group: {name: one[kind] for name, one in by_name.items()}
    for group, by_name in variables.items()
  }


def _label_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
  return optax.losses.softmax_cross_entropy_with_integer_labels(
    logits, labels
  ).mean()


def _attention(student: Sequence[Maps], teacher: Sequence[Maps]) -> jax.Array:
  """Sum over pairs of maps: how unlike the places are where they are active."""
  return sum(
    losses.attention_loss(
      *layers.arrays_of([mine, target])[0], **layers.axes_of(mine)
    ).mean()
    for mine, target in zip(student, teacher, strict=True)
  )


def _both(student: Sequence[Maps], teacher: Sequence[Maps]) -> jax.Array:
  """As `_attention`, and the maps themselves, normalised, as well."""
  maps = sum(
    losses.normalized_feature_loss(
      *layers.arrays_of([mine, target])[0],
      batch_axis=layers.axes_of(mine)["batch_axis"],
    ).mean()
    for mine, target in zip(student, teacher, strict=True)
  )
  return maps + _attention(student, teacher)
