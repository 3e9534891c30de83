"""Lines of metrics.jsonl turned into curves over epochs.

A curve is a dict from epoch to value, in the order of epochs. A resumed run
may have logged an epoch twice: the later line counts. What is not a finite
number is NaN, so that a plot shows a gap where training went wrong.

Loss terms are found, not known: the key "feature/student_1/block_0" is part
"block_0" of the term "feature" of the member "student_1".
"""

import math
from collections.abc import Iterable

from ekd_jax.report import formatting

Curve = dict[int, float]

# More points than this are less than two pixels apart in any figure.
_POINTS = 450
_NOT_TERMS = {"kind", "epoch", "step"}


def curve(records: Iterable[dict], kind: str, key: str) -> Curve:
  """One key of the lines of one kind, by epoch."""
  found = {
    record["epoch"]: _or_nan(record[key])
    for record in records
    if record["kind"] == kind and key in record
  }
  return dict(sorted(found.items()))


def members(records: list[dict], kind: str, metric: str) -> dict[str, Curve]:
  """A metric of every member that has it: {"student_0": curve, ...}."""
  keys = [key for key in _keys(records, kind) if key.startswith(f"{metric}/")]
  return {key.split("/")[1]: curve(records, kind, key) for key in keys}


def terms(records: list[dict]) -> dict[str, dict[str, Curve]]:
  """Loss terms by name, then member: the mean over the parts of each."""
  parts: dict[str, dict[str, list[Curve]]] = {}
  for key in _keys(records, "epoch"):
    if "/" in key:
      term, member = key.split("/")[:2]
      found = parts.setdefault(term, {}).setdefault(member, [])
      found.append(curve(records, "epoch", key))
  return {
    term: {member: _mean(found) for member, found in by_member.items()}
    for term, by_member in parts.items()
  }


def scalars(records: list[dict]) -> dict[str, Curve]:
  """What an epoch logs once, not per member: loss, learning rate, ..."""
  return {
    key: curve(records, "epoch", key)
    for key in _keys(records, "epoch")
    if "/" not in key
  }


def thin(points: Curve) -> Curve:
  """Every n-th point and the last one, so that a page stays small."""
  stride = math.ceil(len(points) / _POINTS)
  last = len(points) - 1
  return {
    epoch: value
    for index, (epoch, value) in enumerate(points.items())
    if index % stride == 0 or index == last
  }


def drawable(points: Curve) -> bool:
  """Whether a curve has any point that can be drawn."""
  return any(math.isfinite(value) for value in points.values())


def not_finite(records: Iterable[dict]) -> list[tuple[str, int]]:
  """Key and epoch of every logged figure that is infinite or no number."""
  return [
    (key, record["epoch"])
    for record in records
    for key, value in record.items()
    if isinstance(value, float) and not math.isfinite(value)
  ]


def _keys(records: Iterable[dict], kind: str) -> list[str]:
  """Keys of numbers in lines of a kind, in the order they were logged."""
  keys = dict.fromkeys(
    key
    for record in records
    if record["kind"] == kind
    for key, value in record.items()
    if not isinstance(value, str | bool)
  )
  return [key for key in keys if key not in _NOT_TERMS]


def _mean(parts: list[Curve]) -> Curve:
  epochs = sorted(set().union(*parts))
  return {
    epoch: sum(part.get(epoch, math.nan) for part in parts) / len(parts)
    for epoch in epochs
  }


def _or_nan(value: object) -> float:
  return float(value) if formatting.is_number(value) else math.nan
