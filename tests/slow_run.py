"""An experiment that rests after every step: python slow_run.py FLAGS...

A test can then meet it in a certain step.
"""

import sys
import time

from ekd_jax import cli
from ekd_jax.config import Config
from ekd_jax.training import loop

mapped = loop.parallel.per_device


def per_device(function, *arguments, **options):
  step = mapped(function, *arguments, **options)
  if function.__name__ != "train_step":
    return step

  def rest_and_step(*given):
    time.sleep(0.5)
    return step(*given)

  return rest_and_step


loop.parallel.per_device = per_device
cli.main(Config(), "A run that takes its time.", ["train", *sys.argv[1:]])
