"""Methods side by side: the same networks, data, budget and seeds for each.

A comparison is a directory of ordinary runs, one for each method and seed, so
whatever holds for a run holds here: the same command goes on where it was
killed. First the steps of all methods are timed in turn: what they cost, and so
how long everything will take. Then the runs are trained, one after the other,
and after each method one page and one table put side by side what there is.
"""

import dataclasses
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath
from rich.console import Console

from ekd_jax import cli, storage
from ekd_jax import config as configs
from ekd_jax.config import Config
from ekd_jax.ending import exit_on_user_error
from ekd_jax.errors import UserError

COSTS = "costs.json"

# Networks that every method trains at once if nobody says what else: PCL's
# three peers; FFSD's leader and two common students.
_NETWORKS = 3


@dataclasses.dataclass(frozen=True)
class Comparison(Config):
  """Options of a comparison: those of its trainings, and which they are."""

  # What is compared: methods, separated by commas. Gains are over solo.
  methods: configs.Words = ("solo", "dml", "ekd", "ffl", "pcl", "ffsd")


def main(
  defaults: Comparison,
  description: str,
  argv: Sequence[str] | None = None,
) -> None:
  """Parses the command line, trains what is not trained yet; may exit.

  Args:
    defaults: the comparison without any flag.
    description: first lines of --help.
    argv: the arguments, those of the process by default.
  """
  argv = list(sys.argv if argv is None else argv)
  exit_on_user_error(lambda: _main(defaults, description, argv))


def runs_of(comparison: Comparison) -> dict[str, Config]:
  """{method: the config of its runs}, each resolved.

  An option that only some methods have is for those. If nobody says who is
  trained, it is three networks at once with every method.

  Raises:
    UserError: a value that cannot be used.
  """
  known = Comparison.methods
  for method in comparison.methods:
    if method not in known:
      near = configs.nearest(method, known)
      meant = f" (did you mean {near}?)" if near else ""
      raise UserError(
        f"--methods has {method}{meant}: choose of {', '.join(known)}"
      )
  if len(set(comparison.methods)) < len(comparison.methods):
    raise UserError(
      f"--methods is {','.join(comparison.methods)}: give each once"
    )
  if comparison.method != Config.method:
    raise UserError(
      f"--method {comparison.method} was given: a comparison has several, use "
      "--methods"
    )
  if comparison.distributed:
    raise UserError(
      "--distributed was given: methods are compared on one machine, leave it "
      "out"
    )
  base = {
    field.name: getattr(comparison, field.name)
    for field in dataclasses.fields(Config)
  }
  base |= {"with_solo": False, "quick": False}
  if comparison.seeds is None:
    base["seeds"] = (comparison.seed,)
  counted = all(base[name] is None for name in configs.MEMBERS)
  run_dir = comparison.run_dir or f"runs/{comparison.dataset}-comparison"
  found = {}
  for method in comparison.methods:
    own = {
      name: None
      for name, those in configs.METHODS_OF.items()
      if method not in those
    }
    own |= {"method": method, "run_dir": f"{run_dir}/{method}"}
    if method != "pcl":
      own["ramp_up"] = "exponential"
    if counted:
      own["peers"] = 1 if method == "ffsd" else _NETWORKS
    found[method] = configs.resolve(Config(**base | own))
  return found


def _main(defaults: Comparison, description: str, argv: Sequence[str]) -> None:
  comparison = cli.parse(defaults, description, argv[1:])
  runs = runs_of(comparison)
  console = cli.new_console()
  if comparison.plan:
    for config in runs.values():
      cli.print_plan(config, console)
    return
  timed = runs
  if "solo" not in runs:
    timed = runs | runs_of(dataclasses.replace(comparison, methods=("solo",)))
  (folder,) = {storage.path(c.run_dir).parent for c in runs.values()}
  with cli.started(next(iter(runs.values())), console) as stop:
    for config in runs.values():
      cli.check(config)
    with storage.locked(folder):
      _train(folder, runs, _costs(folder, timed, console), argv, console, stop)


def _train(
  folder: epath.Path,
  runs: Mapping[str, Config],
  costs: Mapping[str, Any],
  argv: Sequence[str],
  console: Console,
  stop: Any,
) -> None:
  from ekd_jax.report import comparison as report

  work = _Work(runs, costs, console)
  for method, config in runs.items():
    if not work.is_finished(method):
      cli.run(config, argv, console, stop, announce=work.begin)
    page = report.write(folder, list(runs), costs)
  console.print(report.table(report.summarize(folder, list(runs), costs)))
  console.print(f"report: {page}", highlight=False, soft_wrap=True)


def _costs(
  folder: epath.Path, runs: Mapping[str, Config], console: Console
) -> dict[str, Any]:
  """What a step of each method takes; measured once for a comparison."""
  from ekd_jax import run_directory
  from ekd_jax.training import planning

  path = folder / COSTS
  if path.is_file():
    known = run_directory.read_json(path)
    if set(runs) <= set(known):
      return known
  any_run = next(iter(runs.values()))
  if any_run.compilation_cache:
    cli.use_compilation_cache(console)
  console.print(
    f"timing a step of {', '.join(runs)}; each is compiled first",
    highlight=False,
  )
  measured = planning.step_costs(runs, cli.training_examples(any_run))
  costs = {
    method: {
      "networks": configs.network_count(runs[method]),
      "step_seconds": cost.seconds,
      "step_ratio": cost.seconds / measured["solo"].seconds,
      "step_bytes": cost.bytes,
    }
    for method, cost in measured.items()
  }
  with storage.failures_told(folder):
    run_directory.write_json(path, costs)
  return costs


class _Work:
  """What is still to be done, and how long that will take."""

  def __init__(
    self, runs: Mapping[str, Config], costs: Mapping[str, Any], console: Console
  ):
    self._costs = costs
    self._console = console
    self._count = sum(len(config.seeds) for config in runs.values())
    # Seconds that each run still takes, by the time of its step.
    self._expected = {
      (method, seed): self._left(config, seed)
      for method, config in runs.items()
      for seed in config.seeds
    }
    self._under_way = None
    self._done = self._taken = 0.0  # Seconds as expected, and in fact.
    self._started = 0.0

  def is_finished(self, method: str) -> bool:
    """Whether there is nothing left to train, for any seed."""
    left = [v for (name, _), v in self._expected.items() if name == method]
    return not any(left)

  def begin(self, run: Config) -> str:
    """Tells that a run begins; returns what its lines start with."""
    from ekd_jax.training.logs import duration

    now = time.monotonic()
    if self._under_way is not None:
      self._done += self._expected.pop(self._under_way)
      self._taken += now - self._started
    self._under_way, self._started = (run.method, run.seed), now
    left = sum(self._expected.values())
    if self._done:
      left *= self._taken / self._done
    number = self._count - sum(1 for v in self._expected.values() if v) + 1
    self._console.print(
      f"run {number} of {self._count}: {run.method}, seed {run.seed}; about "
      f"{duration(left)} left for all",
      highlight=False,
    )
    return f"{run.method} {number}/{self._count}"

  def _left(self, config: Config, seed: int) -> float:
    from ekd_jax import run_directory

    run_dir = run_directory.seed_directory(config.run_dir, seed)
    metrics = []
    if (run_dir / run_directory.CONFIG).is_file():
      metrics = run_directory.read_metrics(run_dir)
    done = max((m["epoch"] for m in metrics if m["kind"] == "test"), default=0)
    steps = cli.training_examples(config) // config.batch_size
    seconds = self._costs[config.method]["step_seconds"]
    return (config.epochs - done) * steps * seconds
