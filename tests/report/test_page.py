"""The page, read as a browser would."""

import html.parser
import json
import math
import re

import pytest

from ekd_jax import report
from ekd_jax.errors import UserError
from tests.report.made import (
  TOP1,
  edit_metrics,
  write_metrics,
  write_run,
  write_seeds,
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


def test_what_else_is_scored_is_in_the_table_the_legend_and_the_curves(
  tmp_path,
):
  run = write_run(tmp_path / "run", solo=None)
  edit_metrics(
    run,
    lambda line: (
      line | {"top1/peer_0": 12.34} if line["kind"] == "test" else line
    ),
  )
  document = report.write(run).read_text()
  assert "<td>12.34</td>" in document
  legend = document.split('<ul class="legend">')[1].split("</ul>")[0]
  assert "peer_0" in legend
