"""Signals: when a process may be left at once, and when it saves first."""

import itertools
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from ekd_jax import build, run_directory
from ekd_jax.errors import Stopped
from ekd_jax.training import loop, starting, stopping
from ekd_jax.training.checkpoint import Checkpoints
from ekd_jax.training.logs import ConsoleLog, MetricsLog
from ekd_jax.training.stopping import StopRequest
from tests import runs, tiny

STEPS = 2 * tiny.STEPS_PER_EPOCH
NUMBERS = pytest.mark.parametrize("number", stopping.SIGNALS)


@NUMBERS
def test_a_signal_ends_what_needs_no_saving_at_once(number):
  with pytest.raises(Stopped) as caught, StopRequest():
    os.kill(os.getpid(), number)
    time.sleep(5)
    pytest.fail("went on")
  assert caught.value.exit_code == 128 + number
  assert number.name in str(caught.value)
  assert "\n" not in str(caught.value)


@NUMBERS
def test_a_signal_waits_for_what_does(number):
  with StopRequest() as stop:
    stop.saved = False
    os.kill(os.getpid(), number)
    time.sleep(0.01)
    assert stop.signal == number
    with pytest.raises(Stopped):
      stop.check()


def test_without_a_signal_nothing_happens():
  before = [signal.getsignal(number) for number in stopping.SIGNALS]
  with StopRequest() as stop:
    stop.check()
    assert stop.signal is None
    assert [signal.getsignal(n) for n in stopping.SIGNALS] != before
  assert [signal.getsignal(number) for number in stopping.SIGNALS] == before


IN_C = """
import ctypes, signal, sys, threading
from ekd_jax.training import stopping
usleep = ctypes.CDLL(None).usleep
asleep = threading.Event()
def tell():
  asleep.wait()
  print("in C", flush=True)
threading.Thread(target=tell, daemon=True).start()
with stopping.StopRequest() as stop:
  stop.saved = sys.argv[1] == "saved"
  stop.last_words = lambda: print("last words", flush=True)
  # A call that holds no lock of Python's and that no handler interrupts, as
  # XLA's compiler: usleep would return, so another thread gets the signal.
  if sys.argv[1] == "saved":
    signal.pthread_sigmask(signal.SIG_BLOCK, stopping.SIGNALS)
  # This thread keeps Python's lock until it sleeps: only then is it told.
  sys.setswitchinterval(1000)
  asleep.set()
  while usleep(60_000_000) or True:
    pass
"""


def _in_c(state):
  process = subprocess.Popen(
    [sys.executable, "-c", IN_C, state],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    env=os.environ | {"PYTHONPATH": str(runs.ROOT)},
  )
  assert process.stdout.readline() == "in C\n"
  return process


def test_a_process_that_is_deep_in_c_is_left_all_the_same():
  process = _in_c("saved")
  process.send_signal(signal.SIGTERM)
  out, err = process.communicate(timeout=30)
  assert process.returncode == 128 + signal.SIGTERM
  assert out == "last words\n"
  (line,) = err.splitlines()[-1:]
  assert line.startswith("stopped by SIGTERM")


def test_the_second_signal_leaves_at_once_whatever_is_not_saved():
  process = _in_c("unsaved")
  process.send_signal(signal.SIGINT)
  time.sleep(0.5)
  assert process.poll() is None
  process.send_signal(signal.SIGINT)
  _, err = process.communicate(timeout=10)
  assert process.returncode == 128 + signal.SIGINT
  assert err.startswith("stopped by SIGINT")


# In a training, of the tiny method.


@pytest.fixture
def tiny_method(monkeypatch):
  monkeypatch.setattr(build, "method", tiny.method)


def _signal_at(monkeypatch, owner, name, call):
  """SIGTERM comes just before the `call`-th call of owner.name."""
  original = getattr(owner, name)
  calls = itertools.count(1)

  def method(*args, **options):
    if next(calls) == call:
      os.kill(os.getpid(), signal.SIGTERM)
    return original(*args, **options)

  monkeypatch.setattr(owner, name, method)


@pytest.mark.parametrize(
  ("owner", "name", "call", "saved"),
  [
    # Within a step: it is finished, logged and saved.
    (ConsoleLog, "step", 1, 1),
    (ConsoleLog, "step", 4, 4),
    # At an epoch's last step: saved, not evaluated.
    (ConsoleLog, "step", 3, 3),
    (ConsoleLog, "step", 6, 6),
    # While a checkpoint is begun: that one is it.
    (Checkpoints, "save", 1, 3),
    # During evaluation.
    (MetricsLog, "write", 5, 3),
    (MetricsLog, "write", 10, 6),
    # Before there is anything: while it is prepared, while it compiles.
    (starting, "init_state", 1, None),
    (loop, "make_train_step", 1, None),
  ],
)
def test_a_run_stopped_anywhere_ends_like_an_unbroken_one(
  owner, name, call, saved, tmp_path, monkeypatch, tiny_method
):
  config = tiny.config(tmp_path / "run")
  with monkeypatch.context() as patch, pytest.raises(Stopped) as caught:
    _signal_at(patch, owner, name, call)
    with StopRequest() as stop:
      tiny.train(config, stop)
  assert caught.value.exit_code == 143
  with Checkpoints(tmp_path / "run", read_only=True) as checkpoints:
    assert checkpoints.latest_step() == saved
  tiny.train(config)
  run_directory.write_summary(tmp_path / "run")
  tiny.train(tiny.config(tmp_path / "unbroken"))
  run_directory.write_summary(tmp_path / "unbroken")
  runs.assert_same_result(tmp_path / "run", tmp_path / "unbroken")


# Whole processes.


def _started(folder, *more):
  return runs.start(
    runs.EXPERIMENT, *runs.SMALL, "--epochs", "300", "--run-dir", "run", *more,
    cwd=folder, devices=1,
  )  # fmt: skip


def _wait_for(condition, seconds=120):
  deadline = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < deadline, "it did not come to that"
    time.sleep(0.01)


@pytest.mark.parametrize(
  ("number", "code"), [("SIGINT", 130), ("SIGTERM", 143)]
)
def test_a_real_run_is_stopped_and_goes_on(number, code, tmp_path):
  process = _started(tmp_path)
  metrics = tmp_path / "run" / "metrics.jsonl"
  _wait_for(lambda: metrics.exists() and metrics.stat().st_size > 2000)
  process.send_signal(signal.Signals[number])
  out, err = process.communicate(timeout=60)
  assert process.returncode == code, err
  assert err == (
    f"stopped by {number}: the same command goes on from the last checkpoint\n"
  )
  with Checkpoints(tmp_path / "run", read_only=True) as checkpoints:
    saved = checkpoints.latest_step()
  steps = [
    line["step"]
    for line in run_directory.read_metrics(tmp_path / "run")
    if line["kind"] == "step"
  ]
  # Nothing that was done is lost, and nothing more was done.
  assert steps == list(range(1, saved + 1))


@pytest.mark.slow
def test_a_real_run_is_stopped_while_xla_compiles(tmp_path):
  # ResNet-56, fully optimised and with an empty cache: a minute.
  process = runs.start(
    runs.EXPERIMENT, *runs.SMALL, "--depth", "56", "--run-dir", "run",
    cwd=tmp_path, devices=1, optimized=True,
    variables={"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")},
  )  # fmt: skip
  for line in process.stdout:
    if "compiling, about" in line:
      break
  # Tracing, which is Python, takes about as long.
  time.sleep(8)
  process.send_signal(signal.SIGTERM)
  _, err = process.communicate(timeout=20)
  assert process.returncode == 143, err
  assert err.splitlines()[-1].startswith("stopped by SIGTERM")
  assert not list(pathlib.Path(tmp_path, "run", "checkpoints").iterdir())
