"""Reports of runs that never trained: their files are written here."""

import html.parser
import io
import json
import math
import random
import re

import pytest
from rich.console import Console

from ekd_jax import config, report
from ekd_jax.errors import UserError
from ekd_jax.report import curves, findings, formatting, runs

WIDTHS = (1.0, 0.8, 0.6, 0.4, 0.2)
TOP1 = (72.8, 70.1, 67.7, 65.1, 46.8)
SOLO = (72.6, 69.5, 67.1, 64.6, 42.3)


def write_run(
  path,
  *,
  top1=TOP1,
  solo=SOLO,
  ensemble=74.1,
  epochs=3,
  epochs_asked=None,
  validation=False,
  terms=("label", "feature", "distill"),
  **options,
):
  """A run directory; unfinished if it asks for more epochs than it has."""
  path.mkdir(parents=True)
  epochs_asked = epochs_asked or epochs
  options = {
    "widths": WIDTHS[: len(top1)],
    "epochs": epochs_asked,
    "with_solo": solo is not None,
    "run_dir": str(path),
    **options,
  }
  (path / "config.json").write_text(
    json.dumps(config.to_json(config.Config(**options)))
  )
  (path / "command.txt").write_text("python train.py --widths 1,.8\n")
  (path / "environment.json").write_text(
    json.dumps({"starts": [{"started": "noon", "versions": {"jax": "0.10"}}]})
  )
  noise = random.Random(options.get("seed", 0))
  lines = []
  for epoch in range(1, epochs + 1):
    done = epoch / epochs_asked
    place = {"epoch": epoch, "step": 390 * epoch}
    drop = sum(done > at for at in (0.5, 0.75))
    logged = {"loss": 8 * math.exp(-2 * done), "learning_rate": 0.1**drop / 10}
    reached = 0.4 + 0.6 * done
    tested = {"top1/ensemble": ensemble * reached}
    for index, value in enumerate(top1):
      name = f"student_{index}"
      wobble = noise.gauss(0, 2) * (1 - done)
      tested[f"top1/{name}"] = value * reached + wobble
      tested[f"agreement/{name}"] = (90 - 8 * index) * reached + wobble
      for term in terms:
        value = (3 + index / 3) * math.exp(-2 * done) + noise.random() / 10
        if term != "feature":
          logged[f"{term}/{name}"] = value
        elif index:
          for block in range(3):
            logged[f"feature/{name}/block_{block}"] = value * (block + 1) / 4
    lines.append({"kind": "epoch", **place, **logged})
    lines.append({"kind": "test", **place, **tested})
    if validation:
      lines.append({"kind": "validation", **place, **tested})
  write_metrics(path, lines)
  if solo is not None:
    write_run(
      path / "solo",
      top1=solo,
      solo=None,
      epochs=epochs,
      epochs_asked=epochs_asked,
      terms=("label",),
      method="solo",
    )
  return path


def write_metrics(path, lines):
  (path / "metrics.jsonl").write_text(
    "".join(json.dumps(line) + "\n" for line in lines)
  )


def write_seeds(path, ensembles=(74.1, 74.7)):
  """Two seeds whose full networks differ by one point."""
  seeds = tuple(range(len(ensembles)))
  for seed, ensemble in zip(seeds, ensembles, strict=True):
    top1 = (TOP1[0] + seed, *TOP1[1:])
    write_run(
      path / f"seed_{seed}", seed=seed, top1=top1, ensemble=ensemble, epochs=2
    )
  options = config.Config(widths=WIDTHS, epochs=2, seeds=seeds, with_solo=True)
  (path / "config.json").write_text(json.dumps(config.to_json(options)))
  return path


def edit_metrics(path, edit):
  """Applies `edit` to each line of a run's metrics."""
  text = (path / "metrics.jsonl").read_text()
  write_metrics(path, [edit(json.loads(line)) for line in text.splitlines()])


def summary(members, ensemble=None, **more):
  fields = (
    "ratio_asked", "ratio", "width", "params", "macs", "top1", "top5",
    "best_top1", "best_epoch", "solo_top1", "relative_gain", "agreement",
  )  # fmt: skip
  return {
    "method": "ekd",
    "dataset": "cifar100",
    "network": "resnet110",
    "epochs": 3,
    "seed": 0,
    "members": [
      {"name": f"student_{i}", **dict.fromkeys(fields), **member}
      for i, member in enumerate(members)
    ],
    "ensemble": {"top1": ensemble, "top5": None, "best_top1": None},
    **more,
  }


def a_run(members, ensemble=None, *, epochs=3, records=(), solo=None, **more):
  """A run as `runs.load` gives it, finished unless `epochs` says more."""
  done = [{"kind": "epoch", "epoch": 3, "step": 9}]
  return runs.Run(
    path=None,
    config={"epochs": epochs, **more},
    summary=summary(members, ensemble),
    records=[*done, *records],
    solo=solo,
    seeds=[],
  )


class Page(html.parser.HTMLParser):
  """Checks that tags nest, and collects what a test asks about."""

  VOID = {"meta", "br", "img", "link", "hr"}

  def __init__(self, text):
    super().__init__()
    self.tags, self.ids, self.references, self.data = [], [], [], []
    self._open = []
    self.feed(text)
    self.close()
    assert self._open == []
    self.text = re.sub(r"\s+", " ", " ".join(self.data))

  def handle_starttag(self, tag, attrs):
    self.handle_startendtag(tag, attrs)
    if tag not in self.VOID:
      self._open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.tags.append(tag)
    for name, value in attrs:
      if name == "id":
        self.ids.append(value)
      if name in ("href", "src", "xlink:href", "action", "srcset"):
        self.references.append(value)

  def handle_endtag(self, tag):
    assert self._open.pop() == tag

  def handle_data(self, data):
    if "style" not in self._open:
      self.data.append(data)


def written(run_dir):
  text = report.write(run_dir).read_text(encoding="utf-8")
  assert not re.search(r"\bnan\b", text, re.IGNORECASE)
  return text


@pytest.fixture(scope="module")
def full(tmp_path_factory):
  """A finished run with everything, and its page."""
  run_dir = write_run(
    tmp_path_factory.mktemp("full") / "run", epochs=30, validation=True
  )
  return run_dir, written(run_dir)


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
  first = write_run(tmp_path / "first", seed=0)
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


def test_compare_takes_many_runs_and_tells_equal_names_apart(tmp_path):
  dirs = [write_run(tmp_path / name / "run", solo=None) for name in "abc"]
  text = report.compare_text(dirs)
  assert text.count("+0.00") == 12
  # Whole paths, folded into the width of a cell.
  assert "/a/run" in re.sub(r"\s", "", text)


def test_compare_refuses_what_is_no_run(tmp_path):
  run = write_run(tmp_path / "run", solo=None)
  with pytest.raises(UserError, match="no run directory"):
    report.compare_table([run, tmp_path])
  with pytest.raises(UserError, match="two or more run directories, got 1"):
    report.compare_table([run])


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


# The page.


def test_page_is_well_formed_and_complete(full):
  page = Page(full[1])
  assert page.text.count("student_4") > 3
  for expected in (
    "One run, 5 networks from 1.74 M to 64.2 k parameters",
    "All 5 end above the same network trained alone",
    "by 0.20 to 4.50 points",
    "Accuracy against size",
    "Validation accuracy while training",
    "Loss terms",
    "distill",
    "learning rate",
    "Agreement with the ensemble",
    "Ensemble minus best member",
    "python train.py --widths 1,.8",
    "starts.versions.jax",
    "label_weight",
  ):
    assert expected in page.text.replace("\N{NO-BREAK SPACE}", " ")
  # Three of accuracy, loss, three terms, learning rate, two of the ensemble.
  assert page.tags.count("svg") == 10
  assert len(page.ids) == len(set(page.ids))
  assert 'class="warning"' not in full[1]


def test_page_needs_nothing_else(full):
  text = full[1]
  page = Page(text)
  assert "http:" not in text
  assert "https:" not in text
  assert "@import" not in text
  assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
  # References stay inside the page, and lead somewhere.
  targets = {f"#{name}" for name in page.ids}
  assert page.references
  assert set(page.references) <= targets
  assert set(re.findall(r"url\((.*?)\)", text)) <= targets


def test_figures_follow_the_theme(full):
  text = full[1]
  assert "#fe01" not in text  # placeholders of the page's colours
  defined = set(re.findall(r"(--[\w-]+):", text))
  assert set(re.findall(r"var\((--[\w-]+)\)", text)) <= defined
  drawn = "".join(re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL))
  assert "var(--series-4)" in drawn
  # A colour of matplotlib's own would not change in the dark.
  assert not re.findall(r"(?:stroke|fill): #", drawn)


def test_page_is_the_same_every_time_and_leaves_no_other_file(full):
  run_dir, text = full
  before = sorted(run_dir.iterdir())
  assert written(run_dir) == text
  assert sorted(run_dir.iterdir()) == before


def test_what_a_run_directory_says_is_escaped(tmp_path):
  run_dir = write_run(tmp_path / "run", solo=None, data_dir="<b>&'\"")
  evil = "python <script>alert(1)</script>"
  (run_dir / "command.txt").write_text(f"{evil}\npython & again\n")
  (run_dir / "environment.json").write_text(json.dumps({"<i>": "</td>"}))
  edit_metrics(run_dir, lambda line: {**line, "<u>/student_0": 1.0})
  text = written(run_dir)
  page = Page(text)
  assert evil in page.text
  assert "2 starts" in page.text
  assert not {"script", "b", "i", "u"} & set(page.tags)


def test_environment_of_several_starts_says_each_value_once(tmp_path):
  run_dir = write_run(tmp_path / "run", solo=None, epochs=1)
  (run_dir / "environment.json").write_text(
    json.dumps(
      {
        "starts": [
          {"started": "noon", "versions": {"jax": "0.10.2"}},
          {"started": "night", "versions": {"jax": "0.10.2"}},
        ]
      }
    )
  )
  text = written(run_dir)
  assert "noon, night" in text
  assert text.count("0.10.2") == 1


def test_page_warns_of_an_ensemble_that_is_worse(tmp_path):
  text = written(write_run(tmp_path / "run", ensemble=72.0, epochs=1))
  assert text.count('class="warning"') == 1
  assert "0.80 points below its best member, student_0" in Page(text).text


def test_a_gain_is_coloured_by_its_sign(tmp_path):
  solo = (TOP1[0] - 1, TOP1[1] + 1, *TOP1[2:])
  text = written(write_run(tmp_path / "run", solo=solo, epochs=1))
  assert re.findall(r'<td class="(\w+)">([+-])', text) == [
    ("good", "+"),
    ("bad", "-"),
  ]


def test_page_of_one_epoch_has_points(tmp_path):
  text = written(write_run(tmp_path / "run", epochs=1))
  assert Page(text).tags.count("svg") == 9
  # A point is a marker: without it the panel would be empty.
  panel = text[text.index("<h3>distill") :]
  assert panel[: panel.index("</svg>")].count("<use") >= 5


def test_page_of_one_member(tmp_path):
  text = written(
    write_run(tmp_path / "run", top1=(70.0,), solo=None, ensemble=70.0)
  )
  page = Page(text)
  assert "1 network of" in page.text
  assert "Ensemble minus best member" not in page.text
  assert "the same network trained alone." not in page.text


@pytest.mark.parametrize("lines", [None, []])
def test_page_of_a_run_that_has_just_started(tmp_path, lines):
  run_dir = write_run(tmp_path / "run", solo=None, epochs_asked=9)
  if lines is None:
    (run_dir / "metrics.jsonl").unlink()
  else:
    write_metrics(run_dir, lines)
  text = written(run_dir)
  page = Page(text)
  assert "no test accuracy yet" in page.text
  assert "not finished: 0 of 9 epochs" in page.text
  assert "svg" not in page.tags
  for heading in ("Accuracy", "Loss terms", "The ensemble"):
    assert f"<h2>{heading}" not in text


def test_page_of_an_unfinished_run_says_so(tmp_path):
  page = Page(written(write_run(tmp_path / "run", epochs_asked=30)))
  assert "This run is not finished: 3 of 30 epochs" in page.text
  assert "Training alone is not finished" in page.text
  assert "so far the smallest reaches" in page.text


def test_page_without_tests_shows_the_loss(tmp_path):
  run_dir = write_run(tmp_path / "run", solo=None)
  lines = (run_dir / "metrics.jsonl").read_text().splitlines()
  kept = [json.loads(line) for line in lines if '"epoch",' in line]
  write_metrics(run_dir, [line for line in kept if line["kind"] == "epoch"])
  page = Page(written(run_dir))
  assert "no test accuracy was measured" in page.text
  assert page.tags.count("svg") == 5


def test_page_survives_figures_that_are_not_finite(tmp_path):
  run_dir = write_run(tmp_path / "run", epochs=4)

  def break_it(line):
    if line["epoch"] == 2:
      line["loss"] = math.inf
      line["top1/student_1"] = math.nan
    return {
      key: math.nan if key.startswith("distill/") else value
      for key, value in line.items()
    }

  edit_metrics(run_dir, break_it)
  text = written(run_dir)
  page = Page(text)
  assert "logged figures are not finite" in page.text
  assert "<h3>label</h3>" in text
  assert "<h3>distill</h3>" not in text  # nothing there to draw
  drawn = re.findall(r' d="(.*?)"', text, flags=re.DOTALL)
  assert drawn
  assert not [path for path in drawn if "nan" in path or "inf" in path]


def test_page_of_seeds_has_means_spreads_and_links(tmp_path):
  run_dir = write_seeds(tmp_path / "runs")
  text = written(run_dir)
  page = Page(text)
  assert "2 runs of 5 networks" in page.text
  assert "73.3 ± 0.7" in page.text  # 72.8 and 73.8
  assert "72.80" in page.text
  assert "seeds 0, 1" in page.text
  links = [link for link in page.references if not link.startswith("#")]
  assert links == ["seed_0/report.html", "seed_1/report.html"]
  for link in links:
    assert "One run, 5 networks" in (run_dir / link).read_text()


def test_page_of_seeds_says_that_seeds_are_missing(tmp_path):
  run_dir = write_seeds(tmp_path / "runs")
  values = json.loads((run_dir / "config.json").read_text())
  values["seeds"] = [0, 1, 2]
  (run_dir / "config.json").write_text(json.dumps(values))
  assert "not finished: 2 of 3 seeds started" in Page(written(run_dir)).text


def test_page_of_a_long_run_stays_small(tmp_path):
  text = written(write_run(tmp_path / "run", epochs=450, validation=True))
  assert len(text.encode()) < 1_500_000


def test_write_refuses_what_is_no_run(tmp_path):
  with pytest.raises(UserError, match="no run directory"):
    report.write(tmp_path)
  assert list(tmp_path.iterdir()) == []
