"""What came out of a run, in sentences that stay true.

A report that only fits a good result is worse than none: here the smallest
network may be the best one, training together may have cost accuracy, the
run may be unfinished and any figure may be missing. Every sentence is built
from the figures it states and left out where they were not measured.
"""

from ekd_jax import run_directory
from ekd_jax.report import curves, formatting
from ekd_jax.report.runs import Run


def subject(summary: dict) -> str:
  """What was run: "ekd, resnet110 on cifar100, 450 epochs, seed 0"."""
  method, network, dataset, epochs, seed = (
    summary.get(key)
    for key in ("method", "network", "dataset", "epochs", "seed")
  )
  parts = [
    method,
    " on ".join(str(x) for x in (network, dataset) if x is not None) or None,
    None if epochs is None else f"{few(epochs, 'epoch')}",
    None if seed is None else _seed(seed),
  ]
  return ", ".join(str(part) for part in parts if part is not None)


def headline(run: Run) -> str:
  """The run in one sentence."""
  members = run.summary["members"]
  start = few(len(members), "network")
  if run.seeds:
    start = f"{few(len(run.seeds), 'run')} of {start}"
  else:
    start = f"One run, {start}"
  sizes = [member.get("params") for member in members]
  sized = all(map(formatting.is_number, sizes)) and bool(sizes)
  if sized and min(sizes) < max(sizes):
    largest, smallest = map(formatting.count, (max(sizes), min(sizes)))
    start += f" from {largest} to {smallest} parameters"
  elif sized:
    each = "" if len(members) == 1 else " each"
    start += f" of {formatting.count(sizes[0])} parameters{each}"
  return f"{start}: {_accuracies(run, sized)}."


def _accuracies(run: Run, sized: bool) -> str:
  measured = _measured(run.summary, "top1")
  when = "so far " if run.unfinished else "on average " if run.seeds else ""
  if not measured:
    return "no test accuracy " + ("yet" if run.unfinished else "was measured")
  if len(measured) == 1:
    return f"{when}{measured[0]['name']} reaches {_top1(measured[0])} top-1"
  large = max(measured, key=lambda member: member.get("params") or 0)
  small = min(measured, key=lambda member: member.get("params") or 0)
  if sized and small["params"] < large["params"]:
    return (
      f"{when}the smallest reaches {_top1(small)} top-1, "
      f"the largest {_top1(large)}"
    )
  best = max(measured, key=lambda member: member["top1"])
  worst = min(measured, key=lambda member: member["top1"])
  return f"{when}they reach {_top1(worst)} to {_top1(best)} top-1"


def against_solo(run: Run) -> str:
  """How the members compare with the same networks trained alone."""
  pairs = {
    member["name"]: member["top1"] - member["solo_top1"]
    for member in _measured(run.summary, "top1", "solo_top1")
  }
  if not pairs and run.config.get("method") == run_directory.SOLO:
    return "Each member was trained alone: a baseline for other runs."
  if not pairs and run.config.get("with_solo"):
    return "The same networks have not been tested trained alone yet."
  if not pairs:
    return (
      "No member has been trained alone beside this run (--with-solo), so "
      "what training together gained is not known."
    )
  better = {name: gain for name, gain in pairs.items() if gain > 0}
  rest = {name: gain for name, gain in pairs.items() if gain <= 0}
  alone = "the same network trained alone with the same budget"
  if run.seeds:
    alone += ", on average over seeds"
  stand = "stand so far" if _still_running(run) else "end"
  if len(pairs) == 1:
    (gain,) = pairs.values()
    where = "above" if gain > 0 else "below" if gain < 0 else "level with"
    points = f"{_points(abs(gain))} points " if gain else ""
    stand = "stands so far" if _still_running(run) else "ends"
    return f"{next(iter(pairs))} {stand} {points}{where} {alone}."
  if not rest:
    return (
      f"All {len(pairs)} {stand} above {alone}, by "
      f"{_points(min(better.values()))} to "
      f"{_points(max(better.values()))} points."
    )
  listed = ", ".join(f"{name} {gain:+.2f}" for name, gain in rest.items())
  if not better:
    return f"None of {len(pairs)} {stand} above {alone} (points: {listed})."
  return (
    f"{len(better)} of {len(pairs)} {stand} above {alone}, by up to "
    f"{_points(max(better.values()))} points; not so (points): {listed}."
  )


def ensemble_gain(summary: dict) -> tuple[float, dict] | None:
  """Ensemble minus best member, in points, and that member."""
  top1 = (summary.get("ensemble") or {}).get("top1")
  measured = _measured(summary, "top1")
  if not formatting.is_number(top1) or len(measured) < 2:
    return None
  best = max(measured, key=lambda member: member["top1"])
  return top1 - best["top1"], best


def ensemble(run: Run) -> str | None:
  """How the ensemble compares with its best member."""
  found = ensemble_gain(run.summary)
  if found is None:
    return None
  gain, best = found
  compared = (
    "level with"
    if gain == 0
    else f"{_points(abs(gain))} points {'above' if gain > 0 else 'below'}"
  )
  return (
    f"The ensemble reaches {_top1(run.summary['ensemble'])}, "
    f"{compared} its best member ({best['name']}, {_top1(best)})."
  )


def warnings(run: Run) -> list[str]:
  """What a reader has to know before trusting the figures; often nothing."""
  found = []
  if run.unfinished:
    found.append(
      f"This run is not finished: {run.progress}. Figures are those so far."
    )
  for solo in _unfinished_solos(run):
    found.append(
      f"Training alone is not finished ({solo.path.parent.name}/"
      f"{solo.path.name}: {solo.progress}). Compare with care."
    )
  gain = ensemble_gain(run.summary)
  # Early in training the ensemble is often the weaker one; only the end counts.
  if gain and gain[0] < 0 and not run.unfinished:
    found.append(
      f"The ensemble ends {_points(-gain[0])} points below its best member, "
      f"{gain[1]['name']}. Where the ensemble is the teacher, that member "
      "learned from a weaker one."
    )
  bad = [
    found for part in run.parts for found in curves.not_finite(part.records)
  ]
  if bad:
    key, epoch = bad[0]
    found.append(
      f"{few(len(bad), 'logged figure')} {'is' if len(bad) == 1 else 'are'} "
      f"not finite, the first {key} in epoch {epoch}. Curves have gaps there."
    )
  return found


def spreads(summary: dict) -> dict[str, dict]:
  """Standard deviations over seeds by member name, "ensemble" included."""
  std = summary.get("std") or {}
  named = [*std.get("members", []), *std.get("others", [])]
  found = {one["name"]: one for one in named}
  return {**found, "ensemble": std.get("ensemble") or {}}


def _seed(seed: int | list[int]) -> str:
  many = isinstance(seed, list) and len(seed) > 1
  return f"seed{'s' if many else ''} {formatting.plain(seed)}"


def _unfinished_solos(run: Run) -> list[Run]:
  solos = [part.solo for part in run.parts if part.solo]
  return [solo for solo in solos if solo.unfinished]


def _still_running(run: Run) -> bool:
  return run.unfinished or bool(_unfinished_solos(run))


def _measured(summary: dict, *fields: str) -> list[dict]:
  return [
    member
    for member in summary["members"]
    if all(formatting.is_number(member.get(field)) for field in fields)
  ]


def _top1(member: dict) -> str:
  return f"{member['top1']:.2f} %"


def _points(value: float) -> str:
  return f"{value:.2f}"


def few(number: float, noun: str) -> str:
  """A count and its noun, in the plural if need be."""
  return f"{number:g} {noun}" + ("" if number == 1 else "s")
