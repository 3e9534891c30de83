"""A real run among real faults: a full disk, a busy directory, kills.

The kills of `benchmarks/faults.py`, fewer of them; what single modules do about
faults is tested beside them.
"""

import dataclasses
import shutil
import time

import jax
import numpy as np
import pytest
from rich.console import Console

import faults
from ekd_jax import build, run_directory
from ekd_jax.training.checkpoint import Checkpoints
from ekd_jax.training.logs import ConsoleLog
from tests import runs, tiny

STEPS = 6
RESUMED = "resuming at step"


def test_a_run_that_is_killed_three_times_ends_as_if_nobody_had(
  capsys, monkeypatch
):
  # What runs.start sets, too: compiling is most of a short run.
  monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
  monkeypatch.setenv("XLA_FLAGS", runs.QUICK_TO_COMPILE)
  faults.run(faults.Options(kills=3, seed=1), Console(width=120))
  assert "3 kills in" in capsys.readouterr().out


def test_a_difference_would_be_found(trained, tmp_path):
  # That the test above can fail.
  assert faults.compare(trained[1], trained[1]) == []
  changed = tmp_path / "run"
  shutil.copytree(trained[1], changed)
  metrics = changed / "metrics.jsonl"
  lines = metrics.read_bytes().splitlines(keepends=True)
  metrics.write_bytes(b"".join(lines[:1] + lines))
  target = build.abstract_state(run_directory.load_config(changed))
  with Checkpoints(changed) as checkpoints:
    restored = checkpoints.restore(target)
    # Half of the last bit of one number.
    stem = restored.state["method"]["params"]["stem"]
    leaf = jax.tree.leaves(stem)[0]
    leaf.flat[0] = np.nextafter(leaf.flat[0], np.float32(np.inf))
    shutil.rmtree(changed / "checkpoints" / str(STEPS))
  with Checkpoints(changed) as checkpoints:
    checkpoints.save(STEPS, restored.state, restored.progress)
  found = faults.compare(trained[1], changed)
  assert len(found) == 3
  assert "metrics.jsonl differs" in found[0]
  assert "steps twice or missing" in found[1]
  assert "stem" in found[2]


# Disk full: a limit to the size of files, which needs no privileges, and the
# system tells of it in the same way.


def _limited(folder, kilobytes, *more):
  """Starts a run that may not write files larger than this."""
  code = f"""
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, 2 * ({kilobytes * 1024},))
sys.argv = {["train", *runs.SMALL, "--run-dir", "run", *more]!r}
from ekd_jax import cli
from ekd_jax.config import Config
cli.main(Config(), "With little room.")
"""
  return runs.start("-c", code, cwd=folder, devices=1)


def test_a_full_disk_is_told_in_one_line_and_costs_nothing(tmp_path, trained):
  run_dir = tmp_path / "run"
  # As far as the first epoch, with room; then without.
  shutil.copytree(trained[1], run_dir)
  shutil.rmtree(run_dir / "checkpoints" / str(STEPS))
  before = runs.contents(run_dir / "checkpoints" / "3")
  assert before
  ended = _limited(tmp_path, 20, "--no-compilation-cache")
  _, err = ended.communicate()
  assert ended.returncode == 2, err
  (line,) = err.splitlines()
  assert line.startswith(f"error: {run_dir} cannot be written to: ")
  assert "larger than is allowed" in line
  assert runs.contents(run_dir / "checkpoints" / "3") == before
  # With room again it goes on and ends like every other.
  again = runs.start(
    runs.EXPERIMENT, *runs.SMALL, "--run-dir", "run", cwd=tmp_path, devices=1
  )
  assert RESUMED in runs.finish(again)
  runs.assert_same_result(run_dir, trained[1])


def test_a_number_that_goes_bad_in_one_member_is_named(tmp_path):
  process = runs.start(
    runs.ROOT / "tests" / "broken_run.py", 5, *runs.SMALL, "--run-dir", "run",
    cwd=tmp_path, devices=1,
  )  # fmt: skip
  _, err = process.communicate()
  assert process.returncode == 3
  (line,) = err.splitlines()
  # Its own terms come first; the ensemble takes the others along.
  assert line.startswith("error: step 5: label/student_1 = nan, ")
  assert "the checkpoint of step 3 is kept" in line
  steps = [
    metrics["step"]
    for metrics in run_directory.read_metrics(tmp_path / "run")
    if metrics["kind"] == "step"
  ]
  assert steps == [1, 2, 3, 4]
  assert np.isfinite(
    jax.tree.leaves(runs.final_state(tmp_path / "run")[0])[0]
  ).all()


def test_a_second_process_on_one_directory_is_refused(tmp_path):
  first = runs.start(
    runs.EXPERIMENT, *runs.SMALL, "--run-dir", "run", cwd=tmp_path, devices=1
  )
  while not (tmp_path / "run" / "config.json").exists():
    assert first.poll() is None
    time.sleep(0.01)
  second = runs.start(
    runs.EXPERIMENT, *runs.SMALL, "--run-dir", "run", cwd=tmp_path, devices=1
  )
  _, err = second.communicate()
  assert second.returncode == 2
  (line,) = err.splitlines()
  assert f"is in use by process {first.pid} on " in line
  runs.finish(first)


# Where and when a run goes on, in this process and with the tiny method.


@pytest.fixture
def stopped(tmp_path, monkeypatch):
  """Begins a run in "run" and stops it in its fifth step of six."""
  monkeypatch.setattr(build, "method", tiny.method)

  class Stop(Exception):
    pass

  show_step = ConsoleLog.step

  def step(self, **shown):
    show_step(self, **shown)
    if shown["step"] == 5:
      raise Stop

  with monkeypatch.context() as patch, pytest.raises(Stop):
    patch.setattr(ConsoleLog, "step", step)
    tiny.train(tiny.config(tmp_path / "run"))


def _assert_ends_like_an_unbroken_one(run_dir, folder):
  tiny.train(tiny.config(folder / "unbroken"))
  for path in (run_dir, folder / "unbroken"):
    run_directory.write_summary(path)
  runs.assert_same_result(run_dir, folder / "unbroken")


def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(build, "method", tiny.method)
  run_dir = tmp_path / "run"
  tiny.train(tiny.config(run_dir))
  for path in (run_dir / "checkpoints" / str(STEPS)).rglob("*"):
    if path.is_file() and path.stat().st_size > 1000:
      path.write_bytes(path.read_bytes()[:-100])
  shown = tiny.train(tiny.config(run_dir))
  assert f"the checkpoint of step {STEPS} is damaged" in shown
  assert "going on from the one before: 3 steps are made again" in shown
  assert f"{RESUMED} 3 of {STEPS}" in shown
  _assert_ends_like_an_unbroken_one(run_dir, tmp_path)
  assert (run_dir / "damaged_checkpoints" / str(STEPS)).is_dir()


def test_a_run_directory_may_be_moved_and_named_from_elsewhere(
  tmp_path, monkeypatch, stopped
):
  (tmp_path / "elsewhere").mkdir()
  shutil.move(tmp_path / "run", tmp_path / "elsewhere" / "second")
  (tmp_path / "here").mkdir()
  monkeypatch.chdir(tmp_path / "here")
  shown = tiny.train(tiny.config("../elsewhere/second"))
  assert RESUMED in shown
  _assert_ends_like_an_unbroken_one(tmp_path / "elsewhere/second", tmp_path)
  assert list((tmp_path / "here").iterdir()) == []


def test_a_clock_that_goes_backwards_changes_nothing(
  tmp_path, monkeypatch, stopped
):
  really = time.time
  with monkeypatch.context() as patch:
    patch.setattr(time, "time", lambda: really() - 400 * 24 * 3600)
    shown = tiny.train(tiny.config(tmp_path / "run"))
  assert RESUMED in shown
  _assert_ends_like_an_unbroken_one(tmp_path / "run", tmp_path)


# The same again tomorrow.


# Slow, because every comparison of a resumed run with `trained` is of two runs
# of one command too.
@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 4])
def test_the_same_command_gives_the_same_bits(devices, tmp_path, trained):
  again = runs.start(
    runs.EXPERIMENT, *runs.SMALL, "--run-dir", "run", cwd=tmp_path,
    devices=devices,
  )  # fmt: skip
  runs.finish(again)
  runs.assert_same_result(tmp_path / "run", trained[devices])


@pytest.mark.slow
def test_twenty_kills(monkeypatch):
  faults.run(dataclasses.replace(faults.Options(), kills=20), Console())
