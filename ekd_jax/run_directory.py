"""A run directory: the plain files that say what a run was and gave.

    config.json        every option, resolved
    command.txt        the command line, one line per start
    environment.json   versions, devices, one entry per start
    metrics.jsonl      one flat JSON object per line; see below
    tensorboard/       the same numbers as event files
    checkpoints/       see training/checkpoint.py; those that turned out to be
                       damaged are moved to damaged_checkpoints/
    summary.json       the result; its shape is read by other programs
    report.html        see report
    solo/              with --with-solo: the run of the members alone

A line of metrics.jsonl has "kind", "epoch" (from 1) and "step" (optimizer
steps done), and metrics named "what/which": "step" lines hold that step's
values on its training batch, "epoch" lines the means over the epoch's steps,
"test" and "validation" lines the scores of `evaluation`. Nothing in it depends
on the clock, so a resumed run writes the lines that an unbroken one does.
"""

import json
import os
import pathlib
import shlex
import statistics
import sys
from collections.abc import Sequence
from typing import Any

from etils import epath

from ekd_jax import build, environment, storage
from ekd_jax.config import Config, flag, from_json, to_json, training_fields
from ekd_jax.errors import UserError

CONFIG = "config.json"
ENVIRONMENT = "environment.json"
METRICS = "metrics.jsonl"
SUMMARY = "summary.json"
SOLO = "solo"
# What a kill between creating a directory and its first file leaves.
_UNFINISHED = {storage.LOCK, CONFIG + storage.TEMPORARY}


def check(run_dir: str | os.PathLike, config: Config) -> None:
  """Refuses a directory that this config cannot use; writes nothing.

  Args:
    run_dir: the directory, which need not exist.
    config: what is to be trained into it.

  Raises:
    UserError: the path is a file, holds other files, or holds a run with a
      different config (the differing flags are named); or it is in a bucket
      that cannot be reached.
  """
  run_dir = storage.path(run_dir)
  with storage.reached(run_dir, "--run-dir"):
    _check(run_dir, config)


def _check(run_dir: epath.Path, config: Config) -> None:
  if run_dir.is_file():
    raise UserError(
      f"--run-dir {run_dir} is a file: name a directory, new or of an "
      "earlier run"
    )
  if (run_dir / CONFIG).is_file():
    _check_same_config(run_dir, config)
  elif run_dir.is_dir() and any(
    path.name not in _UNFINISHED for path in run_dir.iterdir()
  ):
    raise UserError(
      f"--run-dir {run_dir} holds files but no run ({CONFIG} is missing): "
      "name a new or empty directory"
    )
  if storage.is_remote(run_dir):
    return
  existing = next(p for p in (run_dir, *run_dir.parents) if p.exists())
  if not (existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)):
    raise UserError(
      f"--run-dir {run_dir} cannot be written: {existing} is not a directory "
      "that you may write to; name another with --run-dir"
    )


def open_run(
  run_dir: str | os.PathLike, config: Config, argv: Sequence[str]
) -> None:
  """Creates the directory, or adds this start to an existing run's files.

  Raises:
    StorageError: it cannot be written to.
    UserError: it is in a bucket that cannot be reached.
  """
  run_dir = storage.path(run_dir)
  with storage.reached(run_dir, "--run-dir"), storage.failures_told(run_dir):
    run_dir.mkdir(parents=True, exist_ok=True)
    # Written at every start: what may differ on resume is then up to date.
    write_json(run_dir / CONFIG, to_json(config))
    path = run_dir / "command.txt"
    commands = path.read_text() if path.exists() else ""
    command = shlex.join([pathlib.Path(sys.executable).name, *argv])
    storage.write_atomically(path, f"{commands}{command}\n")
    path = run_dir / ENVIRONMENT
    starts = read_json(path)["starts"] if path.exists() else []
    write_json(path, {"starts": [*starts, environment.describe()]})


def read_config(run_dir: str | os.PathLike) -> dict[str, Any]:
  """The options of a run, as JSON values.

  Raises:
    UserError: the directory holds no run.
  """
  path = storage.path(run_dir) / CONFIG
  with storage.reached(run_dir, "the run directory"):
    if not path.is_file():
      raise UserError(
        f"{run_dir} is no run directory ({CONFIG} is missing): name one that "
        "a training command made"
      )
    values = read_json(path)
  if not isinstance(values, dict):
    raise UserError(f"{path} holds no options: it is damaged, bring it back")
  return values


def load_config(run_dir: str | os.PathLike) -> Config:
  """The options of a run; see `read_config`.

  Raises:
    UserError: there are none, or those of a newer version.
  """
  values = read_config(run_dir)
  try:
    return from_json(values)
  except UserError as error:
    raise UserError(
      f"{storage.path(run_dir) / CONFIG} cannot be used: {error}"
    ) from error


def read_metrics(run_dir: str | os.PathLike) -> list[dict[str, Any]]:
  """The lines of metrics.jsonl, oldest first; [] before the first one.

  A last line without its end was cut off by a kill and is left out.

  Raises:
    UserError: another line is damaged.
  """
  path = storage.path(run_dir) / METRICS
  if not path.exists():
    return []
  metrics = []
  lines = path.read_bytes().splitlines(keepends=True)
  for number, line in enumerate(lines, 1):
    if not line.endswith(b"\n"):
      continue
    try:
      found = json.loads(line)
      int(found["step"])
    except (ValueError, TypeError, KeyError) as error:
      raise UserError(
        f"{path} is damaged in line {number}: bring back a copy, or start "
        "again in another --run-dir"
      ) from error
    metrics.append(found)
  return metrics


def truncate_metrics(run_dir: str | os.PathLike, step: int) -> None:
  """Drops the lines after `step`: the resumed run writes them again."""
  kept = [m for m in read_metrics(run_dir) if m["step"] <= step]
  storage.write_atomically(
    storage.path(run_dir) / METRICS,
    "".join(json.dumps(m) + "\n" for m in kept),
  )


def summarize(run_dir: str | os.PathLike) -> dict[str, Any]:
  """The result of a run so far, in the shape of summary.json.

  {"method", "dataset", "network", "epochs", "seed", "members": [{"name",
  "ratio_asked", "ratio", "width", "params", "macs", "top1", "top5",
  "best_top1", "best_epoch", "solo_top1", "relative_gain", "agreement"}],
  "ensemble": {"top1", "top5", "best_top1"}}. Accuracies are those on the test
  set at the last evaluation, in percent; "best_*" belong to the epoch that
  was best on the validation examples; what was not measured is None. If the
  method scores more than its members, "others" lists these as "ensemble" is,
  each with its "name". The directory of several seeds gives means, and their
  "std" in the same shape.
  """
  run_dir = storage.path(run_dir)
  config = load_config(run_dir)
  if config.seeds is not None:
    return _summarize_seeds(run_dir, config)
  metrics = read_metrics(run_dir)
  tests = [m for m in metrics if m["kind"] == "test"]
  last = tests[-1] if tests else {}
  best_epochs = _best_epochs(metrics)
  test_of_epoch = {m["epoch"]: m for m in tests}
  solo = {}
  if (run_dir / SOLO / CONFIG).is_file():
    alone = summarize(run_dir / SOLO)["members"]
    solo = {member["name"]: member["top1"] for member in alone}

  def best_top1(name: str) -> float | None:
    epoch = best_epochs.get(name)
    return test_of_epoch.get(epoch, {}).get(f"top1/{name}")

  rows = []
  for member in build.members(config):
    name = member.name
    top1, solo_top1 = last.get(f"top1/{name}"), solo.get(name)
    gain = None
    if top1 is not None and solo_top1:
      gain = (top1 - solo_top1) / solo_top1 * 100
    rows.append(
      {
        **member._asdict(),
        "top1": top1,
        "top5": last.get(f"top5/{name}"),
        "best_top1": best_top1(name),
        "best_epoch": best_epochs.get(name),
        "solo_top1": solo_top1,
        "relative_gain": gain,
        "agreement": last.get(f"agreement/{name}"),
      }
    )

  def beside_members(name: str) -> dict[str, float | None]:
    return {
      "top1": last.get(f"top1/{name}"),
      "top5": last.get(f"top5/{name}"),
      "best_top1": best_top1(name),
    }

  known = {"ensemble", *(row["name"] for row in rows)}
  scored = [key.removeprefix("top1/") for key in last if key[:5] == "top1/"]
  others = [
    {"name": name, **beside_members(name)}
    for name in sorted(scored)
    if name not in known
  ]
  return {
    "method": config.method,
    "dataset": config.dataset,
    "network": build.network_name(config),
    "epochs": config.epochs,
    "seed": config.seed,
    "members": rows,
    "ensemble": beside_members("ensemble"),
    **({"others": others} if others else {}),
  }


def write_summary(run_dir: str | os.PathLike) -> None:
  """Writes summary.json.

  Raises:
    StorageError: it cannot be written.
  """
  summary = summarize(run_dir)
  with storage.failures_told(run_dir):
    write_json(storage.path(run_dir) / SUMMARY, summary)


def seed_directory(run_dir: str | os.PathLike, seed: int) -> epath.Path:
  """Where one of several seeds is kept."""
  return storage.path(run_dir) / f"seed_{seed}"


def write_json(path: epath.Path, value: Any) -> None:
  """Writes a JSON file so that a reader sees the old one or the new one."""
  storage.write_atomically(path, json.dumps(value, indent=2) + "\n")


def read_json(path: epath.Path) -> Any:
  """Reads a JSON file.

  Raises:
    UserError: it is damaged.
  """
  try:
    return json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise UserError(
      f"{path} is damaged ({error}): bring back a copy, or start again in "
      "another --run-dir"
    ) from error


def _check_same_config(run_dir: epath.Path, config: Config) -> None:
  before = training_fields(load_config(run_dir))
  now = training_fields(config)
  different = [
    f"{flag(name)} (there {before[name]}, now {now[name]})"
    for name in now
    if before[name] != now[name]
  ]
  if different:
    raise UserError(
      f"--run-dir {run_dir} holds a run with other options: "
      f"{', '.join(different)}; use the same ones to resume it, or another "
      "--run-dir"
    )


def _best_epochs(metrics: Sequence[dict[str, Any]]) -> dict[str, int]:
  """{member or "ensemble": epoch of its best validation top-1}."""
  best: dict[str, tuple[float, int]] = {}
  for line in metrics:
    if line["kind"] != "validation":
      continue
    for key, value in line.items():
      what, _, name = key.partition("/")
      # The first of equal epochs stays the best one.
      if what == "top1" and (name not in best or value > best[name][0]):
        best[name] = (value, line["epoch"])
  return {name: epoch for name, (_, epoch) in best.items()}


def _summarize_seeds(run_dir: epath.Path, config: Config) -> dict[str, Any]:
  runs = [
    summarize(seed_directory(run_dir, seed))
    for seed in config.seeds
    if (seed_directory(run_dir, seed) / CONFIG).is_file()
  ]
  if not runs:
    raise UserError(f"{run_dir} has no seed that was started: run it again")
  measured = (
    "top1",
    "top5",
    "best_top1",
    "solo_top1",
    "relative_gain",
    "agreement",
  )

  def over_seeds(function: Any, rows: Sequence[dict[str, Any]]) -> dict:
    result = {}
    for name in measured:
      if name in rows[0]:
        values = [row[name] for row in rows]
        result[name] = None if None in values else function(values)
    return result

  def spread(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None

  def named(what: str, function: Any) -> list[dict[str, Any]]:
    by_name = zip(*(run.get(what, []) for run in runs), strict=True)
    return [
      {"name": rows[0]["name"], **over_seeds(function, rows)}
      for rows in by_name
    ]

  by_member = list(zip(*(run["members"] for run in runs), strict=True))
  ensembles = [run["ensemble"] for run in runs]
  # Not yet evaluated, a seed does not know of them.
  others = all("others" in run for run in runs)
  return {
    **{key: value for key, value in runs[0].items() if key != "others"},
    "seed": list(config.seeds),
    "members": [
      {**rows[0], "best_epoch": None, **over_seeds(statistics.fmean, rows)}
      for rows in by_member
    ],
    "ensemble": over_seeds(statistics.fmean, ensembles),
    **({"others": named("others", statistics.fmean)} if others else {}),
    "std": {
      "members": named("members", spread),
      "ensemble": over_seeds(spread, ensembles),
      **({"others": named("others", spread)} if others else {}),
    },
  }
