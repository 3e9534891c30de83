"""The files of a run: read and written whole, or not at all."""

import dataclasses
import json
import os
import pathlib
import sys

import numpy as np
import pytest

from ekd_jax import config as configs
from ekd_jax import run_directory
from ekd_jax.config import Config
from ekd_jax.errors import UserError
from tests import runs

MEMBERS = ("student_0", "student_1")


def _config(run_dir, **options):
  return configs.resolve(
    Config(
      **{"dataset": "digits", "depth": 8, "ratios": (0.5,), "epochs": 4}
      | options,
      run_dir=str(run_dir),
    )
  )


def _scores(ensemble, *members):
  scores = {"top1/ensemble": ensemble, "top5/ensemble": ensemble + 1}
  for name, value in zip(MEMBERS, members, strict=True):
    scores |= {
      f"top1/{name}": value,
      f"top5/{name}": value + 2,
      f"agreement/{name}": value + 3,
    }
  return scores


def _write_run(run_dir, lines, **options):
  """A run directory with `lines`: (kind, epoch, scores)."""
  run_dir.mkdir(parents=True, exist_ok=True)
  config = _config(run_dir, **options)
  run_directory.write_json(run_dir / "config.json", configs.to_json(config))
  (run_dir / "metrics.jsonl").write_text(
    "".join(
      json.dumps({"kind": kind, "epoch": epoch, "step": 3 * epoch, **scores})
      + "\n"
      for kind, epoch, scores in lines
    )
  )
  return run_dir


# metrics.jsonl


def _write_lines(run_dir, text):
  (run_dir / "metrics.jsonl").write_text(text)


def test_no_metrics_before_the_first_line(tmp_path):
  assert run_directory.read_metrics(tmp_path) == []


@pytest.mark.parametrize(
  "cut", ['{"step": 3', '{"step": 3}', "{", '{"step": 3, "loss": 1e-', ""]
)
def test_a_last_line_that_was_cut_off_is_left_out(cut, tmp_path):
  _write_lines(tmp_path, '{"step": 1}\n{"step": 2}\n' + cut)
  assert run_directory.read_metrics(tmp_path) == [{"step": 1}, {"step": 2}]


def test_truncating_drops_later_lines_and_a_cut_one(tmp_path):
  _write_lines(
    tmp_path, '{"step": 1}\n{"step": 2, "loss": 0.1}\n{"step": 3}\n{"st'
  )
  run_directory.truncate_metrics(tmp_path, 2)
  text = (tmp_path / "metrics.jsonl").read_text()
  assert text == '{"step": 1}\n{"step": 2, "loss": 0.1}\n'


def test_truncating_keeps_every_number_as_it_was(tmp_path):
  line = json.dumps({"kind": "step", "step": 1, "x": 0.1 + 0.2, "y": 1e-300})
  _write_lines(tmp_path, line + "\n")
  before = (tmp_path / "metrics.jsonl").read_bytes()
  run_directory.truncate_metrics(tmp_path, 1)
  assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_truncating_a_new_run_makes_an_empty_file(tmp_path):
  run_directory.truncate_metrics(tmp_path, 0)
  assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_a_write_that_is_interrupted_leaves_the_old_file(tmp_path, monkeypatch):
  path = tmp_path / "summary.json"
  run_directory.write_json(path, {"old": 1})

  def interrupted(descriptor):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(os, "fsync", interrupted)
    run_directory.write_json(path, {"new": list(range(1000))})
  assert run_directory.read_json(path) == {"old": 1}
  run_directory.write_json(path, {"new": 2})
  assert run_directory.read_json(path) == {"new": 2}
  assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]


# config.json


def test_a_config_survives_its_file(tmp_path):
  config = _config(
    tmp_path,
    ratios=None,
    widths=(1.0, 0.8, 0.2),
    seeds=(0, 1),
    train_examples=100,
    learning_rate=0.1 + 0.2,
    learning_rate_drops=(0.3,),
    with_solo=True,
  )
  run_directory.open_run(tmp_path, config, ["train"])
  assert run_directory.load_config(tmp_path) == config


def test_every_option_is_in_the_file(tmp_path):
  run_directory.open_run(tmp_path, _config(tmp_path), ["train"])
  fields = {field.name for field in dataclasses.fields(Config)}
  assert set(run_directory.read_config(tmp_path)) == fields


def test_the_command_can_be_pasted_into_a_shell(tmp_path):
  argv = ["train me.py", "--data-dir", "it's here"]
  run_directory.open_run(tmp_path, _config(tmp_path), argv)
  (line,) = (tmp_path / "command.txt").read_text().splitlines()
  interpreter = pathlib.Path(sys.executable).name
  wanted = f"{interpreter} 'train me.py' --data-dir 'it'\"'\"'s here'"
  assert line == wanted


def test_a_directory_without_a_run_is_named(tmp_path):
  for path in (tmp_path, tmp_path / "nowhere"):
    with pytest.raises(UserError, match="no run directory") as caught:
      run_directory.load_config(path)
    assert str(path) in str(caught.value)


# check


def _refused(run_dir, config):
  """The message of a refusal, which must change nothing."""
  top = next(p for p in run_dir.parents if p.is_dir())
  before = runs.contents(top)
  with pytest.raises(UserError) as caught:
    run_directory.check(run_dir, config)
  assert runs.contents(top) == before
  message = str(caught.value)
  assert "\n" not in message
  assert str(run_dir) in message
  return message


def test_a_new_an_empty_and_an_equal_run_are_accepted(tmp_path):
  for run_dir in (tmp_path / "a" / "b", tmp_path):
    run_directory.check(run_dir, _config(run_dir))
    assert list(tmp_path.iterdir()) == []
  run_directory.open_run(tmp_path, _config(tmp_path), ["train"])
  run_directory.check(tmp_path, _config(tmp_path))


def test_what_does_not_change_the_training_may_differ(tmp_path):
  run_directory.open_run(tmp_path, _config(tmp_path), ["train"])
  run_directory.check(
    tmp_path,
    _config(
      tmp_path,
      with_solo=True,
      data_dir="elsewhere",
      checkpoint_minutes=1.0,
      log_every=7,
      quick=True,
    ),
  )


@pytest.mark.parametrize(
  ("options", "flags"),
  [
    ({"epochs": 5}, ["--epochs"]),
    ({"learning_rate": 0.2, "seed": 3}, ["--learning-rate", "--seed"]),
    # A method brings its own temperature.
    ({"method": "dml"}, ["--method", "--temperature"]),
    ({"ratios": (0.25,)}, ["--ratios"]),
    ({"ratios": None, "widths": (1.0, 0.5)}, ["--ratios", "--widths"]),
    ({"seeds": (0, 1)}, ["--seeds"]),
    ({"validation_examples": 10}, ["--validation-examples"]),
    ({"precision": "bfloat16"}, ["--precision"]),
    ({"batch_norm": "local"}, ["--batch-norm"]),
  ],
)
def test_another_run_is_refused_by_the_flags_that_differ(
  options, flags, tmp_path
):
  run_dir = tmp_path / "run"
  run_directory.open_run(run_dir, _config(run_dir), ["train"])
  message = _refused(run_dir, _config(run_dir, **options))
  named = [word for word in message.split() if word.startswith("--")]
  assert [word for word in named if word != "--run-dir"] == flags


def test_a_file_is_refused(tmp_path):
  (tmp_path / "run").write_text("")
  assert "is a file" in _refused(tmp_path / "run", _config(tmp_path / "run"))


def test_somebody_elses_directory_is_refused(tmp_path):
  run_dir = tmp_path / "thesis"
  run_dir.mkdir()
  (run_dir / "chapter.tex").write_text("years")
  assert "holds files but no run" in _refused(run_dir, _config(run_dir))


def test_a_directory_under_a_file_is_refused(tmp_path):
  (tmp_path / "file").write_text("")
  run_dir = tmp_path / "file" / "run"
  assert "cannot be written" in _refused(run_dir, _config(run_dir))


def test_what_a_kill_at_the_very_start_leaves_is_accepted(
  tmp_path, monkeypatch
):
  def killed(descriptor):
    raise KeyboardInterrupt

  run_dir = tmp_path / "run"
  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(os, "fsync", killed)
    run_directory.open_run(run_dir, _config(run_dir), ["train"])
  run_directory.check(run_dir, _config(run_dir))
  run_directory.open_run(run_dir, _config(run_dir), ["train"])
  assert run_directory.load_config(run_dir) == _config(run_dir)


# summarize


def _by_name(summary):
  return {member["name"]: member for member in summary["members"]}


def test_before_the_first_evaluation_everything_measured_is_null(tmp_path):
  _write_run(tmp_path, [])
  summary = run_directory.summarize(tmp_path)
  for member in summary["members"]:
    measured = {"top1", "top5", "best_top1", "best_epoch", "solo_top1"}
    for name in measured | {"relative_gain", "agreement"}:
      assert member[name] is None, name
  assert set(summary["ensemble"].values()) == {None}


def test_the_last_evaluation_is_the_result(tmp_path):
  _write_run(
    tmp_path,
    [("test", 1, _scores(90, 80, 70)), ("test", 2, _scores(60, 50, 40))],
  )
  summary = run_directory.summarize(tmp_path)
  assert summary["ensemble"] == {"top1": 60, "top5": 61, "best_top1": None}
  student = _by_name(summary)["student_1"]
  assert (student["top1"], student["top5"], student["agreement"]) == (
    40,
    42,
    43,
  )
  assert student["best_top1"] is None
  assert student["best_epoch"] is None


def test_the_members_of_a_summary_are_those_asked_for(tmp_path):
  _write_run(tmp_path, [])
  summary = run_directory.summarize(tmp_path)
  assert [m["name"] for m in summary["members"]] == list(MEMBERS)
  assert [m["ratio_asked"] for m in summary["members"]] == [0.0, 0.5]
  assert (summary["method"], summary["dataset"]) == ("ekd", "digits")
  assert (summary["network"], summary["epochs"]) == ("resnet8", 4)
  assert summary["seed"] == 0


def test_members_given_by_width_were_asked_for_no_ratio(tmp_path):
  _write_run(tmp_path, [], ratios=None, widths=(1.0, 0.5))
  members = run_directory.summarize(tmp_path)["members"]
  assert [m["ratio_asked"] for m in members] == [None, None]
  assert [m["width"] for m in members] == [1.0, 0.5]
  assert members[0]["ratio"] == 0
  assert 0 < members[1]["ratio"] < 1


def test_the_best_epoch_is_chosen_on_validation_member_by_member(tmp_path):
  lines = []
  # Validation and test disagree about which epoch is best.
  for epoch, validation, test in [
    (1, (50, 70, 40), (11, 12, 13)),
    (2, (60, 60, 80), (21, 22, 23)),
    (3, (60, 50, 80), (99, 98, 97)),
    (4, (10, 10, 10), (41, 42, 43)),
  ]:
    lines.append(("test", epoch, _scores(*test)))
    lines.append(("validation", epoch, _scores(*validation)))
  _write_run(tmp_path, lines, validation_examples=10)
  summary = run_directory.summarize(tmp_path)
  full, student = summary["members"]
  assert (full["best_epoch"], full["best_top1"]) == (1, 12)
  # Of equal epochs the first.
  assert (student["best_epoch"], student["best_top1"]) == (2, 23)
  assert summary["ensemble"]["best_top1"] == 21
  assert (full["top1"], student["top1"]) == (42, 43)


def test_the_gain_over_the_same_network_alone(tmp_path):
  _write_run(tmp_path, [("test", 1, _scores(90, 80, 66))])
  _write_run(tmp_path / "solo", [("test", 1, _scores(70, 84, 60))])
  full, student = run_directory.summarize(tmp_path)["members"]
  assert full["solo_top1"] == 84
  assert full["relative_gain"] == pytest.approx((80 - 84) / 84 * 100)
  assert student["solo_top1"] == 60
  assert student["relative_gain"] == pytest.approx(10.0)


def test_what_else_is_scored_stands_beside_the_members(tmp_path):
  more = {"top1/peer_1": 33, "top5/peer_1": 44, "top1/peer_0": 22}
  _write_run(
    tmp_path,
    [
      ("validation", 1, _scores(1, 2, 3) | more),
      ("test", 1, _scores(90, 80, 66) | more),
    ],
  )
  summary = run_directory.summarize(tmp_path)
  assert [member["name"] for member in summary["members"]] == list(MEMBERS)
  assert summary["others"] == [
    {"name": "peer_0", "top1": 22, "top5": None, "best_top1": 22},
    {"name": "peer_1", "top1": 33, "top5": 44, "best_top1": 33},
  ]


def test_without_more_there_are_no_others(tmp_path):
  _write_run(tmp_path, [("test", 1, _scores(90, 80, 66))])
  assert "others" not in run_directory.summarize(tmp_path)


def test_a_solo_run_without_figures_gives_nulls(tmp_path):
  _write_run(tmp_path, [("test", 1, _scores(90, 80, 66))])
  _write_run(tmp_path / "solo", [])
  for member in run_directory.summarize(tmp_path)["members"]:
    assert member["solo_top1"] is None
    assert member["relative_gain"] is None


def test_a_solo_accuracy_of_zero_is_no_division_by_zero(tmp_path):
  _write_run(tmp_path, [("test", 1, _scores(90, 80, 66))])
  _write_run(tmp_path / "solo", [("test", 1, _scores(0, 0, 0))])
  student = run_directory.summarize(tmp_path)["members"][1]
  assert student["solo_top1"] == 0
  assert student["relative_gain"] is None


# Several seeds.


def _write_seeds(run_dir, results, *, seeds=None, solo=False):
  seeds = tuple(seeds or range(len(results)))
  _write_run(run_dir, [], seeds=seeds, with_solo=solo)
  for seed, result in zip(seeds, results, strict=False):
    folder = run_directory.seed_directory(run_dir, seed)
    _write_run(folder, [("test", 4, _scores(*result))], seed=seed)
    if solo:
      lines = [("test", 4, _scores(*(x - 5 - seed for x in result)))]
      _write_run(folder / "solo", lines, seed=seed, method="solo")
  return run_dir


def test_seeds_give_means_and_standard_deviations(tmp_path):
  results = np.array([(74.1, 72.8, 46.8), (75.3, 72.2, 45.0), (73.0, 71.9, 47)])
  _write_seeds(tmp_path, results.tolist(), solo=True)
  summary = run_directory.summarize(tmp_path)
  assert summary["seed"] == [0, 1, 2]
  mean, std = results.mean(0), results.std(0, ddof=1)
  assert summary["ensemble"]["top1"] == pytest.approx(mean[0])
  assert summary["std"]["ensemble"]["top1"] == pytest.approx(std[0])
  solo = results - 5 - np.arange(3)[:, None]
  gain = (results - solo) / solo * 100
  for i, name in enumerate(MEMBERS, start=1):
    member = _by_name(summary)[name]
    spread = _by_name(summary["std"])[name]
    for field, values in [
      ("top1", results[:, i]),
      ("top5", results[:, i] + 2),
      ("agreement", results[:, i] + 3),
      ("solo_top1", solo[:, i]),
      ("relative_gain", gain[:, i]),
    ]:
      assert member[field] == pytest.approx(values.mean()), field
      assert spread[field] == pytest.approx(values.std(ddof=1)), field
    assert member["best_top1"] is None
    assert spread["best_top1"] is None
    assert member["best_epoch"] is None


def test_seeds_give_means_of_what_else_is_scored(tmp_path):
  _write_run(tmp_path, [], seeds=(0, 1))
  for seed, value in ((0, 40.0), (1, 44.0)):
    folder = run_directory.seed_directory(tmp_path, seed)
    scores = _scores(70, 60, 50) | {"top1/common_0": value}
    _write_run(folder, [("test", 4, scores)], seed=seed)
  summary = run_directory.summarize(tmp_path)
  (other,) = summary["others"]
  assert (other["name"], other["top1"]) == ("common_0", 42.0)
  (spread,) = summary["std"]["others"]
  assert spread["top1"] == pytest.approx(8**0.5)
  # A seed that has not been evaluated knows of none.
  _write_run(run_directory.seed_directory(tmp_path, 1), [], seed=1)
  summary = run_directory.summarize(tmp_path)
  assert "others" not in summary
  assert "others" not in summary["std"]


def test_seeds_leave_what_members_are_alone(tmp_path):
  _write_seeds(tmp_path, [(70, 60, 50), (71, 61, 51)])
  one = run_directory.summarize(tmp_path / "seed_0")
  both = run_directory.summarize(tmp_path)
  for name in ("ratio_asked", "ratio", "width", "params", "macs", "name"):
    assert [m[name] for m in both["members"]] == [
      m[name] for m in one["members"]
    ]


def test_one_seed_of_several_has_no_spread_yet(tmp_path):
  _write_seeds(tmp_path, [(70, 60, 50)], seeds=(3, 4))
  summary = run_directory.summarize(tmp_path)
  assert summary["members"][1]["top1"] == 50
  assert summary["std"]["members"][1]["top1"] is None
  assert summary["std"]["ensemble"]["top1"] is None


def test_a_figure_that_one_seed_lacks_is_null(tmp_path):
  _write_seeds(tmp_path, [(70, 60, 50), (71, 61, 51)], solo=True)
  (tmp_path / "seed_1" / "solo" / "metrics.jsonl").write_text("")
  student = run_directory.summarize(tmp_path)["members"][1]
  assert student["solo_top1"] is None
  assert student["top1"] == 50.5


def test_seeds_that_have_not_started_are_said_to(tmp_path):
  _write_run(tmp_path, [], seeds=(0, 1))
  with pytest.raises(UserError, match="no seed that was started"):
    run_directory.summarize(tmp_path)
