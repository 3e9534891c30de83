"""Methods side by side, from the runs of one comparison.

Networks of one size are one student: with three peers of equal size, a
method's student has the mean of their accuracies. What a method costs is given
as a multiple of what the same number of networks take that learn alone.
"""

import html
import os
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath
from rich.table import Table
from rich.text import Text

from ekd_jax import run_directory, storage
from ekd_jax.report import (
  curves,
  figures,
  findings,
  formatting,
  markup,
  runs,
  style,
  tables,
)

COMPARISON = "comparison.json"


class Score(NamedTuple):
  """An accuracy in percent, and its standard deviation over seeds, if any."""

  mean: float | None
  std: float | None


def summarize(
  folder: epath.Path, methods: Sequence[str], costs: Mapping[str, Any]
) -> dict[str, Any]:
  """The comparison so far, in the shape of comparison.json.

  {"dataset", "network", "epochs", "seeds", "methods": [{"method", "networks",
  "students": [{"params", "members", "top1", "std", "gain"}], "ensemble":
  {"top1", "std"}, "step_seconds", "step_ratio", "step_bytes"}]}. Accuracies
  are those of the last epoch on the test set, in percent; "gain" is in points
  over solo; what was not measured is None.

  Args:
    folder: holds a run directory for each method.
    methods: those that are compared.
    costs: {method: {"networks", "step_seconds", "step_ratio", "step_bytes"}}.
  """
  found = {
    method: runs.load(folder / method)
    for method in methods
    if any((folder / method).glob(f"seed_*/{run_directory.CONFIG}"))
  }
  students = {method: _students(run) for method, run in found.items()}
  alone = students.get("solo", {})
  rows = []
  for method, run in found.items():
    ensemble = _over_seeds(
      [one.summary["ensemble"].get("top1") for one in run.parts]
    )
    rows.append(
      {
        "method": method,
        "networks": costs[method]["networks"],
        "students": [
          {
            "params": params,
            "members": names,
            "top1": score.mean,
            "std": score.std,
            "gain": _gain(score, alone.get(params, (None, None))[1]),
          }
          for params, (names, score) in students[method].items()
        ],
        "ensemble": {"top1": ensemble.mean, "std": ensemble.std},
        "progress": run.progress if run.unfinished else None,
        **{
          name: costs[method][name]
          for name in ("step_seconds", "step_ratio", "step_bytes")
        },
      }
    )
  first = next(iter(found.values()))
  return {
    "dataset": first.summary["dataset"],
    "network": first.summary["network"],
    "epochs": first.summary["epochs"],
    "seeds": first.config["seeds"],
    "methods": rows,
  }


def write(
  folder: str | os.PathLike, methods: Sequence[str], costs: Mapping[str, Any]
) -> epath.Path:
  """Writes comparison.json and report.html, finished or not.

  Returns:
    The path of the page.

  Raises:
    StorageError: the directory cannot be written to.
  """
  folder = storage.path(folder)
  summary = summarize(folder, methods, costs)
  with storage.failures_told(folder):
    run_directory.write_json(folder / COMPARISON, summary)
    storage.write_atomically(folder / "report.html", page(folder, summary))
  return folder / "report.html"


def table(summary: Mapping[str, Any]) -> Table:
  """The table that is printed at the end."""
  headings, rows = _cells(summary)
  drawn = tables.new_table(_subject(summary), headings)
  for row in rows:
    drawn.add_row(*map(Text, row))
  return drawn


def page(folder: epath.Path, summary: Mapping[str, Any]) -> str:
  """The page as a string."""
  subject = _subject(summary)
  headings, rows = _cells(summary)
  methods = [row["method"] for row in summary["methods"]]
  colours = {name: style.series(i) for i, name in enumerate(methods)}
  head = "".join(f"<th>{html.escape(text)}</th>" for text in headings)
  marked = [
    "<tr>"
    + f"<td>{markup.swatch(colours[row[0]])}"
    + f'<a href="{row[0]}/report.html">{html.escape(row[0])}</a></td>'
    + "".join(f"<td>{html.escape(text)}</td>" for text in row[1:])
    + "</tr>"
    for row in rows
  ]
  unfinished = "".join(
    f'<p class="warning" role="note">{html.escape(row["method"])} is not '
    f"finished: {html.escape(row['progress'])}.</p>\n"
    for row in summary["methods"]
    if row["progress"]
  )
  legend = "".join(
    f'<li><span class="line" style="color:var(--{colours[name]})"></span>'
    f"{html.escape(name)}</li>"
    for name in methods
  )
  body = [
    f'<header>\n<p class="subject">{html.escape(subject)}</p>\n'
    f"<h1>{markup.prose(headline(summary))}</h1>\n{unfinished}</header>",
    markup.section("Methods", markup.figures_table(head, marked) + _NOTE),
    markup.section(
      "Accuracy",
      f'<ul class="legend">{legend}</ul>\n'
      + markup.grid(_panels(folder, summary, colours)),
    ),
  ]
  return markup.document(subject, "\n".join(body))


_NOTE = (
  '<p class="note">A student is all members of one size: the mean of their '
  "top-1 at the last epoch, then mean ± standard deviation over seeds. For "
  "pcl the members are the mean teachers, for ffsd the leader. The ensemble "
  "is what teaches the members: the mean of their logits, or the classifier "
  "of their fused features (ffl, pcl, ffsd). Gain is in points over solo, the "
  "same networks trained alone. Time and memory are those of one step that "
  "trains the number of networks given, timed in turn on this machine; the "
  "ratio is to solo's.</p>"
)


def headline(summary: Mapping[str, Any]) -> str:
  """What came out, in one sentence that stays true."""
  rows = [row for row in summary["methods"] if row["method"] != "solo"]
  gains = {row["method"]: [s["gain"] for s in row["students"]] for row in rows}
  measured = {
    method: found
    for method, found in gains.items()
    if found and all(map(formatting.is_number, found))
  }
  start = findings.few(len(summary["methods"]), "method")
  if not measured:
    return f"{start}; no gain over solo is known yet."
  better = [method for method, found in measured.items() if min(found) > 0]
  rest = [method for method in measured if method not in better]
  said = f"{start}: every student gains over solo with {', '.join(better)}"
  if not better:
    said = f"{start}: with none does every student gain over solo"
  return said + (
    f"; not so with {', '.join(rest)}." if better and rest else "."
  )


def _cells(summary: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
  rows = summary["methods"]
  sizes = list(
    dict.fromkeys(s["params"] for row in rows for s in row["students"])
  )
  headings = ["method", "networks"]
  for params in sizes:
    headings += [f"{formatting.count(params)}\ntop-1 %", "gain"]
  headings += ["ensemble\ntop-1 %", "step\nx solo", "step\nMiB"]
  cells = []
  for row in rows:
    by_size = {student["params"]: student for student in row["students"]}
    line = [row["method"], str(row["networks"])]
    for params in sizes:
      student = by_size.get(params, {})
      line += [
        formatting.percent(student.get("top1"), student.get("std")),
        formatting.percent(student.get("gain"), signed=True),
      ]
    line += [
      formatting.percent(row["ensemble"]["top1"], row["ensemble"]["std"]),
      formatting.percent(row["step_ratio"]),
      f"{row['step_bytes'] / 2**20:.0f}",
    ]
    cells.append(line)
  return headings, cells


def _panels(
  folder: epath.Path, summary: Mapping[str, Any], colours: Mapping[str, str]
) -> list[str]:
  """Curves of every size, and of the ensembles; accuracy against time."""
  found = {name: runs.load(folder / name) for name in colours}
  largest = summary["methods"][0]["students"]
  panels = [
    markup.panel(
      "Accuracy against time",
      figures.accuracy_against_time(
        [
          figures.TimedPoint(
            row["method"],
            row["step_ratio"],
            student["top1"],
            student["std"],
            colours[row["method"]],
          )
          for row in summary["methods"]
          for student in row["students"][:1]
        ]
      ),
      "Top-1 % of the largest student against the time of a training step, as "
      "a multiple of solo's."
      + (" Bars: standard deviation over seeds." if _many(summary) else ""),
    )
  ]
  for student in largest:
    lines = [
      figures.Line(_mean_curve(run, _names(run, student["params"])), colour)
      for (name, run), colour in zip(
        found.items(), colours.values(), strict=True
      )
    ]
    size = formatting.count(student["params"])
    panels.append(
      markup.panel(
        f"Students of {size} parameters",
        figures.over_epochs(f"Test top-1 of {size} over epochs", lines),
        "Top-1 % on the test set, mean over members and seeds.",
      )
    )
  lines = [
    figures.Line(_mean_curve(run, ["ensemble"]), colours[name])
    for name, run in found.items()
  ]
  panels.append(
    markup.panel(
      "Ensembles",
      figures.over_epochs("Test top-1 of ensembles over epochs", lines),
      "Top-1 % on the test set of what teaches the members, mean over seeds.",
    )
  )
  return panels


def _many(summary: Mapping[str, Any]) -> bool:
  return len(summary["seeds"]) > 1


def _subject(summary: Mapping[str, Any]) -> str:
  seeds = ", ".join(map(str, summary["seeds"]))
  return (
    f"{summary['network']} on {summary['dataset']}, "
    f"{findings.few(summary['epochs'], 'epoch')}, "
    f"seed{'s' if _many(summary) else ''} {seeds}"
  )


def _names(run: runs.Run, params: int) -> list[str]:
  return [m["name"] for m in run.summary["members"] if m["params"] == params]


def _students(run: runs.Run) -> dict[int, tuple[list[str], Score]]:
  """{parameters: (members of this size, their accuracy)}."""
  found = {}
  for params in dict.fromkeys(m["params"] for m in run.summary["members"]):
    of_seeds = []
    for one in run.parts:
      top1 = [
        m["top1"] for m in one.summary["members"] if m["params"] == params
      ]
      known = all(map(formatting.is_number, top1))
      of_seeds.append(statistics.fmean(top1) if known else None)
    found[params] = _names(run, params), _over_seeds(of_seeds)
  return found


def _over_seeds(values: Sequence[float | None]) -> Score:
  known = [value for value in values if value is not None]
  if not known:
    return Score(None, None)
  spread = statistics.stdev(known) if len(known) > 1 else None
  return Score(statistics.fmean(known), spread)


def _gain(score: Score, alone: Score | None) -> float | None:
  if score.mean is None or alone is None or alone.mean is None:
    return None
  return score.mean - alone.mean


def _mean_curve(run: runs.Run, names: Sequence[str]) -> curves.Curve:
  """The mean over members and seeds, in the epochs that all of them tested."""
  found = [
    curves.curve(one.records, "test", f"top1/{name}")
    for one in run.parts
    for name in names
  ]
  epochs = set.intersection(*(set(points) for points in found))
  return {
    epoch: statistics.fmean(points[epoch] for points in found)
    for epoch in sorted(epochs)
  }
