"""Several processes, one training: the same numbers, one set of files.

Real processes with two devices each, talking over gloo on this machine.
"""

import shutil
import signal
import time

import numpy as np
import pytest

from ekd_jax import run_directory
from tests import runs


def _pair(folder, *more, script=runs.EXPERIMENT, count=2, port=None):
  """The processes of one training, each with a working directory of its own."""
  port = port or runs.free_port()
  processes = []
  for number in range(count):
    (folder / f"host_{number}").mkdir(parents=True, exist_ok=True)
    processes.append(
      runs.start(
        *(script if isinstance(script, list) else [script]),
        *runs.SMALL,
        *("--run-dir", "run", "--distributed", "--num-processes", count),
        *("--coordinator-address", f"localhost:{port}"),
        *("--process-id", number, "--join-timeout", "60", *more),
        cwd=folder / f"host_{number}",
        devices=2,
      )
    )
  return processes


def _ended(processes, seconds=120):
  """[(exit code, output, errors)] of processes that end by themselves."""
  found = []
  for process in processes:
    out, err = process.communicate(timeout=seconds)
    found.append((process.returncode, out, err))
  return found


def test_two_processes_train_what_one_does(tmp_path, trained):
  (first, said, _), (second, said_by_second, _) = _ended(_pair(tmp_path))
  assert (first, second) == (0, 0)
  runs.assert_close(tmp_path / "host_0" / "run", trained[4])
  # Only the first speaks and writes.
  assert "waiting for 2 processes" in said
  assert "student_1" in said
  lines = said_by_second.splitlines()
  assert [line for line in lines if not line.startswith("[Gloo]")] == [
    "waiting for 2 processes, at most 60 s",
    "process 1 of 2, 2 of 4 devices",
  ]
  assert list((tmp_path / "host_1").iterdir()) == []
  (start,) = run_directory.read_json(
    tmp_path / "host_0" / "run" / "environment.json"
  )["starts"]
  assert (start["processes"], len(start["devices"])) == (2, 4)


@pytest.mark.slow
def test_a_run_moves_between_one_process_and_two(tmp_path, trained):
  # Four devices of one process, killed; two processes, one of them stopped;
  # one device.
  killed = runs.start(
    runs.KILLED_RUN, 3, *runs.SMALL, "--run-dir", "run",
    "--checkpoint-minutes", "1e-9", cwd=tmp_path, devices=4,
  )  # fmt: skip
  runs.finish(killed, code=runs.KILLED)
  shutil.move(tmp_path / "run", tmp_path / "host_0" / "run")
  slow = [str(runs.ROOT / "tests" / "slow_run.py")]
  processes = _pair(tmp_path, script=slow)
  metrics = tmp_path / "host_0" / "run" / "metrics.jsonl"
  before = metrics.read_bytes().count(b"\n")
  while metrics.read_bytes().count(b"\n") <= before:
    assert all(process.poll() is None for process in processes)
    time.sleep(0.01)
  processes[1].send_signal(signal.SIGTERM)
  (first, said, err), (second, _, err_of_second) = _ended(processes)
  assert (first, second) == (143, 143), err + err_of_second
  assert "resuming at step" in said
  assert "stopped by SIGTERM" in err
  again = runs.start(
    runs.EXPERIMENT, *runs.SMALL, "--run-dir", "run",
    cwd=tmp_path / "host_0", devices=1,
  )  # fmt: skip
  assert "resuming at step" in runs.finish(again)
  runs.assert_close(tmp_path / "host_0" / "run", trained[4])


@pytest.mark.parametrize("lost", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_when_one_process_is_killed_the_others_end_and_the_run_resumes(
  lost, tmp_path, trained
):
  slow = [str(runs.ROOT / "tests" / "slow_run.py")]
  processes = _pair(tmp_path, "--checkpoint-minutes", "1e-9", script=slow)
  checkpoints = tmp_path / "host_0" / "run" / "checkpoints"
  while not (checkpoints / "2").exists():
    assert all(process.poll() is None for process in processes)
    time.sleep(0.01)
  processes[lost].kill()
  ended = _ended(processes)
  code, _, err = ended[1 - lost]
  # Whoever notices first: a collective, or JAX's heartbeat, which aborts.
  if code == 4:
    assert "error: another process of this run has ended" in err
    assert "Traceback" not in err
  else:
    assert code == -signal.SIGABRT, err
    assert "another task died" in err
  shown = runs.finish(_pair(tmp_path)[0])
  assert "resuming at step" in shown
  runs.assert_close(tmp_path / "host_0" / "run", trained[4])


@pytest.mark.parametrize("number", [0, 1])
def test_waiting_for_the_others_ends_with_advice(number, tmp_path):
  process = runs.start(
    runs.EXPERIMENT, *runs.SMALL, "--run-dir", "run", "--distributed",
    "--num-processes", 2, "--process-id", number, "--join-timeout", 3,
    "--coordinator-address", f"localhost:{runs.free_port()}", cwd=tmp_path,
  )  # fmt: skip
  ((code, said, err),) = _ended([process])
  assert code == 2, err
  assert said == "waiting for 2 processes, at most 3 s\n"
  (line,) = err.splitlines()
  assert line.startswith("error: --distributed: not all processes came")
  assert "--process-id" in line
  assert list(tmp_path.iterdir()) == []


def test_what_the_first_process_refuses_ends_all(tmp_path):
  (tmp_path / "host_0").mkdir()
  (tmp_path / "host_0" / "run").write_text("")
  ended = _ended(_pair(tmp_path))
  lines = {err.splitlines()[-1] for _, _, err in ended}
  assert [code for code, _, _ in ended] == [2, 2]
  (line,) = lines
  assert line.startswith("error: --run-dir ")
  assert "is a file" in line


def test_a_run_in_one_process_needs_none_of_it():
  from ekd_jax.training import hosts

  tree = {"x": np.float32([-0.0, np.nan])}
  assert hosts.is_first()
  assert hosts.from_first(lambda: {"a": [1]}) == {"a": [1]}
  assert hosts.arrays_from_first(tree) is tree
