"""An experiment in which a number goes bad: python broken_run.py STEP FLAGS...

Before STEP one number of student_1's first convolution becomes NaN, as a bit
that flips in memory would do it.
"""

import sys

import jax

from ekd_jax import cli
from ekd_jax.config import Config
from ekd_jax.training import loop

mapped = loop.parallel.per_device
broken_step = int(sys.argv[1])


def per_device(function, *arguments, **options):
  step = mapped(function, *arguments, **options)
  if function.__name__ != "train_step":
    return step

  def break_and_step(state, *given):
    number = int(loop.parallel.unreplicate(state["step"])) + 1
    if number == broken_step:
      state = jax.tree_util.tree_map_with_path(_broken, state)
    return step(state, *given)

  return break_and_step


def _broken(path, leaf):
  name = jax.tree_util.keystr(path, simple=True, separator="/")
  if name == "method/params/branches/student_1/stage_0_block_0/conv_0/kernel":
    return leaf.at[:, 0, 0, 0, 0].set(float("nan"))
  return leaf


loop.parallel.per_device = per_device
cli.main(Config(), "A run that goes wrong.", ["train", *sys.argv[2:]])
