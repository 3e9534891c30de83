"""The members of a run, and of several runs side by side, as tables.

A table is first plain strings (`members_cells`), so that the terminal, a pipe
and the HTML page show the same figures. A column that no member has a figure
for is left out: a run without solo baselines has no empty solo columns.
"""

import io
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ekd_jax import run_directory, storage
from ekd_jax.config import decides_training
from ekd_jax.errors import UserError
from ekd_jax.report import findings, formatting, runs

# Wide enough for every column with its spread; lines end where text ends.
_TEXT_WIDTH = 200
_CELL_WIDTH = 24


def _plain(value: object, spread: object) -> str:
  return formatting.plain(value)


def _short(value: object, spread: object) -> str:
  """A number as it was typed; means over seeds are cut to four digits."""
  if formatting.is_number(value):
    return f"{value:.4g}"
  return formatting.plain(value)


def _fraction(value: object, spread: object) -> str:
  return f"{value:.3f}" if formatting.is_number(value) else formatting.MISSING


def _count(value: float | None, spread: object) -> str:
  return formatting.count(value)


def _signed(value: float | None, spread: float | None) -> str:
  return formatting.percent(value, spread, signed=True)


class _Column(NamedTuple):
  heading: str  # two short lines at most, so that a table fits 80 columns
  field: str
  show: Callable[[Any, Any], str]  # (value, spread over seeds or None)


_COLUMNS = (
  _Column("member", "name", _plain),
  _Column("ratio\nasked", "ratio_asked", _short),
  _Column("ratio\ngot", "ratio", _fraction),
  _Column("width", "width", _short),
  _Column("params", "params", _count),
  _Column("MACs", "macs", _count),
  _Column("top-1\n%", "top1", formatting.percent),
  _Column("top-5\n%", "top5", formatting.percent),
  _Column("best\n%", "best_top1", formatting.percent),
  _Column("best\nepoch", "best_epoch", _short),
  _Column("solo\n%", "solo_top1", formatting.percent),
  _Column("gain\n%", "relative_gain", _signed),
  _Column("agree\n%", "agreement", formatting.percent),
)


class Cells(NamedTuple):
  """A table as strings."""

  fields: list[str]
  headings: list[str]
  rows: list[list[str]]


def members_cells(summary: dict) -> Cells:
  """The members of a run, one row each, then the ensemble and what else."""
  rows = [*summary["members"]]
  ensemble = summary.get("ensemble") or {}
  if any(value is not None for value in ensemble.values()):
    rows.append({**ensemble, "name": "ensemble"})
  rows += summary.get("others", [])
  spreads = findings.spreads(summary)
  columns = [
    column
    for column in _COLUMNS
    if any(row.get(column.field) is not None for row in rows)
  ]
  return Cells(
    fields=[column.field for column in columns],
    headings=[column.heading for column in columns],
    rows=[
      [
        column.show(
          row.get(column.field), spreads.get(row["name"], {}).get(column.field)
        )
        for column in columns
      ]
      for row in rows
    ],
  )


def members_table(summary: dict) -> Table:
  """The table printed at the end of a run.

  Args:
    summary: the content of a run's summary.json; with a "std" object beside
      the means of several seeds, accuracies read "70.1 ± 0.3".

  Returns:
    One row per member and a last one for the ensemble.
  """
  cells = members_cells(summary)
  table = new_table(findings.subject(summary), cells.headings)
  for row in cells.rows:
    if row[0] == "ensemble":
      table.add_section()
    table.add_row(*map(Text, row))
  return table


def members_text(summary: dict) -> str:
  """`members_table` as plain text for pipes and logs."""
  return _render(members_table(summary))


def compare_table(run_dirs: Sequence[str | os.PathLike]) -> Table:
  """Runs side by side: parameters, top-1 and its difference to the first run.

  Members are matched by name. Below the members stand the config fields in
  which the runs differ; the caption says where two runs' members of one name
  are not the same network, and which runs are unfinished.

  Args:
    run_dirs: two or more run directories.

  Raises:
    UserError: fewer than two directories, or one that holds no run.
  """
  if len(run_dirs) < 2:
    raise UserError(
      f"compare needs two or more run directories, got {len(run_dirs)}"
    )
  found = [runs.load(run_dir) for run_dir in run_dirs]
  labels = _labels(run_dirs)
  members = [_by_name(run.summary) for run in found]
  names = _ordered_union([list(by_name) for by_name in members])
  # One column of sizes is enough where all runs train the same networks.
  sizes = 1 if all(_same(members, name, "params") for name in names) else None
  sized = labels[:sizes]
  table = new_table(
    "top-1 % of the last epoch",
    [
      "member",
      *("params" if sizes else f"params\n{label}" for label in sized),
      *(f"top-1 %\n{label}" for label in labels),
      *(f"{label}\n- {labels[0]}" for label in labels[1:]),
    ],
  )
  for name in names:
    if name == "ensemble":
      table.add_section()
    table.add_row(
      Text(name),
      *_sizes(members, name)[:sizes],
      *(
        formatting.percent(
          by_name.get(name, {}).get("top1"),
          findings.spreads(run.summary).get(name, {}).get("top1"),
        )
        for run, by_name in zip(found, members, strict=True)
      ),
      *_differences([by_name.get(name, {}).get("top1") for by_name in members]),
    )
  differing = _config_differences([run.config for run in found])
  if differing:
    table.add_section()
  for field, values in differing.items():
    table.add_row(
      Text(field, style="dim"),
      *[""] * len(sized),
      *(Text(formatting.plain(value), style="dim") for value in values),
      *[""] * (len(labels) - 1),
    )
  notes = _notes(labels, members, names) + [
    f"{label} is unfinished: {run.progress}"
    for label, run in zip(labels, found, strict=True)
    if run.unfinished
  ]
  if notes:
    table.caption = Text("\n".join(notes))
    table.caption_justify = "left"
  return table


def compare_text(run_dirs: Sequence[str | os.PathLike]) -> str:
  """`compare_table` as plain text for pipes and logs."""
  return _render(compare_table(run_dirs))


def unlike(run_dirs: Sequence[str | os.PathLike]) -> list[str]:
  """Why runs are no fair comparison of methods or seeds, in a line each.

  A line for every option but those two that decides what is trained, and for
  every version, device and variable of the last start, that is not the same
  everywhere.
  """
  found = [runs.load(run_dir) for run_dir in run_dirs]
  options = {
    name: values
    for name, values in _config_differences(
      [run.config for run in found]
    ).items()
    if decides_training(name) and name not in ("method", "seed", "seeds")
  }
  surroundings = _config_differences([_surroundings(run) for run in found])
  return [
    f"the runs also differ in {name}: "
    + ", ".join(
      f"{formatting.plain(value)} in {label}"
      for label, value in zip(_labels(run_dirs), values, strict=True)
    )
    for name, values in (options | surroundings).items()
  ]


def _surroundings(run: runs.Run) -> dict[str, Any]:
  """What the last start of a run says of its machine, flat."""
  path = run.parts[-1].path / run_directory.ENVIRONMENT
  if not path.is_file():
    return {}
  last = run_directory.read_json(path)["starts"][-1]
  flat = {
    name: last.get(name) for name in ("platform", "processes", "git_commit")
  }
  flat["devices"] = len(last.get("devices", []))
  for group in ("versions", "variables"):
    flat |= {
      f"{group}.{name}": value for name, value in last.get(group, {}).items()
    }
  return flat


def _by_name(summary: dict) -> dict[str, dict]:
  """Members by name; the ensemble is one of them."""
  members = {member["name"]: member for member in summary["members"]}
  if (summary.get("ensemble") or {}).get("top1") is not None:
    members["ensemble"] = summary["ensemble"]
  return members


def _labels(run_dirs: Sequence[str | os.PathLike]) -> list[str]:
  """Last parts of the paths, or the whole paths if those are not unique."""
  names = [storage.path(run_dir).resolve().name for run_dir in run_dirs]
  return names if len(set(names)) == len(names) else list(map(str, run_dirs))


def _ordered_union(lists: list[list[str]]) -> list[str]:
  names = dict.fromkeys(name for one in lists for name in one)
  return sorted(names, key="ensemble".__eq__)  # stable: ensemble goes last


def _present(
  members: list[dict[str, dict]], name: str, field: str
) -> list[object]:
  """A field of one member in the runs that know it."""
  values = [by_name.get(name, {}).get(field) for by_name in members]
  return [value for value in values if value is not None]


def _same(members: list[dict[str, dict]], name: str, field: str) -> bool:
  values = _present(members, name, field)
  return all(value == values[0] for value in values)


def _sizes(members: list[dict[str, dict]], name: str) -> list[str]:
  """Parameters of a member per run; where all agree, none is missing."""
  if _same(members, name, "params"):
    params = [*_present(members, name, "params"), None][0]
    return [formatting.count(params)] * len(members)
  return [
    formatting.count(by_name.get(name, {}).get("params")) for by_name in members
  ]


def _differences(top1: list[float | None]) -> list[str]:
  """Points above the first run, of every other run."""
  first, *others = top1
  return [
    formatting.percent(other - first, signed=True)
    if formatting.is_number(first) and formatting.is_number(other)
    else formatting.MISSING
    for other in others
  ]


def _config_differences(configs: list[dict]) -> dict[str, list]:
  """Fields that are not equal in all configs, with each config's value."""
  fields = sorted(set().union(*configs) - {"run_dir"})
  values = {field: [c.get(field) for c in configs] for field in fields}
  return {
    field: found
    for field, found in values.items()
    if any(value != found[0] for value in found)
  }


def _notes(
  labels: list[str], members: list[dict[str, dict]], names: list[str]
) -> list[str]:
  """Where members of one name cannot be compared like for like."""
  notes = []
  for label, by_name in zip(labels, members, strict=True):
    absent = [name for name in names if name not in by_name]
    if absent:
      notes.append(f"{label} has no {', '.join(absent)}")
  for name in names:
    # Not by width: two widths may give the same numbers of channels.
    if _same(members, name, "params") and _same(members, name, "macs"):
      continue
    said = [
      f"{field} "
      + ", ".join(
        f"{formatting.plain(by_name[name].get(field))} in {label}"
        for label, by_name in zip(labels, members, strict=True)
        if name in by_name
      )
      for field in ("width", "params", "macs")
      if not _same(members, name, field)
    ]
    notes.append(f"{name} is not the same network: {'; '.join(said)}")
  return notes


def new_table(title: str, headings: list[str]) -> Table:
  """An empty table in the style of all of them."""
  table = Table(
    title=Text(title),
    box=box.SIMPLE_HEAD,
    pad_edge=False,
    padding=0,  # the box puts one space between columns
    title_justify="left",
    min_width=len(title),  # or a narrow table would fold its title
  )
  for index, heading in enumerate(headings):
    table.add_column(
      Text(heading),
      justify="right" if index else "left",
      no_wrap=index == 0,
      # In a narrow terminal a figure goes on in the next line; an ellipsis
      # would hide its digits.
      overflow="fold",
      max_width=_CELL_WIDTH,
    )
  return table


def _render(table: Table) -> str:
  console = Console(
    file=io.StringIO(), width=_TEXT_WIDTH, color_system=None, emoji=False
  )
  console.print(table)
  lines = console.file.getvalue().splitlines()
  return "\n".join(line.rstrip() for line in lines).strip("\n") + "\n"
