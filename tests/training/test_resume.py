"""Real runs, killed for real and resumed, in processes of their own."""

import json
import shutil

import pytest

from ekd_jax import run_directory
from tests import runs

STEPS = 6


@pytest.fixture(scope="module")
def resumed(tmp_path_factory, trained):
  """{devices: run killed in its second epoch, then resumed}.

  "moved" was killed on four devices and resumed on one.
  """
  folder = tmp_path_factory.mktemp("resumed")

  def start(script, devices, run_dir, *arguments):
    return runs.start(
      script, *arguments, *runs.SMALL, "--run-dir", run_dir,
      cwd=folder, devices=devices,
    )  # fmt: skip

  killed = [
    start(
      runs.KILLED_RUN, n, f"on_{n}", STEPS, "--checkpoint-minutes", "1e-9",
    )
    for n in (1, 4)
  ]  # fmt: skip
  for process in killed:
    runs.finish(process, code=runs.KILLED)
  shutil.copytree(folder / "on_4", folder / "moved")
  again = {
    name: start(runs.EXPERIMENT, devices, name)
    for name, devices in [("on_1", 1), ("on_4", 4), ("moved", 1)]
  }
  shown = {name: runs.finish(process) for name, process in again.items()}
  return {name: (folder / name, shown[name]) for name in again}


@pytest.mark.parametrize("devices", [1, 4])
def test_a_real_run_killed_within_an_epoch_ends_like_an_unbroken_one(
  devices, resumed, trained
):
  run_dir, shown = resumed[f"on_{devices}"]
  # Saved after every step; the last save before the kill may be lost.
  assert "resuming at step 5 of 6" in shown or (
    "resuming at step 4 of 6" in shown
  )
  starts = run_directory.read_json(run_dir / "environment.json")["starts"]
  assert [len(start["devices"]) for start in starts] == 2 * [devices]
  runs.assert_same_result(run_dir, trained[devices])


def test_a_real_run_goes_on_on_fewer_devices(resumed, trained):
  run_dir, shown = resumed["moved"]
  assert "resuming at step" in shown
  starts = run_directory.read_json(run_dir / "environment.json")["starts"]
  assert [len(start["devices"]) for start in starts] == [4, 1]
  runs.assert_close(run_dir, trained[4])


def test_a_real_run_is_the_same_on_one_device_and_on_four(trained):
  runs.assert_close(trained[1], trained[4])


def test_json_lines_hold_no_bare_nan(trained):
  for line in (trained[4] / "metrics.jsonl").read_text().splitlines():
    json.loads(line, parse_constant=lambda name: pytest.fail(name))


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 8])
def test_a_real_run_is_the_same_on_other_numbers_of_devices(
  devices, tmp_path, trained
):
  runs.python(
    *(runs.EXPERIMENT, *runs.SMALL, "--run-dir", "run"),
    cwd=tmp_path,
    devices=devices,
  )
  runs.assert_close(tmp_path / "run", trained[1])
