"""Methods side by side: who is trained, what is said, where it goes on.

Runs are real ones of a tiny method, which stands for all of them.
"""

import json
import shlex
import statistics

import pytest

from ekd_jax import build, comparison
from ekd_jax import config as configs
from ekd_jax.comparison import Comparison
from ekd_jax.training import loop
from tests import tiny

DEFAULTS = Comparison(dataset="digits", depth=8, epochs=2, batch_size=32)
FLAGS = (
  "--train-examples 110 --learning-rate .02 --log-every 1 --run-dir compared "
)


@pytest.fixture(autouse=True)
def _tiny(tmp_path, monkeypatch):
  monkeypatch.setattr(build, "method", tiny.method)
  monkeypatch.chdir(tmp_path)


def compare(flags):
  comparison.main(DEFAULTS, "Compares.", ["compare", *shlex.split(flags)])


def read(path):
  return json.loads(path.read_text())


def test_every_method_trains_three_networks():
  runs = comparison.runs_of(DEFAULTS)
  assert list(runs) == ["solo", "dml", "ekd", "ffl", "pcl", "ffsd"]
  assert {configs.network_count(run) for run in runs.values()} == {3}
  assert len(build.members(runs["ffsd"])) == 1
  assert {len(build.members(runs[name])) for name in list(runs)[:-1]} == {3}
  # The same but for what a method has of its own.
  own = {
    "method", "run_dir", "temperature", "peers", "ramp_up_epochs", "views",
    "common_students",
  }  # fmt: skip
  fields = [configs.to_json(run) for run in runs.values()]
  for name in fields[0].keys() - own:
    assert all(one[name] == fields[0][name] for one in fields), name


def test_ratios_and_options_of_some_methods_reach_them():
  runs = comparison.runs_of(
    Comparison(
      dataset="digits", depth=8, ratios=(0.5,), views=1, ramp_up="as_coded"
    )
  )
  assert all(run.ratios == (0.5,) for run in runs.values())
  assert {n: run.views for n, run in runs.items() if run.views} == {"pcl": 1}
  smooth = {n for n, run in runs.items() if run.ramp_up == "exponential"}
  assert smooth == runs.keys() - {"pcl"}


def test_the_comparison_is_that_of_its_runs(tmp_path, capsys):
  compare(FLAGS + "--methods solo,ekd --seeds 0,1 --ratios .5")
  said = capsys.readouterr().out
  assert "run 4 of 4: ekd, seed 1; about" in said
  found = read(tmp_path / "compared" / "comparison.json")
  assert (found["seeds"], found["epochs"]) == ([0, 1], 2)
  top1 = {}
  for row in found["methods"]:
    folder = tmp_path / "compared" / row["method"]
    summaries = [read(folder / f"seed_{s}" / "summary.json") for s in (0, 1)]
    for index, student in enumerate(row["students"]):
      values = [summary["members"][index]["top1"] for summary in summaries]
      assert student["params"] == summaries[0]["members"][index]["params"]
      assert student["top1"] == pytest.approx(statistics.fmean(values))
      assert student["std"] == pytest.approx(statistics.stdev(values))
      top1[row["method"], index] = student["top1"]
    values = [summary["ensemble"]["top1"] for summary in summaries]
    assert row["ensemble"]["top1"] == pytest.approx(statistics.fmean(values))
    assert row["progress"] is None
    assert row["step_bytes"] > 0
  solo, ekd = found["methods"]
  for index, student in enumerate(ekd["students"]):
    gain = top1["ekd", index] - top1["solo", index]
    assert student["gain"] == pytest.approx(gain)
    assert solo["students"][index]["gain"] == 0
  assert solo["step_ratio"] == 1
  assert ekd["step_ratio"] == ekd["step_seconds"] / solo["step_seconds"]
  page = (tmp_path / "compared" / "report.html").read_text()
  assert 'href="ekd/report.html"' in page
  assert f"{ekd['students'][1]['top1']:.1f}" in page


def test_members_of_one_size_are_one_student(tmp_path):
  compare(FLAGS + "--methods solo --peers 2")
  (row,) = read(tmp_path / "compared" / "comparison.json")["methods"]
  (student,) = row["students"]
  assert student["members"] == ["student_0", "student_1"]
  members = read(tmp_path / "compared" / "solo" / "summary.json")["members"]
  mean = statistics.fmean(member["top1"] for member in members)
  assert student["top1"] == pytest.approx(mean)
  assert student["std"] is None


class _Killed(BaseException):
  pass


def test_a_killed_comparison_goes_on_where_it_was(
  tmp_path, capsys, monkeypatch
):
  train = loop.train
  trained = []

  def train_or_be_killed(config, *arguments, **options):
    trained.append((config.method, config.seed))
    if trained == [("solo", 0), ("solo", 1), ("dml", 0)]:
      raise _Killed
    train(config, *arguments, **options)

  flags = FLAGS + "--methods solo,dml --seeds 0,1 --peers 2"
  monkeypatch.setattr(loop, "train", train_or_be_killed)
  with pytest.raises(_Killed):
    compare(flags)
  costs = (tmp_path / "compared" / "costs.json").read_bytes()
  trained.clear()
  capsys.readouterr()
  compare(flags)
  assert trained == [("dml", 0), ("dml", 1)]
  assert "run 3 of 4: dml, seed 0" in capsys.readouterr().out
  # What was measured is not measured again.
  assert (tmp_path / "compared" / "costs.json").read_bytes() == costs
  trained.clear()
  compare(flags)
  assert trained == []
  compare(flags.replace("solo,dml", "solo,dml,ekd"))
  assert trained == [("ekd", 0), ("ekd", 1)]


@pytest.mark.parametrize(
  ("flags", "said"),
  [
    ("--methods solo,ekd2", "--methods has ekd2 (did you mean ekd?): choose"),
    ("--methods solo,solo", "--methods is solo,solo: give each once"),
    ("--distributed", "--distributed was given: methods are compared on one"),
    ("--peers 1", "--method ffl needs two networks or more"),
    ("--method ffl", "--method ffl was given: a comparison has several, use"),
    ("--ratios 1.5", "--ratios is 1.5"),
  ],
)
def test_mistakes_are_told_in_one_line(flags, said, tmp_path, capsys):
  with pytest.raises(SystemExit) as caught:
    compare(FLAGS + flags)
  assert caught.value.code == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert said in line
  assert not list(tmp_path.iterdir())


def test_the_plan_of_each_method_is_shown(tmp_path, capsys):
  compare("--plan --methods ffl,ffsd")
  said = capsys.readouterr().out
  assert "ffl on digits" in said
  assert "ffsd on digits" in said
  assert not list(tmp_path.iterdir())
