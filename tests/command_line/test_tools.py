"""python -m ekd_jax, with a finished run."""

import json
import re
import shutil

import pytest

from ekd_jax import cli
from tests import runs
from tests.command_line.called import error


def _tools(*arguments):
  cli.tools(["ekd_jax", *map(str, arguments)])


def test_report_writes_the_page_again(trained, folder, capsys):
  run_dir = folder / "copy"
  shutil.copytree(trained[4], run_dir)
  (run_dir / "report.html").unlink()
  _tools("report", run_dir)
  shown = capsys.readouterr().out
  assert "student_1" in shown
  assert shown.rstrip().endswith(str(run_dir / "report.html"))
  assert (run_dir / "report.html").is_file()


def test_evaluate_prints_the_accuracies_of_the_run(trained, capsys):
  _tools("evaluate", trained[4])
  shown = capsys.readouterr().out
  assert "360 images" in shown
  summary = json.loads((trained[4] / "summary.json").read_text())
  results = {m["name"]: m["top1"] for m in summary["members"]}
  results["ensemble"] = summary["ensemble"]["top1"]
  for name, top1 in results.items():
    (row,) = [row for row in shown.splitlines() if f" {name} " in row]
    number = float(re.search(r"\d+\.\d+", row)[0])
    # One image of 360 may fall the other way in another program.
    assert number == pytest.approx(top1, abs=0.29)


def test_compare_puts_two_runs_side_by_side(trained, capsys):
  _tools("compare", trained[1], trained[4])
  shown = capsys.readouterr().out
  assert "student_0" in shown
  assert "on_1" in shown
  assert "on_4" in shown


def test_evaluating_leaves_the_run_as_it_was(trained, capsys):
  before = runs.contents(trained[1])
  _tools("evaluate", trained[1])
  _tools("compare", trained[1], trained[1])
  assert runs.contents(trained[1]) == before


@pytest.mark.parametrize(
  ("arguments", "said"),
  [
    (["reprot", "run"], "reprot is no command (did you mean report?)"),
    (["xyz"], "use one of report, evaluate, compare"),
    ([], "no command was given: use one of report, evaluate, compare"),
    (["report"], "RUN_DIR is missing"),
    (["compare", "../foreign"], "RUN_B is missing"),
    (["report", "nowhere"], "nowhere is no run directory"),
    (["report", "../foreign"], "is no run directory"),
    (["report", "../file"], "is no run directory"),
    (["evaluate", "../foreign"], "is no run directory"),
    (["compare", "../foreign", "nowhere"], "is no run directory"),
    (["report", "../foreign", "--epochs", "3"], "is not a known option"),
  ],
)
def test_a_mistake_with_a_finished_run_is_told_in_one_line(
  arguments, said, folder, capsys
):
  before = runs.contents(folder)
  assert said in error(capsys, lambda: _tools(*arguments))
  assert runs.contents(folder) == before
