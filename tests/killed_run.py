"""An experiment that kills itself: python killed_run.py STEP FLAGS...

The kill comes when the metrics of STEP have been written and before its
checkpoint is, as a power cut would: nothing is closed, nothing is waited for.
"""

import os
import signal
import sys

from ekd_jax import cli
from ekd_jax.config import Config
from ekd_jax.training.logs import ConsoleLog

show_step = ConsoleLog.step


def step(self, **shown):
  show_step(self, **shown)
  if shown["step"] == int(sys.argv[1]):
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":  # Processes that read images import this file too.
  ConsoleLog.step = step
  cli.main(Config(), "A run that is killed.", ["train", *sys.argv[2:]])
