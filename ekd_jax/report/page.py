"""The HTML page of a run: one file that needs nothing else.

Sections go from what came out to how to get it again: members, accuracy
against size, curves, loss terms, the ensemble, command and configuration. A
section without figures is left out. Everything that comes from the run
directory is escaped: a run's command may contain anything.
"""

import html
import json
import math
import os
from collections.abc import Mapping

from etils import epath

from ekd_jax import storage
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


def write(run_dir: str | os.PathLike) -> epath.Path:
  """Writes RUN_DIR/report.html, of a finished run or of one under way.

  With several seeds, each seed's report is written too: the page links them.

  Args:
    run_dir: a run directory.

  Returns:
    The path of the page. A reader never meets a half-written one.

  Raises:
    UserError: the directory holds no run.
    StorageError: it cannot be written to.
  """
  run = runs.load(run_dir)
  with storage.failures_told(run_dir):
    for part in (*run.seeds, run):
      storage.write_atomically(part.path / "report.html", page(part))
  return run.path / "report.html"


def page(run: runs.Run) -> str:
  """The page as a string."""
  subject = findings.subject(run.summary)
  body = "\n".join(
    [
      _header(run, subject),
      _members(run),
      _seeds(run),
      _accuracy(run),
      _terms(run),
      _ensemble(run),
      _definitions(),
      _reproduction(run),
    ]
  )
  return markup.document(subject, body)


def _header(run: runs.Run, subject: str) -> str:
  sentences = [findings.against_solo(run), findings.ensemble(run)]
  lead = " ".join(sentence for sentence in sentences if sentence)
  warnings = "".join(
    f'<p class="warning" role="note">{markup.prose(text)}</p>\n'
    for text in findings.warnings(run)
  )
  return (
    f'<header>\n<p class="subject">{html.escape(subject)}</p>\n'
    f"<h1>{markup.prose(findings.headline(run))}</h1>\n"
    f"<p>{markup.prose(lead)}</p>\n{warnings}</header>"
  )


def _members(run: runs.Run) -> str:
  cells = tables.members_cells(run.summary)
  colours = _colours(run)
  gains = {m["name"]: m.get("relative_gain") for m in run.summary["members"]}
  head = "".join(f"<th>{html.escape(text)}</th>" for text in cells.headings)
  rows = []
  for row in cells.rows:
    name = row[0]
    colour = colours.get(name, "muted")
    tags = [f"<td>{markup.swatch(colour)}{html.escape(name)}</td>"]
    for field, text in zip(cells.fields[1:], row[1:], strict=True):
      gain = (gains.get(name) or 0) if field == "relative_gain" else 0
      kind = "good" if gain > 0 else "bad" if gain < 0 else ""
      tags.append(f"<td{markup.class_of(kind)}>{html.escape(text)}</td>")
    kind = "ensemble" if name == "ensemble" else ""
    rows.append(f"<tr{markup.class_of(kind)}>{''.join(tags)}</tr>")
  means = (
    f'<p class="note">Mean ± standard deviation over {len(run.seeds)} '
    "seeds.</p>"
    if run.seeds
    else ""
  )
  return markup.section("Members", markup.figures_table(head, rows) + means)


def _seeds(run: runs.Run) -> str:
  """Links to the reports of the seeds, with each seed's accuracies."""
  if not run.seeds:
    return ""
  names = [member["name"] for member in run.summary["members"]]
  head = (
    "".join(
      f"<th>{html.escape(text)}</th>" for text in ["seed", "epochs", *names]
    )
    + "<th>ensemble</th>"
  )
  rows = []
  for seed in run.seeds:
    top1 = {m["name"]: m.get("top1") for m in seed.summary["members"]}
    ensemble = (seed.summary.get("ensemble") or {}).get("top1")
    values = [*(top1.get(name) for name in names), ensemble]
    link = html.escape(f"{seed.path.name}/report.html")
    rows.append(
      f'<tr><td><a href="{link}">{html.escape(seed.path.name)}</a></td>'
      f"<td>{seed.epochs_done} of {seed.epochs_asked}</td>"
      + "".join(f"<td>{formatting.percent(value)}</td>" for value in values)
      + "</tr>"
    )
  note = '<p class="note">Top-1 % of each seed; its curves are in its report.'
  return markup.section(
    "Seeds", markup.figures_table(head, rows) + note + "</p>"
  )


def _accuracy(run: runs.Run) -> str:
  colours = _colours(run)
  alone = run.solo.records if run.solo else []
  panels = [
    markup.panel(
      "Accuracy against size",
      figures.accuracy_against_size(
        _points(run), (run.summary.get("ensemble") or {}).get("top1")
      ),
      "Top-1 % at the last epoch. Filled: this run"
      + ("; open: the same network trained alone." if _has_solo(run) else ".")
      + (" Bars: standard deviation over seeds." if run.seeds else ""),
    ),
    markup.panel(
      "Test accuracy while training",
      figures.over_epochs(
        "Test top-1 over epochs",
        [
          *_lines(curves.members(alone, "test", "top1"), colours, faint=True),
          *_lines(curves.members(run.records, "test", "top1"), colours),
        ],
      ),
      "Top-1 % on the test set."
      + (" Dashed: the same network trained alone." if alone else ""),
    ),
    markup.panel(
      "Validation accuracy while training",
      figures.over_epochs(
        "Validation top-1 over epochs",
        _lines(curves.members(run.records, "validation", "top1"), colours),
      ),
      "Top-1 % on training images that were held out. The best epoch is "
      "chosen here, never on the test set.",
    ),
  ]
  content = markup.grid(panels)
  return markup.section("Accuracy", _legend(run) + content) if content else ""


def _terms(run: runs.Run) -> str:
  """Everything an epoch logged, one panel per term; names are not known."""
  colours = _colours(run)
  single = curves.scalars(run.records)
  total = single.pop("loss", {})
  panels = [_small_panel("loss", [figures.Line(total, "ink")])]
  panels += [
    _small_panel(term, _lines(by_member, colours))
    for term, by_member in curves.terms(run.records).items()
  ]
  panels += [
    _small_panel(name, [figures.Line(points, "ink")])
    for name, points in single.items()
  ]
  note = (
    '<p class="note">Means over the training steps of each epoch, as the '
    "method logged them. A term that a member has several parts of (one per "
    "block, say) is shown as the mean over them. The vertical axis is "
    "logarithmic where values span more than a factor of 20.</p>"
  )
  content = markup.grid(panels, small=True)
  if not content:
    return ""
  return markup.section(
    "Loss terms", _legend(run, alone=False) + content + note
  )


def _ensemble(run: runs.Run) -> str:
  names = [member["name"] for member in run.summary["members"]]
  if len(names) < 2 and "others" not in run.summary:
    return ""  # one member is its own ensemble
  colours = _colours(run)
  agreement = curves.members(run.records, "test", "agreement")
  top1 = curves.members(run.records, "test", "top1")
  ensemble = top1.pop("ensemble", {})
  panels = [
    markup.panel(
      "Agreement with the ensemble",
      figures.over_epochs(
        "Agreement with the ensemble over epochs", _lines(agreement, colours)
      ),
      "Test images, in %, for which a member and the ensemble name the same "
      "class.",
    ),
    markup.panel(
      "Ensemble minus best member",
      figures.over_epochs(
        "Ensemble minus best member over epochs",
        [
          figures.Line(
            _above_best(ensemble, {n: top1[n] for n in names if n in top1}),
            "ink",
          )
        ],
        zero_line=True,
      ),
      "Points of test top-1, against the member that is best in that epoch. "
      "Below zero the ensemble is the weaker one.",
    ),
  ]
  content = markup.grid(panels)
  if not content:
    return ""
  return markup.section("The ensemble", _legend(run, alone=False) + content)


def _definitions() -> str:
  return markup.section(
    "How to read the figures",
    "<p>The result of a run is the accuracy of its last epoch. The test set "
    "chooses nothing: a best epoch is given only where training images were "
    "held out to choose it on, and its accuracy is then the one on the test "
    "set. Ratio is the fraction of the full network's parameters that was "
    "removed. MACs are multiply-adds for one image. Solo is the same network "
    "trained alone with the same budget; gain is relative, (top-1 - solo) / "
    "solo × 100. Agreement is the share of test images for which a member "
    "and the ensemble name the same class.</p>",
  )


def _reproduction(run: runs.Run) -> str:
  command = _text(run.path / "command.txt").strip()
  environment = _text(run.path / "environment.json")
  if run.seeds and not environment:
    environment = _text(run.seeds[0].path / "environment.json")
  if run.seeds and not command:
    command = "\n".join(
      _text(seed.path / "command.txt").strip() for seed in run.seeds
    ).strip()
  starts = len(command.splitlines())
  parts = []
  if command:
    resumed = (
      f'<p class="note">{starts} starts, in this order; a run that is '
      "started again resumes.</p>"
      if starts > 1 and not run.seeds
      else ""
    )
    parts.append(f"<pre><code>{html.escape(command)}</code></pre>{resumed}")
  parts.append('<div class="grid">')
  parts.append(f"<div><h3>Configuration</h3>{markup.facts(run.config)}</div>")
  if environment:
    facts = markup.facts(_flat(_json_or_text(environment)))
    parts.append(f"<div><h3>Environment</h3>{facts}</div>")
  parts.append("</div>")
  return markup.section("How to get it again", "\n".join(parts))


def _points(run: runs.Run) -> list[figures.Point]:
  colours = _colours(run)
  spreads = findings.spreads(run.summary)
  return [
    figures.Point(
      name=member["name"],
      params=member.get("params"),
      top1=member.get("top1"),
      spread=spreads.get(member["name"], {}).get("top1"),
      solo=member.get("solo_top1"),
      solo_spread=spreads.get(member["name"], {}).get("solo_top1"),
      colour=colours[member["name"]],
    )
    for member in run.summary["members"]
  ]


def _above_best(
  ensemble: curves.Curve, members: Mapping[str, curves.Curve]
) -> curves.Curve:
  """Ensemble minus best member, for every epoch that tested all of them."""
  found = {}
  for epoch, value in ensemble.items():
    others = [points.get(epoch, math.nan) for points in members.values()]
    known = others and all(map(math.isfinite, others))
    found[epoch] = value - max(others) if known else math.nan
  return found


def _colours(run: runs.Run) -> dict[str, str]:
  """The colour of every member, the same in all figures of the page."""
  names = [member["name"] for member in run.summary["members"]]
  colours = {name: style.series(index) for index, name in enumerate(names)}
  return {**colours, "ensemble": "ink"}


def _has_solo(run: runs.Run) -> bool:
  return any(
    member.get("solo_top1") is not None for member in run.summary["members"]
  )


def _lines(
  found: Mapping[str, curves.Curve],
  colours: Mapping[str, str],
  *,
  faint: bool = False,
) -> list[figures.Line]:
  return [
    figures.Line(points, colours.get(name, "muted"), faint)
    for name, points in found.items()
    # The mean of networks that were trained alone is no part of the question.
    if not (faint and name == "ensemble")
  ]


def _legend(run: runs.Run, *, alone: bool = True) -> str:
  items = [
    f'<li><span class="line" style="color:var(--{colour})"></span>'
    f"{html.escape(name)}</li>"
    for name, colour in _colours(run).items()
  ]
  if others := run.summary.get("others"):
    named = ", ".join(html.escape(other["name"]) for other in others)
    items.append(
      f'<li><span class="line" style="color:var(--muted)"></span>{named}</li>'
    )
  if alone and _has_solo(run):
    items.append('<li><span class="line dashed"></span>trained alone</li>')
  return f'<ul class="legend">{"".join(items)}</ul>\n'


def _small_panel(title: str, lines: list[figures.Line]) -> str:
  name = {"top1": "top-1 % on training images"}.get(
    title, title.replace("_", " ")
  )
  drawn = figures.over_epochs(
    f"{name} of training over epochs", lines, size=figures.THIRD
  )
  return markup.panel(name, drawn, "")


def _flat(value: object, name: str = "") -> dict[str, object]:
  """Nested objects as dotted names: {"versions.jax": "0.10.2", ...}."""
  if isinstance(value, list) and any(isinstance(v, Mapping) for v in value):
    # A list of like objects, one per start of a run: what never changed is
    # said once, what did in order.
    flat = [_flat(inner, name) for inner in value]
    keys = dict.fromkeys(key for one in flat for key in one)
    said = {k: [formatting.plain(f[k]) for f in flat if k in f] for k in keys}
    return {key: list(dict.fromkeys(found)) for key, found in said.items()}
  if not isinstance(value, Mapping):
    return {name: value}
  found = {}
  for key, inner in value.items():
    found |= _flat(inner, f"{name}.{key}" if name else str(key))
  return found


def _json_or_text(text: str) -> object:
  try:
    return json.loads(text)
  except json.JSONDecodeError:
    return {"environment.json": text}


def _text(path: epath.Path) -> str:
  return path.read_text(encoding="utf-8") if path.is_file() else ""
