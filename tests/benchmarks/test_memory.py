"""Peaks and their ratios."""

import mmap
import sys

import numpy as np
import pytest

import memory


def test_ratios_are_ours_over_theirs():
  record = memory.record(
    "resnet20x1",
    1,
    {"peak_bytes": 300, "step_peak_bytes": 100, "temp_bytes": 7},
    {"peak_bytes": 200, "step_peak_bytes": 400},
  )
  assert record == {
    "case": "resnet20x1",
    "members": 1,
    "a": "ekd",
    "b": "eager",
    "temp_bytes": 7,
    "peak_bytes_a": 300,
    "peak_bytes_b": 200,
    "step_peak_bytes_a": 100,
    "step_peak_bytes_b": 400,
    "peak_ratio": 1.5,
    "step_peak_ratio": 0.25,
  }


def test_members_are_added_one_by_one():
  widths = [config.widths for config in memory.cases("resnet20").values()]
  assert widths == [
    (1.0,),
    (1.0, 0.8),
    (1.0, 0.8, 0.6),
    (1.0, 0.8, 0.6, 0.4),
    (1.0, 0.8, 0.6, 0.4, 0.2),
  ]


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_the_peak_of_the_steps_is_theirs_alone():
  large, small = 2**28, 2**26
  sizes = iter([large, small])

  def train(steps):
    del steps
    # Not by malloc, which may still have what an earlier test has freed.
    with mmap.mmap(-1, next(sizes)) as memory:
      np.frombuffer(memory, np.uint8)[:] = 1

  found = memory.resident(train, 1)
  assert found["peak_bytes"] - found["step_peak_bytes"] > (large - small) / 2
