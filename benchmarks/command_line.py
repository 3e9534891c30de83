"""What the benchmarks' command lines have in common."""

import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import tyro
from rich.console import Console

from ekd_jax import cli, ending
from ekd_jax import config as configs
from ekd_jax.errors import UserError

Options = TypeVar("Options")


def main(
  options_type: type[Options],
  run: Callable[[Options, Console], None],
  arguments: Sequence[str] | None = None,
) -> None:
  """Parses the arguments and runs; a `UserError` is one line and exit code 2.

  Args:
    options_type: a dataclass; its comments are the help texts.
    run: (options, console) -> None.
    arguments: those of the process by default.
  """
  # A pipe has no width; folding columns at 80 would break numbers.
  console = Console() if sys.stdout.isatty() else Console(width=120)

  def parse_and_run() -> None:
    with cli.mistakes_in_one_line(options_type):
      options = tyro.cli(
        options_type,
        args=arguments,
        config=(tyro.conf.FlagCreatePairsOff,),
      )
    run(options, console)

  ending.exit_on_user_error(parse_and_run)


def require_at_least_one(options: Any, *names: str) -> None:
  """Refuses counts that leave nothing to measure.

  Raises:
    UserError: naming the option.
  """
  for name in names:
    if getattr(options, name) < 1:
      raise UserError(
        f"{configs.flag(name)} is {getattr(options, name)}: at least 1"
      )


def say(console: Console, line: str) -> None:
  """Tells what takes so long."""
  console.print(line, style="dim", highlight=False, soft_wrap=True)
