"""Turns, ratios and processes; no test asserts a time."""

import functools
import json
import os
import time

import pytest

import timing
from ekd_jax.errors import UserError
from timing import Pair, Turn


@pytest.fixture
def no_pause(monkeypatch):
  monkeypatch.setattr(timing, "PAUSE_SECONDS", 0)


def _program(log, name, seconds, idle_use=0.0):
  """A program of known speed that may work while it waits."""
  used = 0.0
  waiting = False

  def turn(steps):
    nonlocal used, waiting
    if steps:
      log.append((name, steps))
    elif waiting:
      used += idle_use
    waiting = not steps
    return Turn(seconds if steps else 0.0, used)

  return turn


def test_programs_take_turns(no_pause):
  log = []
  a, b = _program(log, "a", 2.0), _program(log, "b", 4.0)
  pairs = timing.alternate(a, b, pairs=3, steps=5)
  assert pairs == [Pair(2.0, 4.0)] * 3
  assert log == [("a", 5), ("b", 5)] * 3


def test_any_number_of_programs_takes_turns(no_pause):
  log = []
  programs = [_program(log, name, s) for s, name in enumerate("abc", 1)]
  assert timing.rounds(programs, count=2, steps=5) == [[1, 2, 3]] * 2
  assert log == [("a", 5), ("b", 5), ("c", 5)] * 2


def test_a_program_that_works_while_it_waits_voids_the_comparison(no_pause):
  a = _program([], "a", 2.0)
  b = _program([], "b", 4.0, idle_use=0.5)
  with pytest.raises(timing.WorkerError, match="used 0.50 s .* void"):
    timing.alternate(a, b, pairs=3, steps=5)


def test_ratios_are_of_pairs_not_of_medians():
  # The medians are 3 and 2, their ratio 1.5 is that of no pair.
  pairs = [Pair(1.0, 2.0), Pair(3.0, 1.0), Pair(4.0, 5.0)]
  assert timing.record("case", "ekd", "eager", pairs) == {
    "case": "case",
    "a": "ekd",
    "b": "eager",
    "seconds_a": 3.0,
    "seconds_b": 2.0,
    "ratio_median": 0.8,
    "ratio_min": 0.5,
    "ratio_max": 3.0,
    "pairs": 3,
  }


def test_a_worker_is_another_process_that_keeps_its_state():
  with timing.worker(functools.partial(_counter, 10)) as call:
    assert [call(1)[0], call(2)[0]] == [11, 13]
    assert call(0)[1] != os.getpid()


def test_what_a_worker_raises_is_raised_here():
  with pytest.raises(timing.WorkerError, match="^ZeroDivisionError: "):
    timing.in_worker(divmod, 1, 0)


def test_a_worker_that_does_not_get_ready_is_killed():
  sleep = functools.partial(time.sleep, 600)
  with (
    pytest.raises(timing.PatienceError, match="not ready after 0 s"),
    timing.worker(sleep, patience=0.1),
  ):
    pytest.fail("was ready")


def test_the_end_of_a_worker_is_noticed():
  with pytest.raises(timing.WorkerError, match="ended with exit code 3"):
    timing.in_worker(os._exit, 3)


def test_records_are_json(tmp_path):
  timing.write_json(str(tmp_path / "x.json"), [{"case": "a", "ratio": 0.5}])
  written = json.loads((tmp_path / "x.json").read_text())
  assert written == [{"case": "a", "ratio": 0.5}]
  with pytest.raises(UserError, match="--json .*: No such file or directory"):
    timing.write_json(str(tmp_path / "nowhere" / "x.json"), [])


def _counter(start):
  def add(count):
    nonlocal start
    start += count
    return start, os.getpid()

  return add
