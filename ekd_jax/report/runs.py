"""A run directory, read whole.

A directory is either one run, perhaps with the same members trained alone
under solo/, or the parent of one run per seed (seed_0, seed_1, ...), whose
summary then holds means. `load` hides the difference as far as it can be
hidden; `Run.seeds` says which it was.
"""

import os
from typing import Any, NamedTuple

from etils import epath

from ekd_jax import run_directory, storage


class Run(NamedTuple):
  """What the report needs to know of a run directory."""

  path: epath.Path
  config: dict[str, Any]
  summary: dict[str, Any]
  records: list[dict[str, Any]]  # lines of metrics.jsonl; none with seeds
  solo: "Run | None"
  seeds: list["Run"]  # those that have been started

  @property
  def parts(self) -> list["Run"]:
    """The runs that have metrics of their own: the seeds, or this one."""
    return self.seeds or [self]

  @property
  def epochs_done(self) -> int:
    """Complete epochs; with seeds, those of the slowest that was started."""
    if self.seeds:
      return min(seed.epochs_done for seed in self.seeds)
    epochs = [r["epoch"] for r in self.records if r["kind"] == "epoch"]
    return max(epochs, default=0)

  @property
  def epochs_asked(self) -> int:
    """Epochs that the configuration asks for."""
    return self.config["epochs"]

  @property
  def seeds_asked(self) -> int:
    """Seeds that the configuration asks for; 0 for a single run."""
    return len(self.config.get("seeds") or [])

  @property
  def unfinished(self) -> bool:
    """Whether epochs or seeds are still to come."""
    return (
      self.epochs_done < self.epochs_asked or len(self.seeds) < self.seeds_asked
    )

  @property
  def progress(self) -> str:
    """How far it is: "3 of 30 epochs", "2 of 3 seeds"."""
    if len(self.seeds) < self.seeds_asked:
      return f"{len(self.seeds)} of {self.seeds_asked} seeds started"
    return f"{self.epochs_done} of {self.epochs_asked} epochs"


def load(run_dir: str | os.PathLike) -> Run:
  """Reads a run directory, finished or not.

  Raises:
    UserError: the directory holds no run.
  """
  path = storage.path(run_dir)
  config = run_directory.read_config(path)
  seeds = [
    run_directory.seed_directory(path, seed)
    for seed in config.get("seeds") or []
  ]
  solo = path / run_directory.SOLO
  return Run(
    path=path,
    config=config,
    summary=run_directory.summarize(path),
    records=[] if seeds else run_directory.read_metrics(path),
    solo=load(solo) if _is_run(solo) else None,
    seeds=[load(seed) for seed in seeds if _is_run(seed)],
  )


def _is_run(path: epath.Path) -> bool:
  return (path / run_directory.CONFIG).is_file()
