"""Seconds per training step: ours against PyTorch, and method by method.

    python benchmarks/train_step.py --check

trains ResNet-20 with five members on batches of 128 random images, and
ResNet-110 with four on batches of 64, and compares our `ekd` step with

    eager, channels_last, compile   the same step in PyTorch, in three forms
                                    (compile needs a C++ compiler)
    solo_each                       the members' own solo steps, one member
                                    after the other: the sum of their times
    solo, dml                       our other methods, all members in one step

in paired runs, see timing.py. --check first makes sure that both do the same
arithmetic, see check.py. Leave the machine alone meanwhile.
"""

import functools
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import tyro
from rich.console import Console

import check
import command_line
import timing
import workload
from ekd_jax.config import Config
from ekd_jax.errors import UserError

# The slowest thing that works, torch.compile for ResNet-110, takes half of it.
# PyTorch 2.15 never comes back from a gradient with channels last on processors
# that have AVX2 and not AVX-512.
PATIENCE_SECONDS = 400

EXIT_CHECK_FAILED = 1

PYTORCH_FORMS = ("eager", "channels_last", "compile")
OPPONENTS = (*PYTORCH_FORMS, "solo_each", "solo", "dml")


@dataclass(frozen=True)
class Options(workload.TrainingFlags):
  """Times our training step against others, in paired runs."""

  # What is trained.
  case: Literal["resnet20x5", "resnet110x4", "all"] = "all"

  # What our ekd step is compared with: a comma-separated list.
  against: Annotated[str, tyro.conf.arg(metavar="X,X,...")] = ",".join(
    OPPONENTS
  )

  # How often both run in a comparison.
  pairs: int = 9

  # Training steps of each run.
  steps: int = 3

  # First compare losses and gradients with PyTorch's; stop if they differ.
  check: bool = False

  # Where the records are written.
  json: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None


def run(options: Options, console: Console) -> None:
  """Measures what the options ask for; exits if the check fails.

  Raises:
    UserError: an option that cannot be used, or PyTorch is missing.
  """
  opponents = _opponents(options)
  command_line.require_at_least_one(options, "pairs", "steps")
  if options.check or not set(opponents).isdisjoint(PYTORCH_FORMS):
    workload.require_pytorch("benchmarks/train_step.py")
  timing.write_json(options.json, [])
  names = list(workload.CASES) if options.case == "all" else [options.case]
  cases = {
    name: workload.config(
      name,
      **options.settings(),
    )
    for name in names
  }
  if options.check:
    check_cases(cases, console)
  records, skipped = [], []
  for case, config in cases.items():
    command_line.say(console, f"{case}: preparing ekd")
    with timing.worker(timing.timed(_prepare("ekd", config))) as ekd:
      for opponent in opponents:
        if opponent == "compile" and workload.compiler() is None:
          skipped.append((case, "ekd", opponent, "no compiler"))
          continue
        command_line.say(console, f"{case}: preparing {opponent}")
        try:
          with timing.worker(
            timing.timed(_prepare(opponent, config)), patience=PATIENCE_SECONDS
          ) as other:
            pairs = timing.alternate(
              ekd, other, pairs=options.pairs, steps=options.steps
            )
        except timing.WorkerError as error:
          if opponent != "compile" and not isinstance(
            error, timing.PatienceError
          ):
            raise
          # Whether it works depends on more than a compiler.
          reason = str(error).splitlines()[0]
          skipped.append((case, "ekd", opponent, reason))
          continue
        records.append(timing.record(case, "ekd", opponent, pairs))
        timing.write_json(options.json, records)
  console.print(timing.comparisons_table(records, skipped))


def check_cases(cases: Mapping[str, Config], console: Console) -> None:
  """Prints how far both implementations agree; exits if they do not."""
  failed = []
  for case, config in cases.items():
    command_line.say(console, f"{case}: checking one step against PyTorch")
    findings = check.run(config)
    console.print(check.table(case, findings))
    failed += [
      f"{case} {f.quantity} ({f.ours.worst:.1e} at {f.where})"
      for f in findings
      if not f.agrees
    ]
  if failed:
    print(
      f"error: the two steps are not the same: {', '.join(failed)}",
      file=sys.stderr,
    )
    sys.exit(EXIT_CHECK_FAILED)


def _opponents(options: Options) -> list[str]:
  given = options.against.split(",")
  for word in given:
    if word not in OPPONENTS:
      raise UserError(
        f"--against {word} is not possible: choose of {','.join(OPPONENTS)}"
      )
  return given


def _prepare(who: str, config: Config) -> functools.partial:
  """What a process must call to be able to run steps of `who`."""
  if who in PYTORCH_FORMS:
    channels = workload.stage_channels(config)
    return functools.partial(workload.pytorch, config, channels, who)
  if who == "solo_each":
    return functools.partial(workload.product_alone, config)
  return functools.partial(workload.product, replace(config, method=who))


if __name__ == "__main__":
  command_line.main(Options, run)
