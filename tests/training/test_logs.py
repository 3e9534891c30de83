"""What a run writes down and what a person sees of it."""

import io
import json
import struct

import pytest
from rich.console import Console
from tensorboardX.proto import event_pb2

from ekd_jax.training import logs


@pytest.fixture
def clock(monkeypatch):
  """The time, which stands still until a test moves it."""

  class Clock:
    now = 1000.0

    def monotonic(self):
      return self.now

  clock = Clock()
  monkeypatch.setattr(logs, "time", clock)
  return clock


def _events(run_dir):
  """(tag, step, value) of all event files, in the order of their writing."""
  found = []
  for path in sorted((run_dir / "tensorboard").iterdir()):
    contents = path.read_bytes()
    while contents:
      # A record: its length, a checksum of that, itself, a checksum.
      (length,) = struct.unpack("<Q", contents[:8])
      event = event_pb2.Event.FromString(contents[12 : 12 + length])
      contents = contents[12 + length + 4 :]
      found += [
        (value.tag, event.step, value.simple_value)
        for value in event.summary.value
      ]
  return found


def test_a_line_is_one_flat_object(tmp_path):
  log = logs.MetricsLog(tmp_path, resumed_step=0)
  log.write("step", epoch=1, step=3, values={"loss": 0.1, "label/student_0": 2})
  # On disk at once: a kill loses no line.
  text = (tmp_path / "metrics.jsonl").read_text()
  log.close()
  assert text.endswith("\n")
  assert json.loads(text) == {
    "kind": "step", "epoch": 1, "step": 3, "loss": 0.1, "label/student_0": 2,
  }  # fmt: skip


def test_tensorboard_gets_the_same_numbers(tmp_path):
  log = logs.MetricsLog(tmp_path, resumed_step=0)
  log.write("step", epoch=1, step=3, values={"loss": 0.5})
  log.write("test", epoch=1, step=3, values={"top1/ensemble": 62.5})
  log.close()
  assert _events(tmp_path) == [
    ("step/loss", 3, 0.5),
    ("test/top1/ensemble", 3, 62.5),
  ]


def test_a_resumed_log_drops_what_will_be_written_again(tmp_path):
  log = logs.MetricsLog(tmp_path, resumed_step=0)
  for step in (1, 2, 3):
    log.write("step", epoch=1, step=step, values={"loss": float(step)})
  log.close()
  log = logs.MetricsLog(tmp_path, resumed_step=2)
  log.write("step", epoch=1, step=3, values={"loss": 30.0})
  log.close()
  lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
  assert [json.loads(line)["loss"] for line in lines] == [1.0, 2.0, 30.0]


def _plain(total_steps=100):
  file = io.StringIO()
  return logs.ConsoleLog(Console(file=file), "ekd", total_steps), file


def _step(log, step, **changes):
  values = {"epoch": 1, "epochs": 2, "images": 64, "loss": 1.25}
  log.step(step=step, **values | changes)


def test_a_pipe_gets_plain_lines(clock):
  log, file = _plain()
  with log:
    log.say("compiling [about] 7 s")
    log.epoch(
      epoch=1,
      epochs=2,
      scores={"top1/ensemble": 71.234, "top1/student_0": 70.0, "loss/x": 1.0},
    )
  first, second = file.getvalue().splitlines()
  assert first == "ekd: compiling [about] 7 s"
  assert second.startswith("ekd: epoch 1/2")
  assert "70.00" in second
  assert "71.23" in second
  assert "1.00" not in second
  assert "\x1b" not in file.getvalue()


def test_members_are_shown_in_the_order_of_their_numbers(clock):
  log, file = _plain()
  names = [f"student_{i}" for i in range(11)]
  # JAX hands dictionaries back with sorted keys: student_10 before student_2.
  scores = {f"top1/{n}": float(n[8:]) for n in sorted(names)}
  log.epoch(epoch=1, epochs=1, scores=scores | {"top1/ensemble": 99.0})
  shown = file.getvalue()
  places = [shown.index(f" {i}.00") for i in range(11)]
  assert places == sorted(places)


def test_a_long_line_is_not_wrapped_in_a_pipe(clock):
  log, file = _plain()
  log.say("x" * 500)
  assert file.getvalue() == f"ekd: {'x' * 500}\n"


def test_a_pipe_is_not_flooded_with_steps(clock):
  log, file = _plain()
  with log:
    for step in range(1, 8):
      clock.now += 10
      _step(log, step)
  # One line every half minute.
  assert [line.split(",")[1] for line in file.getvalue().splitlines()] == [
    " step 3/100", " step 6/100",
  ]  # fmt: skip


def test_speed_leaves_the_first_step_and_pauses_out(clock):
  log, file = _plain(total_steps=13)
  clock.now += 500  # Compilation.
  _step(log, 1)
  clock.now += 2
  _step(log, 2)
  clock.now += 100  # An evaluation.
  log.pause(100)
  clock.now += 2
  _step(log, 3)
  last = file.getvalue().splitlines()[-1]
  assert "step 3/13" in last
  assert "loss 1.250" in last
  assert "32 images/s" in last


def test_the_time_left_counts_what_steps_really_took(clock):
  log, file = _plain(total_steps=3603)
  _step(log, 1)
  clock.now += 4
  _step(log, 2)
  clock.now += 56
  _step(log, 3)
  # 60 s for two steps, 3,600 to go.
  assert "30 h 00 min left" in file.getvalue()


def test_a_terminal_gets_one_live_line(clock):
  file = io.StringIO()
  console = Console(file=file, force_terminal=True, width=200)
  with logs.ConsoleLog(console, "ekd", 10) as log:
    _step(log, 1)
    clock.now += 1
    _step(log, 2)
    log.epoch(epoch=1, epochs=2, scores={"top1/ensemble": 50.0})
    clock.now += 1
    _step(log, 3)
  shown = file.getvalue()
  assert "step 3/10" in shown
  assert "64 images/s" in shown
  assert "7 s left" in shown
  assert "epoch 1/2; test top-1 %" in shown
