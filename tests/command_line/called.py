"""The command line as a user calls it."""

import shlex

import pytest

from ekd_jax import cli
from ekd_jax.config import Config

DEFAULTS = Config(dataset="cifar100", depth=110)
# Flags of a training that would be fine.
FINE = "--dataset digits --depth 8 --batch-size 32 --run-dir run "


def main(arguments, defaults=DEFAULTS):
  cli.main(defaults, "Trains.", ["train", *shlex.split(arguments)])


def error(capsys, call):
  """The one line that a mistake is answered with."""
  with pytest.raises(SystemExit) as caught:
    call()
  shown = capsys.readouterr()
  assert caught.value.code == 2
  assert shown.out == ""
  (line,) = shown.err.splitlines()
  assert line.startswith("error: ")
  return line
