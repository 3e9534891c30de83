"""Networks side by side of which equal ones share their low layers.

FFL and PCL train several networks at once. Where all of them are the same
network they have everything but the last stage in common (of EfficientNets and
networks of users the stem only); where they differ, in width or in kind, they
have nothing in common.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax

from ekd_jax.compression import Member
from ekd_jax.methods import update
from ekd_jax.methods.interface import Student
from ekd_jax.models import Network, Outputs
from ekd_jax.models.network import Family, apply_network, init_network

_LOWER, _UPPER = "lower", "upper"


class Peers(NamedTuple):
  """The networks of a method.

  Attributes:
    names: of the members.
    lower: what they share: images -> hidden maps; None if nothing is.
    upper: {member: the rest of it, or all}.
    alone: {member: the whole of it as an ordinary module}.
  """

  names: tuple[str, ...]
  lower: Any
  upper: Mapping[str, Any]
  alone: Mapping[str, Network]


def peers(families: Sequence[Family], members: Sequence[Member]) -> Peers:
  """The networks of these members.

  Args:
    families: of each member.
    members: who is trained.
  """
  names = tuple(member.name for member in members)
  pairs = list(zip(families, members, strict=True))
  width = members[0].width
  if all(f == families[0] and m.width == width for f, m in pairs):
    plain = families[0].alone()
    return Peers(
      names,
      families[0].lower(width),
      {name: families[0].upper(width) for name in names},
      {name: Network(plain.lower(width), plain.upper(width)) for name in names},
    )
  return Peers(
    names,
    None,
    {m.name: Network(f.stem(), f.branch(m.width)) for f, m in pairs},
    {
      m.name: Network(f.alone().stem(), f.alone().branch(m.width))
      for f, m in pairs
    },
  )


def init_peers(
  networks: Peers, rng: jax.Array, images: jax.ShapeDtypeStruct
) -> tuple[Any, Any, dict[str, Outputs]]:
  """Draws their variables.

  Args:
    networks: of which every member starts with numbers of its own.
    rng: a key.
    images: [N, H, W, C], as a shape.

  Returns:
    Parameters and running statistics, each {"lower" (if shared), "upper":
    {member}}, and what the members compute, as shapes.
  """
  lower_rng, *upper_rngs = jax.random.split(rng, 1 + len(networks.names))
  params: dict[str, Any] = {_UPPER: {}}
  batch_stats: dict[str, Any] = {_UPPER: {}}
  hidden, outputs = images, {}
  if networks.lower is not None:
    variables, hidden = init_network(networks.lower, lower_rng, images)
    params[_LOWER] = variables["params"]
    batch_stats[_LOWER] = variables["batch_stats"]
  for name, upper_rng in zip(networks.names, upper_rngs, strict=True):
    variables, outputs[name] = init_network(
      networks.upper[name], upper_rng, hidden
    )
    params[_UPPER][name] = variables["params"]
    batch_stats[_UPPER][name] = variables["batch_stats"]
  return params, batch_stats, outputs


def run_peers(
  networks: Peers,
  params: Any,
  batch_stats: Any,
  views: Sequence[jax.Array],
  *,
  train: bool,
  rng: jax.Array | None = None,
) -> tuple[dict[str, Outputs], Any]:
  """All members' outputs, and the running statistics after them.

  Args:
    networks: see `peers`.
    params: as `init_peers` made them.
    batch_stats: likewise.
    views: of the same images [N, H, W, C]; the members are given one each, in
      turn. Each view goes through the shared layers by itself, so that these
      normalise it with its own statistics.
    train: whether batch norm uses (and updates) batch statistics.
    rng: key of what is random in training.
  """
  lower_rng, *upper_rngs = update.keys_of_networks(rng, 1 + len(networks.names))
  new_stats = {**batch_stats, _UPPER: {}}
  hidden = list(views)
  if networks.lower is not None:
    lower_rngs = update.keys_of_networks(lower_rng, len(views))
    for index, (images, view_rng) in enumerate(
      zip(views, lower_rngs, strict=True)
    ):
      hidden[index], new_stats[_LOWER] = apply_network(
        networks.lower,
        params[_LOWER],
        new_stats[_LOWER],
        images,
        train=train,
        rng=view_rng,
      )
  outputs = {}
  for index, (name, upper_rng) in enumerate(
    zip(networks.names, upper_rngs, strict=True)
  ):
    outputs[name], new_stats[_UPPER][name] = apply_network(
      networks.upper[name],
      params[_UPPER][name],
      batch_stats[_UPPER][name],
      hidden[index % len(hidden)],
      train=train,
      rng=upper_rng,
    )
  return outputs, new_stats


def parts_of_peers(params: Any) -> dict[str, Any]:
  """What is each member's, and all members', of a pytree like the params."""
  shared = {_LOWER: params[_LOWER]} if _LOWER in params else {}
  return {**shared, **params[_UPPER]}


def students_of_peers(
  networks: Peers, params: Any, batch_stats: Any
) -> dict[str, Student]:
  """Each member as a network of its own."""

  def of(name: str, collection: Any) -> Any:
    if networks.lower is None:
      return collection[_UPPER][name]
    return {"stem": collection[_LOWER], "branch": collection[_UPPER][name]}

  return {
    name: Student(
      networks.alone[name],
      {"params": of(name, params), "batch_stats": of(name, batch_stats)},
    )
    for name in networks.names
  }
