"""What is read off a run: curves, and the sentences about it."""

import math

import pytest

from ekd_jax.report import curves, findings
from tests.report.made import a_run

# Curves.


def test_the_later_line_of_an_epoch_counts_and_nan_stays_a_gap():
  lines = [
    {"kind": "test", "epoch": 2, "top1/a": 5.0},
    {"kind": "test", "epoch": 1, "top1/a": math.inf},
    {"kind": "test", "epoch": 2, "top1/a": 6.0},
    {"kind": "epoch", "epoch": 2, "top1/a": 7.0},
  ]
  found = curves.curve(lines, "test", "top1/a")
  assert list(found) == [1, 2]
  assert math.isnan(found[1])
  assert found[2] == 6.0


def test_terms_are_found_and_averaged_over_their_parts():
  line = {
    "kind": "epoch", "epoch": 1, "step": 9, "loss": 3.0, "note": "x",
    "fusion/a": 1.0, "feature/a/block_0": 1.0, "feature/a/block_1": 2.0,
  }  # fmt: skip
  assert curves.terms([line]) == {
    "fusion": {"a": {1: 1.0}},
    "feature": {"a": {1: 1.5}},
  }
  assert curves.scalars([line]) == {"loss": {1: 3.0}}


@pytest.mark.parametrize("count", [1, 449, 450, 451, 5000])
def test_thin_keeps_the_ends(count):
  thinned = curves.thin({epoch: 0.0 for epoch in range(1, count + 1)})
  assert len(thinned) <= 451
  assert min(thinned) == 1
  assert max(thinned) == count


# Sentences.


def test_headline_of_a_good_run():
  run = a_run(
    [{"params": 276_000, "top1": 70.0}, {"params": 11_000, "top1": 65.5}]
  )
  assert findings.headline(run) == (
    "One run, 2 networks from 276 k to 11.0 k parameters: the smallest "
    "reaches 65.50 % top-1, the largest 70.00 %."
  )


def test_headlines_of_other_runs():
  def headline(*members, **options):
    return findings.headline(a_run(members, **options))

  same = {"params": 276_000}
  assert headline({**same, "top1": 70.0}, {**same, "top1": 71.0}) == (
    "One run, 2 networks of 276 k parameters each: they reach 70.00 % to "
    "71.00 % top-1."
  )
  assert headline({**same, "top1": 70.0}) == (
    "One run, 1 network of 276 k parameters: student_0 reaches 70.00 % top-1."
  )
  assert headline(same, epochs=9).endswith(": no test accuracy yet.")
  assert headline({}).endswith("1 network: no test accuracy was measured.")
  assert "so far student_0 reaches" in headline({"top1": 1.0}, epochs=9)


@pytest.mark.parametrize(
  ("gains", "expected"),
  [
    ((0.2, 4.5), "All 2 end above the same network trained alone"),
    ((-0.2, 4.5), "1 of 2 end above"),
    ((-0.2, 0.0), "None of 2 end above"),
    ((0.5,), "student_0 ends 0.50 points above"),
    ((-0.5,), "student_0 ends 0.50 points below"),
    ((0.0,), "student_0 ends level with"),
    ((), "is not known"),
  ],
)
def test_comparison_with_solo_is_true(gains, expected):
  members = [{"top1": 60.0, "solo_top1": 60.0 - gain} for gain in gains]
  assert expected in findings.against_solo(a_run(members or [{"top1": 60.0}]))


def test_comparison_with_solo_names_the_losers_and_waits_for_the_end():
  members = [
    {"top1": 60.0, "solo_top1": 61.5},
    {"top1": 60.0, "solo_top1": 50.0},
  ]
  said = findings.against_solo(a_run(members, epochs=9))
  assert "stand so far above" in said
  assert "student_0 -1.50" in said
  assert "student_1" not in said
  waiting = findings.against_solo(a_run([{"top1": 60.0}], with_solo=True))
  assert "yet" in waiting
  alone = findings.against_solo(a_run([{"top1": 60.0}], method="solo"))
  assert "baseline" in alone


def test_ensemble_warning_appears_only_at_the_end_and_only_when_worse():
  def warned(top1, ensemble, **options):
    run = a_run([{"top1": value} for value in top1], ensemble, **options)
    return [w for w in findings.warnings(run) if "ensemble ends" in w]

  assert (
    "1.50 points below its best member, student_1"
    in (warned((60.0, 71.5), 70.0)[0])
  )
  assert not warned((60.0, 70.0), 70.0)
  assert not warned((60.0, 65.0), 70.0)
  assert not warned((60.0, 71.5), 70.0, epochs=9)
  assert not warned((60.0, None), 50.0)  # alone it is no ensemble
  assert not warned((60.0, 71.5), None)


def test_warnings_of_a_sound_run_are_none():
  assert findings.warnings(a_run([{"top1": 60.0}] * 2, 70.0)) == []


def test_figures_that_are_not_finite_are_counted_and_placed():
  bad = [
    {"kind": "step", "epoch": 2, "step": 5, "label/student_1": math.nan},
    {"kind": "epoch", "epoch": 2, "step": 6, "loss": math.inf},
  ]
  (warning,) = findings.warnings(a_run([{}], records=bad))
  assert "2 logged figures are not finite" in warning
  assert "label/student_1 in epoch 2" in warning
