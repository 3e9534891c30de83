"""Figures as they are written, the members table, runs side by side."""

import io
import json
import math
import pathlib
import re

import pytest
from rich.console import Console

from ekd_jax import report
from ekd_jax.errors import UserError
from ekd_jax.report import formatting
from tests.report.made import TOP1, WIDTHS, summary, write_run

# How figures are written.


@pytest.mark.parametrize(
  ("value", "expected"),
  [
    (1_091_396, "1.09 M"),
    (63_063, "63.1 k"),
    (272_474, "272 k"),
    (999, "999"),
    (999_499, "999 k"),
    (999_700, "1.00 M"),
    (9_996, "10.0 k"),
    (253_155_584, "253 M"),
    (1.8e9, "1.80 G"),
    (0, "0"),
    (None, "-"),
    (math.nan, "-"),
  ],
)
def test_counts_have_three_digits(value, expected):
  assert formatting.count(value) == expected


def test_percent_has_sign_and_spread_only_where_asked():
  assert formatting.percent(70.123) == "70.12"
  assert formatting.percent(1.3, signed=True) == "+1.30"
  assert formatting.percent(-1.3, signed=True) == "-1.30"
  assert formatting.percent(70.12, 0.31) == "70.1 ± 0.3"
  assert formatting.percent(-0.001, signed=True) == "+0.00"
  assert formatting.percent(None, 0.31) == "-"
  assert formatting.percent(math.inf) == "-"


# The members table.


def test_members_table_has_a_row_per_member_and_the_ensemble_last():
  members = [
    {"params": 1_736_564, "top1": 72.8, "solo_top1": 72.6},
    {"params": 64_233, "top1": 46.8, "relative_gain": -1.25},
  ]
  text = report.members_text(summary(members, 74.1))
  rows = [line.split() for line in text.splitlines() if "─" not in line]
  named = [row for row in rows if row and row[0] in ("ensemble", "student_1")]
  assert named == [
    ["student_1", "64.2", "k", "46.80", "-", "-1.25"],
    ["ensemble", "-", "74.10", "-", "-"],
  ]
  assert text.startswith("ekd, resnet110 on cifar100, 3")


def test_members_table_leaves_out_what_no_member_has():
  text = report.members_text(summary([{"top1": 50.0}, {"top1": 40.0}]))
  assert "top-1" in text
  for heading in ("top-5", "solo", "gain", "params", "best", "ensemble"):
    assert heading not in text
  assert "solo" in report.members_text(summary([{"solo_top1": 50.0}, {}]))


def test_members_table_of_seeds_shows_spreads():
  std = {
    "members": [{"name": "student_0", "top1": 0.31}],
    "ensemble": {"top1": 0.12},
  }
  text = report.members_text(summary([{"top1": 70.12}, {}], 74.0, std=std))
  assert "70.1 ± 0.3" in text
  assert "74.0 ± 0.1" in text


def test_members_table_fits_a_terminal_and_hides_no_digit():
  member = {
    "ratio_asked": 0.97, "ratio": 0.963, "width": 0.2, "params": 64_233,
    "macs": 9_736_368, "top1": 46.8, "top5": 76.5, "solo_top1": 42.3,
    "relative_gain": 10.64, "agreement": 48.25,
  }  # fmt: skip

  def shown(width):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(report.members_table(summary([member] * 2, 74.1)))
    return console.export_text()

  row = "0.97 0.963 0.2 64.2 k 9.74 M 46.80 76.50 42.30 +10.64 48.25"
  assert row in re.sub(r" +", " ", shown(80))
  assert "…" not in shown(40)


def test_names_are_not_markup():
  assert "[bold]x" in report.members_text(
    summary([{"name": "[bold]x", "top1": 1.0}])
  )


# Runs side by side.


def test_compare_shows_differences_of_members_and_config(tmp_path):
  first = write_run(tmp_path / "first", seed=0, temperature=2.0)
  lower = tuple(value - 0.25 for value in TOP1)
  other = write_run(tmp_path / "other", top1=lower, temperature=4.0)
  text = report.compare_text([first, other])
  rows = [line.split() for line in text.splitlines()]
  assert ["student_4", "64.2", "k", "46.80", "46.55", "-0.25"] in rows
  assert ["ensemble", "-", "74.10", "74.10", "+0.00"] in rows
  assert ["temperature", "2.0", "4.0"] in rows
  assert "run_dir" not in text  # differs, but the headings say it
  assert "learning_rate" not in text
  assert "not the same network" not in text


def test_compare_says_which_members_are_different_networks(tmp_path):
  first = write_run(tmp_path / "first")
  other = write_run(
    tmp_path / "other", top1=TOP1[:2], widths=(1.0, 0.7), epochs_asked=9
  )
  text = report.compare_text([first, other])
  assert (
    "student_1 is not the same network: width 0.8 in first, 0.7 in other; "
    "params 1091396 in first, 824937 in other;"
  ) in re.sub(r"\s+", " ", text)
  assert "student_0 is not the same network" not in text
  assert "other has no student_2, student_3, student_4" in text
  assert "other is unfinished: 3 of 9 epochs" in text
  assert "1.09 M" in text  # one column of sizes per run
  assert text.count("params") == 3  # two headings and the note


def test_compare_knows_one_network_by_its_size_not_by_its_width(tmp_path):
  # Channels are whole numbers: both widths give the same ones.
  first = write_run(tmp_path / "first", solo=None)
  widths = (1.0, 0.796875, *WIDTHS[2:])
  other = write_run(tmp_path / "other", solo=None, widths=widths)
  text = report.compare_text([first, other])
  assert "0.796875" in text  # as a difference of the configs
  assert "not the same network" not in text


def test_compare_takes_many_runs_and_tells_equal_names_apart(
  tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  dirs = [write_run(pathlib.Path(name) / "run", solo=None) for name in "abc"]
  text = report.compare_text(dirs)
  assert text.count("+0.00") == 12
  assert "a/run" in text


def test_compare_refuses_what_is_no_run(tmp_path):
  run = write_run(tmp_path / "run", solo=None)
  with pytest.raises(UserError, match="no run directory"):
    report.compare_table([run, tmp_path])
  with pytest.raises(UserError, match="two or more run directories, got 1"):
    report.compare_table([run])


def test_what_makes_a_comparison_unfair_is_named(tmp_path):
  first = write_run(tmp_path / "a", method="ekd", seed=0)
  fair = write_run(tmp_path / "b", method="dml", seed=1)
  assert report.unlike([first, fair]) == []
  other = write_run(
    tmp_path / "c", method="dml", epochs=4, batch_size=64, log_every=7
  )
  start = {
    "started": "later",
    "versions": {"jax": "0.11"},
    "devices": ["cpu:0", "cpu:1"],
    "variables": {"XLA_FLAGS": "--fast"},
    "git_commit": "abc-dirty",
  }
  (other / "environment.json").write_text(json.dumps({"starts": [{}, start]}))
  lines = report.unlike([first, other])
  assert [line.split(": ")[0].split()[-1] for line in lines] == [
    "batch_size", "epochs", "devices", "git_commit", "variables.XLA_FLAGS",
    "versions.jax",
  ]  # fmt: skip
  assert lines[0] == "the runs also differ in batch_size: 128 in a, 64 in c"
  assert lines[-1].endswith("0.10 in a, 0.11 in c")
