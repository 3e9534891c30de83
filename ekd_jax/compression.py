"""From "remove 97 % of the parameters" to a width, and what that costs.

A *ratio* is the fraction of the full network's parameters that is removed; a
*width* multiplies the channels of every stage. Channels are whole numbers, so
only some ratios can be reached: `solve_widths` picks the nearest one and
refuses when it is not near enough.
"""

import bisect
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

from ekd_jax.errors import UserError

# A family whose members miss their ratios by more is not what was asked for.
RATIO_TOLERANCE = 0.02


class Cost(NamedTuple):
  """What one network costs.

  Attributes:
    params: trainable parameters, batch norm's scale and bias included,
      running statistics and adapters not.
    macs: multiply-accumulates of convolutions and dense layers for one image.
  """

  params: int
  macs: int

  def __add__(self, other: "Cost") -> "Cost":
    return Cost(self.params + other.params, self.macs + other.macs)


class Member(NamedTuple):
  """One member of the family that a run trains.

  Attributes:
    name: "student_0" is the full network, the pseudo-teacher.
    ratio_asked: fraction of parameters to remove, None if a width was given.
    ratio: fraction of the full network's parameters that is removed.
    width: channel multiplier.
    params: see `Cost`.
    macs: see `Cost`.
  """

  name: str
  ratio_asked: float | None
  ratio: float
  width: float
  params: int
  macs: int


CostOfWidth = Callable[[float], Cost]


def solve_widths(
  ratios: Sequence[float],
  cost: CostOfWidth,
  candidates: Sequence[float],
  *,
  tolerance: float = RATIO_TOLERANCE,
) -> tuple[Member, ...]:
  """Finds the members whose removed fractions are nearest to those asked.

  Args:
    ratios: fractions of parameters to remove, each in (0, 1).
    cost: cost of the network at a width.
    candidates: the widths to choose from, thinnest first, none with fewer
      parameters than the one before; the last, 1.0, is the full network. The
      cost of a few of them is asked for only.
    tolerance: largest accepted |ratio - ratio asked|.

  Returns:
    The full network, then one member per ratio in the order given.

  Raises:
    UserError: a ratio that no candidate reaches within `tolerance`, or two
      ratios that end in the same network.
  """
  cost = functools.cache(cost)
  full = cost(1.0).params

  def params(width: float) -> int:
    return cost(width).params

  def thinnest(size: float) -> int:
    """Place of the first candidate of at least this many parameters."""
    return bisect.bisect_left(candidates, size, key=params)

  def nearest(asked: float) -> tuple[float, float]:
    place = min(thinnest((1 - asked) * full), len(candidates) - 1)
    # The one below, which may be as large as others before it.
    below = thinnest(params(candidates[max(place - 1, 0)]))
    near = [candidates[below], candidates[place]]
    ratios = [1 - params(width) / full for width in near]
    return min(
      zip(ratios, near, strict=True), key=lambda pair: abs(pair[0] - asked)
    )

  members = [_member(0, 0.0, 1.0, cost)]
  for index, asked in enumerate(ratios, start=1):
    ratio, width = nearest(asked)
    if abs(ratio - asked) > tolerance:
      raise UserError(
        f"ratio {asked:g} cannot be reached: the nearest network removes "
        f"{ratio:.4f} of the parameters (width {width:g}), further off than "
        f"{tolerance:g}; ask for a ratio near {ratio:.2f} instead"
      )
    if params(width) == full:
      # Of the next smaller network.
      place = thinnest(full) - 1
      smallest = 1 - params(candidates[max(place, 0)]) / full
      raise UserError(
        f"ratio {asked:g} cannot be reached: the nearest network is the full "
        f"one; the smallest ratio that removes anything is {smallest:.4f}"
      )
    twin = next((m for m in members if m.width == width), None)
    if twin is not None:
      raise UserError(
        f"ratio {asked:g} gives the same network as {twin.name} (width "
        f"{width:g}, removes {ratio:.4f}); leave one of the two out"
      )
    members.append(_member(index, asked, width, cost))
  return tuple(members)


def members_of_widths(
  widths: Sequence[float], cost: CostOfWidth
) -> tuple[Member, ...]:
  """The members with the given widths, the full network (1.0) first."""
  return tuple(
    _member(index, None, width, cost) for index, width in enumerate(widths)
  )


def members_of_costs(costs: Sequence[Cost]) -> tuple[Member, ...]:
  """Members that are networks of different kinds, each at full width.

  Their ratios are to the first, and below 0 for what is larger.
  """
  return tuple(
    Member(f"student_{i}", None, 1 - own.params / costs[0].params, 1.0, *own)
    for i, own in enumerate(costs)
  )


def _member(
  index: int, asked: float | None, width: float, cost: CostOfWidth
) -> Member:
  own = cost(width)
  ratio = 1 - own.params / cost(1.0).params
  return Member(f"student_{index}", asked, ratio, width, own.params, own.macs)
