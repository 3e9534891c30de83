"""Online ensemble distillation into compressed students (EKD).

Walawalkar, Shen and Savvides, "Online Ensemble Model Compression using
Knowledge Distillation", ECCV 2020. One stem feeds S branches of decreasing
width. Every member learns from the labels and from the mean of all members'
logits; the thinner ones also regress the full network's block outputs through
1x1 adapters. Members are plain dict entries of different shapes, so the graph
is built by a Python loop over them.
"""

from collections.abc import Sequence
from typing import Any, Literal

import jax
import optax

from ekd_jax import losses
from ekd_jax.compression import Member
from ekd_jax.methods import update
from ekd_jax.methods.interface import Method, State, Student
from ekd_jax.models import Network, Outputs
from ekd_jax.models.layers import Adapter, Maps, arrays_of
from ekd_jax.models.network import Family, apply_network, init_network


def ekd(
  family: Family,
  members: Sequence[Member],
  optimizer: optax.GradientTransformation,
  *,
  temperature: float = 2.0,
  label_weight: float = 0.7,
  feature_weight: float = 0.15,
  distill_weight: float = 0.15,
  base_gradients: Literal["all", "first"] = "all",
  accumulate: int = 1,
) -> Method:
  """The EKD method for one family of networks.

  The state holds {"params": {"stem", "branches": {member}, "adapters":
  {member: {"block_b"}}}, "batch_stats": {"stem", "branches"}, "opt_state"}.

  Args:
    family: the network, at any width.
    members: who is trained, the full network first.
    optimizer: for all parameters; those of adapters are under "adapters".
    temperature: of the distillation term, > 0.
    label_weight: weight of the cross-entropy terms.
    feature_weight: weight of the feature terms.
    distill_weight: weight of the terms towards the ensemble.
    base_gradients: whether "all" members train the stem or only the "first".
    accumulate: micro-batches of a step; see `update.gradient_step`.

  Returns:
    The `Method`.
  """
  names = [member.name for member in members]
  stem = family.stem()
  branches = {m.name: family.branch(m.width) for m in members}
  adapters = [Adapter(channels) for channels in family.feature_channels]

  def init(rng: jax.Array, batch: dict[str, jax.Array]) -> State:
    stem_rng, *branch_rngs = jax.random.split(rng, 1 + len(names))
    images = update.shape_of(batch["image"])
    stem_variables, hidden = init_network(stem, stem_rng, images)
    params = {"stem": stem_variables["params"], "branches": {}, "adapters": {}}
    batch_stats = {"stem": stem_variables["batch_stats"], "branches": {}}
    for name, branch_rng in zip(names, branch_rngs, strict=True):
      variables, outputs = init_network(branches[name], branch_rng, hidden)
      params["branches"][name] = variables["params"]
      batch_stats["branches"][name] = variables["batch_stats"]
      if name == names[0]:
        continue
      params["adapters"][name] = {
        f"block_{block}": adapter.lazy_init(
          jax.random.fold_in(branch_rng, block), feature
        )["params"]
        for block, (adapter, feature) in enumerate(
          zip(adapters, outputs.features, strict=True)
        )
      }
    return update.init_state(params, batch_stats, optimizer)

  def forward(
    params: Any,
    batch_stats: Any,
    images: jax.Array,
    *,
    train: bool,
    rng: jax.Array | None = None,
  ) -> tuple[dict[str, Outputs], Any]:
    """All members' outputs and the statistics after them."""
    stem_rng, *rngs = update.keys_of_networks(rng, 1 + len(names))
    new_stats = {"stem": batch_stats["stem"], "branches": {}}
    hidden, new_stats["stem"] = apply_network(
      stem,
      params["stem"],
      batch_stats["stem"],
      images,
      train=train,
      rng=stem_rng,
    )
    outputs = {}
    for name, branch_rng in zip(names, rngs, strict=True):
      detached = base_gradients == "first" and name != names[0]
      outputs[name], new_stats["branches"][name] = apply_network(
        branches[name],
        params["branches"][name],
        batch_stats["branches"][name],
        jax.lax.stop_gradient(hidden) if detached else hidden,
        train=train,
        rng=branch_rng,
      )
    return outputs, new_stats

  def adapt(params: Any, name: str, outputs: Outputs) -> list[Maps]:
    return [
      adapter.apply({"params": params["adapters"][name][f"block_{b}"]}, feature)
      for b, (adapter, feature) in enumerate(
        zip(adapters, outputs.features, strict=True)
      )
    ]

  def train_step(
    state: State, batch: dict[str, jax.Array], rng: jax.Array
  ) -> tuple[State, dict[str, jax.Array]]:
    def loss_function(
      params: Any,
      batch_stats: Any,
      batch: dict[str, jax.Array],
      rng: jax.Array,
    ) -> tuple[jax.Array, tuple[Any, dict[str, jax.Array]]]:
      outputs, new_stats = forward(
        params, batch_stats, batch["image"], train=True, rng=rng
      )
      logits = {name: outputs[name].logits for name in names}
      targets, batch_axis = arrays_of(outputs[names[0]].features)
      adapted = [
        arrays_of(adapt(params, name, outputs[name]))[0] for name in names[1:]
      ]
      loss, terms = losses.ekd_loss(
        list(logits.values()),
        batch["label"],
        adapted,
        targets,
        temperature=temperature,
        label_weight=label_weight,
        feature_weight=feature_weight,
        distill_weight=distill_weight,
        feature_batch_axis=batch_axis,
      )
      metrics = {
        "loss": loss,
        **update.named("label", names, terms["label"]),
        **update.named("distill", names, terms["distill"]),
        **update.classification_metrics(logits, batch["label"]),
      }
      for name, blocks in zip(names[1:], terms["feature"], strict=True):
        block_names = [f"block_{b}" for b in range(len(adapters))]
        metrics |= update.named(f"feature/{name}", block_names, blocks)
      return loss, (new_stats, metrics)

    return update.gradient_step(
      state,
      batch,
      rng,
      loss_function,
      optimizer,
      parts,
      accumulate=accumulate,
    )

  def parts(params: Any) -> dict[str, Any]:
    """The stem, and each member's branch with its adapters."""
    own = {n: [params["branches"][n], params["adapters"].get(n)] for n in names}
    return {"stem": params["stem"], **own}

  def predict(state: State, images: jax.Array) -> dict[str, jax.Array]:
    outputs, _ = forward(
      state["params"], state["batch_stats"], images, train=False
    )
    return update.with_ensemble({n: outputs[n].logits for n in names})

  def students(state: State) -> dict[str, Student]:
    def of(name: str, collection: Any) -> dict[str, Any]:
      return {
        "stem": collection["stem"],
        "branch": collection["branches"][name],
      }

    alone = family.alone()
    return {
      member.name: Student(
        Network(alone.stem(), alone.branch(member.width)),
        {
          "params": of(member.name, state["params"]),
          "batch_stats": of(member.name, state["batch_stats"]),
        },
      )
      for member in members
    }

  return Method(init, train_step, predict, students)
