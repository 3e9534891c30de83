"""Real runs of FFL, PCL and FFSD: killed and resumed, on one device and more.

What such a method keeps besides parameters and momentum (mean teachers, Adam's
moments, its step) must come back from a checkpoint, to the bit.
"""

import shlex

import pytest

from tests import runs

METHODS = {
  "ffl": "--peers 2",
  "pcl": "--peers 2 --views 2",
  "ffsd": "--common-students 2",
}


def _start(method, name, folder, *arguments, script=runs.EXPERIMENT, devices=1):
  return runs.start(
    script, *arguments, *runs.SMALL[:4], *runs.SMALL[6:],
    *("--method", method, *shlex.split(METHODS[method])),
    *("--run-dir", name), cwd=folder, devices=devices,
  )  # fmt: skip


@pytest.fixture(scope="module", params=METHODS)
def unbroken(request, tmp_path_factory):
  """(method, folder with its run "whole", of one device)."""
  folder = tmp_path_factory.mktemp(request.param)
  runs.finish(_start(request.param, "whole", folder))
  return request.param, folder


def test_a_killed_run_ends_like_an_unbroken_one(unbroken):
  method, folder = unbroken
  killed = _start(
    method, "killed", folder, "4", "--checkpoint-minutes", "1e-9",
    script=runs.KILLED_RUN,
  )  # fmt: skip
  runs.finish(killed, code=runs.KILLED)
  said = runs.finish(_start(method, "killed", folder))
  # The last save before the kill may be lost.
  assert "resuming at step 3 of 6" in said or "resuming at step 2 of 6" in said
  runs.assert_same_result(folder / "killed", folder / "whole")


@pytest.mark.slow
def test_four_devices_train_what_one_does(unbroken):
  method, folder = unbroken
  runs.finish(_start(method, "on_4", folder, devices=4))
  runs.assert_close(folder / "on_4", folder / "whole", tolerance=1e-4)
