"""Trainings from the command line.

They are those of the tiny method (tests/tiny.py); real ones are in
test_end_to_end.py.
"""

import json
import shlex

import pytest

from ekd_jax import build
from tests import runs, tiny
from tests.command_line.called import FINE, error, main


@pytest.fixture
def tiny_method(monkeypatch):
  monkeypatch.setattr(build, "method", tiny.method)


def _train(more=""):
  main(shlex.join(tiny.FLAGS) + " --run-dir run " + more)


def test_a_finished_run_is_only_reported(tiny_method, folder, capsys):
  _train()
  first = capsys.readouterr().out
  assert "epoch 2/2" in first
  before = runs.contents(folder / "here" / "run" / "checkpoints")
  _train()
  again = capsys.readouterr().out
  assert runs.contents(folder / "here" / "run" / "checkpoints") == before
  assert "epoch 2/2" not in again
  assert "finished before" in again
  for shown in (first, again):
    assert "student_1" in shown
    assert shown.rstrip().endswith(str(folder / "here/run/report.html"))


def test_other_options_are_refused_by_name(tiny_method, folder, capsys):
  _train()
  capsys.readouterr()
  before = runs.contents(folder)
  line = error(capsys, lambda: _train("--learning-rate .5 --epochs 3"))
  assert "--learning-rate (there 0.02, now 0.5)" in line
  assert "--epochs (there 2, now 3)" in line
  line = error(capsys, lambda: _train("--seeds 0,1"))
  assert "--seeds" in line
  assert runs.contents(folder) == before


def test_a_run_goes_on_in_another_formulation(tiny_method, folder, capsys):
  _train("--conv lax --scan off")
  capsys.readouterr()
  switches = "--remat --no-compilation-cache --no-tune-allocator"
  _train(f"--conv split --scan on {switches}")
  assert "finished before" in capsys.readouterr().out
  # The record says what was used last.
  config = json.loads((folder / "here" / "run" / "config.json").read_text())
  assert (config["conv"], config["scan"], config["remat"]) == (
    *("split", "on"),
    True,
  )


def test_solo_can_be_added_to_a_finished_run(tiny_method, folder, capsys):
  run_dir = folder / "here" / "run"
  _train()
  alone = json.loads((run_dir / "summary.json").read_text())
  lines = (run_dir / "metrics.jsonl").read_text()
  _train("--with-solo")
  both = json.loads((run_dir / "summary.json").read_text())
  solo = json.loads((run_dir / "solo" / "summary.json").read_text())
  assert solo["method"] == "solo"
  assert (run_dir / "metrics.jsonl").read_text() == lines
  for before, after, own in zip(
    alone["members"], both["members"], solo["members"], strict=True
  ):
    assert before["solo_top1"] is None
    assert after["solo_top1"] == own["top1"] is not None
    assert after["relative_gain"] == pytest.approx(
      (after["top1"] - own["top1"]) / own["top1"] * 100
    )
    assert after["top1"] == before["top1"]
  # And the same command again trains nothing.
  kept = runs.contents(run_dir / "solo" / "checkpoints")
  _train("--with-solo")
  assert runs.contents(run_dir / "solo" / "checkpoints") == kept


def test_seeds_are_runs_of_their_own(tiny_method, folder, capsys):
  run_dir = folder / "here" / "run"
  _train("--seeds 0,7")
  summary = json.loads((run_dir / "summary.json").read_text())
  assert summary["seed"] == [0, 7]
  parts = [
    json.loads((run_dir / f"seed_{seed}" / "summary.json").read_text())
    for seed in (0, 7)
  ]
  assert [part["seed"] for part in parts] == [0, 7]
  top1 = [part["members"][1]["top1"] for part in parts]
  assert top1[0] != top1[1]
  assert summary["members"][1]["top1"] == pytest.approx(sum(top1) / 2)
  for part in ("", "seed_0", "seed_7"):
    assert (run_dir / part / "report.html").is_file()
  # Seed 7 is what a run with --seed 7 is.
  tiny.train(tiny.config(folder / "seven", seed=7))
  own = (folder / "seven" / "metrics.jsonl").read_text()
  assert (run_dir / "seed_7" / "metrics.jsonl").read_text() == own


def test_each_seed_can_have_its_members_alone(tiny_method, monkeypatch):
  # Which trainings there are, in which order; that they work is tested above.
  started = []
  monkeypatch.setattr(
    "ekd_jax.training.loop.train",
    lambda config, *rest, **more: started.append(config),
  )
  monkeypatch.setattr("ekd_jax.run_directory.write_summary", lambda run: None)
  monkeypatch.setattr("ekd_jax.report.write", lambda run: None)
  with pytest.raises(SystemExit):
    # Nothing was trained, so there is nothing to sum up.
    _train("--seeds 0,7 --with-solo")
  assert [
    (config.run_dir.partition("/run/")[2], config.method, config.seed)
    for config in started
  ] == [
    ("seed_0", "ekd", 0),
    ("seed_0/solo", "solo", 0),
    ("seed_7", "ekd", 7),
    ("seed_7/solo", "solo", 7),
  ]
  assert all(config.seeds is None for config in started)


def test_a_diverged_run_ends_in_one_line(tiny_method, folder, capsys):
  with pytest.raises(SystemExit) as caught:
    _train("--learning-rate 1e30")
  assert caught.value.code == 3
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith("error: step ")
  assert "is not finite" in line


def test_a_bug_keeps_its_traceback(monkeypatch):
  def train(*arguments, **options):
    raise ZeroDivisionError("a bug")

  monkeypatch.setattr("ekd_jax.training.loop.train", train)
  with pytest.raises(ZeroDivisionError):
    main(FINE)
