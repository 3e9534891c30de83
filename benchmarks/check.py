"""Are the two implementations the same step? A fast wrong step is no step.

Ours takes one step in float32; PyTorch takes the same one in float64, from
the same weights on the same batch, and every loss, every gradient, every
update and every running mean is compared. PyTorch takes it in float32 too: how
far that is from float64 says what rounding alone does to a network of this
depth. Weight decay is far larger here than in the recipe, so that leaving it
out of a parameter would show.
"""

import dataclasses
import math
import statistics
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table

import timing
import workload
from ekd_jax.config import Config

WEIGHT_DECAY = 0.05

# Float32 sums of a whole network's depth.
LOSS_TOLERANCE = 1e-4

# Relative to the tensor's largest element. An input of a ReLU that is within
# rounding of zero is on the other side of it in the other implementation, and
# its gradient is there in one and not in the other. On a small map that moves
# single tensors by a percent, and those of all layers before by less: for
# ResNet-20 x 5 over four seeds, the median tensor was moved by 2e-6 to 6e-4,
# and by 3e-6 to 4e-4 in PyTorch's own float32. A term that is wrong in less
# than half of the tensors shows in the worst only.
WORST_TOLERANCE = 2e-2
MEDIAN_TOLERANCE = 1e-3

# Running means are of the forward pass, where a flip changes next to nothing.
MEAN_MEDIAN_TOLERANCE = 1e-4

# Such flips multiply with depth: at 110 layers, the median gradient of any
# float32 is a percent away. So where PyTorch's own float32 is further from
# float64 than these tolerances, this multiple of its distance is allowed. Each
# is one draw, and the worst of a thousand thin tensors is no measure: PyTorch's
# was 0.13 on one processor and 0.36 on another. There the 99th percentile is.
ROUNDING_FACTOR = 4


class Spread(NamedTuple):
  """Relative differences over the tensors or terms of one kind."""

  worst: float
  percentile_99: float
  median: float


class Finding(NamedTuple):
  """The differences of one kind of quantity.

  Attributes:
    quantity: what was compared.
    where: the tensor or the term that differs most.
    ours: how far ours is from float64.
    rounding: how far PyTorch's own float32 is.
    count: how many tensors or terms there are.
    agrees: whether ours is within tolerance.
  """

  quantity: str
  where: str
  ours: Spread
  rounding: Spread
  count: int
  agrees: bool


def config(case: Config) -> Config:
  """The config that a case is checked with."""
  return dataclasses.replace(case, method="ekd", weight_decay=WEIGHT_DECAY)


def run(case: Config) -> list[Finding]:
  """Takes the step with both, each in a process of its own, and compares."""
  checked = config(case)
  ours = timing.in_worker(product, checked)
  channels = workload.stage_channels(checked)
  theirs, rounded = (
    timing.in_worker(pytorch, checked, channels, ours, dtype)
    for dtype in ("float64", "float32")
  )
  return compare(ours, theirs, rounded)


def product(config: Config) -> dict[str, Any]:
  """`product_step.one_step`, for a process that has not imported it."""
  workload.prepare_product(config)
  import product_step

  return product_step.one_step(config)


def pytorch(
  config: Config,
  channels: workload.StageChannels,
  ours: Mapping[str, Any],
  dtype: str,
) -> dict[str, Any]:
  """`pytorch_step.one_step`, likewise."""
  import pytorch_step

  return pytorch_step.one_step(config, channels, ours, dtype)


def compare(
  ours: Mapping[str, Any],
  theirs: Mapping[str, Any],
  rounded: Mapping[str, Any],
) -> list[Finding]:
  """Compares what `product_step` and `pytorch_step` made of one step.

  Running variances are left out: PyTorch divides them by the count less one.
  So are the accuracies: two logits that are equal but for rounding decide
  them.

  Args:
    ours: the step of ours.
    theirs: PyTorch's in float64.
    rounded: PyTorch's in float32.
  """
  found = []
  for kind in ("loss", "label", "feature", "distill"):
    terms = [n for n in ours["metrics"] if n.split("/")[0] == kind]
    if terms:
      own, rounding = (
        {n: _relative(side, theirs, "metrics", n) for n in terms}
        for side in (ours, rounded)
      )
      found.append(
        _finding(kind, own, rounding, LOSS_TOLERANCE, LOSS_TOLERANCE)
      )
  paths = list(ours["params"])
  means = [p for p in ours["batch_stats"] if p.endswith("/mean")]
  sides = [side | _updates(side, ours) for side in (ours, rounded, theirs)]
  for kind, key, names, median_tolerance in (
    ("gradient", "gradients", paths, MEDIAN_TOLERANCE),
    ("update", "updates", paths, MEDIAN_TOLERANCE),
    ("running mean", "new_batch_stats", means, MEAN_MEDIAN_TOLERANCE),
  ):
    own, rounding = (
      {name: _relative(side, sides[-1], key, name) for name in names}
      for side in sides[:-1]
    )
    found.append(
      _finding(kind, own, rounding, WORST_TOLERANCE, median_tolerance)
    )
  return found


def table(case: str, findings: list[Finding]) -> Table:
  """The findings, one row for each kind."""
  shown = timing.table(
    f"{case}: one float32 step, relative differences from PyTorch's float64",
    [
      *("quantity", "where largest", "agrees"),
      *("ours: largest", "99 %", "median"),
      *("PyTorch: largest", "99 %", "median", "tensors"),
    ],
  )
  for f in findings:
    shown.add_row(
      f.quantity,
      f.where,
      "yes" if f.agrees else "NO",
      *(f"{value:.1e}" for value in (*f.ours, *f.rounding)),
      str(f.count),
    )
  return shown


def _finding(
  quantity: str,
  own: Mapping[str, float],
  rounding: Mapping[str, float],
  worst_tolerance: float,
  median_tolerance: float,
) -> Finding:
  ours, theirs = _spread(own), _spread(rounding)

  def within(value: float, tolerance: float, rounded: float) -> bool:
    return value <= max(tolerance, ROUNDING_FACTOR * rounded)

  tail_is_near = within(ours.worst, worst_tolerance, theirs.worst)
  if theirs.worst > worst_tolerance:
    tail_is_near |= within(ours.percentile_99, 0, theirs.percentile_99)
  agrees = (
    math.isfinite(ours.worst)
    and tail_is_near
    and within(ours.median, median_tolerance, theirs.median)
  )
  where = max(own, key=own.get)
  return Finding(quantity, where, ours, theirs, len(own), agrees)


def _spread(differences: Mapping[str, float]) -> Spread:
  values = sorted(differences.values())
  # The smallest value that 99 % of them do not exceed.
  tail = values[math.ceil(0.99 * len(values)) - 1]
  return Spread(values[-1], tail, statistics.median(values))


def _relative(
  ours: Mapping[str, Any], theirs: Mapping[str, Any], key: str, name: str
) -> float:
  """max |ours - theirs| / max |theirs|; infinite where either is not finite."""
  a = np.asarray(ours[key][name], np.float64)
  b = np.asarray(theirs[key][name], np.float64)
  difference = np.abs(a - b).max() / max(np.abs(b).max(), 1e-30)
  return float(difference) if np.isfinite(difference) else np.inf


def _updates(
  side: Mapping[str, Any], start: Mapping[str, Any]
) -> dict[str, Any]:
  """What the step added to the parameters."""
  return {
    "updates": {
      path: np.asarray(value, np.float64) - start["params"][path]
      for path, value in side["new_params"].items()
    }
  }
