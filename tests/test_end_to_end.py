"""Real trainings from the command line to the report, each in its process."""

import html.parser
import io
import json
import math
import tarfile

import jax
import numpy as np
import pytest

from ekd_jax import run_directory
from tests import runs

# cifar100 with few records; the real counts are constants of the package.
FEW_RECORDS = """
import dataclasses, sys
from ekd_jax import cli
from ekd_jax.config import Config
from ekd_jax.data import cifar

cifar.LAYOUTS["cifar100"] = dataclasses.replace(
  cifar.LAYOUTS["cifar100"], train_records=80, test_records=40
)
cli.main(Config(), "Trains.", ["train", *sys.argv[1:]])
"""

VARIANTS = {
  "quick": (
    runs.EXPERIMENT,
    # As in runs.SMALL: of this training only the members alone are new.
    "--quick --ratios .5 --epochs 2 --batch-size 16 --train-examples 55 "
    "--learning-rate .01",
  ),
  "seeds": (
    runs.EXPERIMENT,
    "--dataset digits --depth 8 --ratios .5 --epochs 1 --batch-size 32 "
    "--train-examples 64 --seeds 0,1 --batch-norm local "
    "--validation-examples 30",
  ),
  "cifar": (
    "-c",
    "--dataset cifar100 --data-dir data --depth 8 --ratios .5 --epochs 1 "
    "--batch-size 32 --train-examples 64 --method dml --precision bfloat16",
  ),
}


def _write_cifar100(data_dir):
  """The official archive, as far as its format goes, with few records."""
  random = np.random.default_rng(0)
  data_dir.mkdir()
  with tarfile.open(data_dir / "cifar-100-binary.tar.gz", "w:gz") as archive:
    for name, count in (("train.bin", 80), ("test.bin", 40)):
      records = random.integers(0, 256, (count, 2 + 3 * 32 * 32), np.uint8)
      records[:, 0] %= 20
      records[:, 1] %= 100
      member = tarfile.TarInfo(f"cifar-100-binary/{name}")
      member.size = records.nbytes
      archive.addfile(member, io.BytesIO(records.tobytes()))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, trained):
  """{variant: (run directory, standard output)}."""
  del trained  # Only compiled before, for what they share.
  folder = tmp_path_factory.mktemp("finished")
  _write_cifar100(folder / "data")
  processes = {}
  for name, (script, flags) in VARIANTS.items():
    code = [FEW_RECORDS] if script == "-c" else []
    processes[name] = runs.start(
      script, *code, *flags.split(), "--run-dir", name, cwd=folder
    )
  return {
    name: (folder / name, runs.finish(process))
    for name, process in processes.items()
  }


MEMBER = {
  "name": str,
  "ratio_asked": float,
  "ratio": float,
  "width": float,
  "params": int,
  "macs": int,
  "top1": float,
  "top5": float,
  "best_top1": float,
  "best_epoch": int,
  "solo_top1": float,
  "relative_gain": float,
  "agreement": float,
}
BEST = {"best_top1", "best_epoch"}
ALONE = {"solo_top1", "relative_gain"}


def _summary(run_dir):
  text = (run_dir / "summary.json").read_text()
  return json.loads(text, parse_constant=lambda name: pytest.fail(name))


def _assert_shape(summary, *, null, more=()):
  """The fixed shape of summary.json; exactly the `null` fields are null."""
  assert list(summary) == [
    "method", "dataset", "network", "epochs", "seed", "members", "ensemble",
    *more,
  ]  # fmt: skip
  assert isinstance(summary["epochs"], int)
  for index, member in enumerate(summary["members"]):
    assert list(member) == list(MEMBER)
    assert member["name"] == f"student_{index}"
    for name, kind in MEMBER.items():
      if name in null:
        assert member[name] is None, name
      else:
        assert type(member[name]) is kind, name
    for name in ("top1", "top5", "agreement"):
      assert 0 <= member[name] <= 100
    assert member["top1"] <= member["top5"]
  assert list(summary["ensemble"]) == ["top1", "top5", "best_top1"]
  assert (summary["ensemble"]["best_top1"] is None) == ("best_top1" in null)
  assert type(summary["ensemble"]["top1"]) is float
  full = summary["members"][0]
  assert (full["ratio"], full["width"]) == (0.0, 1.0)


class _Page(html.parser.HTMLParser):
  """What a page would fetch from elsewhere."""

  def __init__(self):
    super().__init__()
    self.fetched = []
    self.pictures = 0

  def handle_starttag(self, tag, attributes):
    self.pictures += tag in ("img", "svg")
    for name, value in attributes:
      if tag == "a" or name not in ("src", "href", "xlink:href", "data"):
        continue
      if not value.startswith(("data:", "#")):
        self.fetched.append((tag, value))


def _assert_complete(run_dir):
  """All files of a run are there, and whole."""
  names = {path.name for path in run_dir.iterdir()}
  assert {
    "config.json", "command.txt", "environment.json", "metrics.jsonl",
    "tensorboard", "checkpoints", "summary.json", "report.html",
  } <= names  # fmt: skip
  assert not [name for name in names if name.endswith(".tmp")]
  assert list((run_dir / "tensorboard").iterdir())
  for line in run_directory.read_metrics(run_dir):
    numbers = [v for k, v in line.items() if k != "kind"]
    assert all(math.isfinite(number) for number in numbers)
  page = _Page()
  page.feed((run_dir / "report.html").read_text())
  assert page.fetched == []
  assert page.pictures


def test_quick_goes_from_a_command_to_a_report(finished):
  run_dir, shown = finished["quick"]
  lines = shown.splitlines()
  said = [line for line in lines if line.startswith("ekd: ")]
  assert [line.split()[1] for line in said[:4]] == [
    "drawing", "compiling,", "epoch", "epoch",
  ]  # fmt: skip
  assert "ekd: epoch 2/2" in shown
  assert "solo: epoch 2/2" in shown
  for member in _summary(run_dir)["members"]:
    (row,) = [x for x in lines if x.startswith(f" {member['name']} ")]
    assert f"{member['top1']:.2f}" in row
    assert f"{member['solo_top1']:.2f}" in row
  assert lines[-1] == f"report: {run_dir / 'report.html'}"
  for part in (run_dir, run_dir / "solo"):
    _assert_complete(part)
  assert "\x1b" not in shown


def test_quick_has_the_gain_in_its_summary(finished):
  run_dir, _ = finished["quick"]
  summary = _summary(run_dir)
  _assert_shape(summary, null=BEST)
  assert summary["method"] == "ekd"
  assert summary["dataset"] == "digits"
  assert summary["network"] == "resnet8"
  assert (summary["epochs"], summary["seed"]) == (2, 0)
  _assert_shape(_summary(run_dir / "solo"), null=BEST | ALONE)


def test_the_command_and_the_machine_are_on_record(finished):
  run_dir, _ = finished["quick"]
  (command,) = (run_dir / "command.txt").read_text().splitlines()
  assert command.startswith("python")
  assert f" {runs.EXPERIMENT} --quick " in command
  assert command.endswith("--run-dir quick")
  (start,) = run_directory.read_json(run_dir / "environment.json")["starts"]
  assert start["platform"] == "cpu"
  assert len(start["devices"]) == 4
  for package in ("python", "jax", "flax", "optax", "orbax-checkpoint"):
    assert start["versions"][package][0].isdigit()


def test_a_plain_run_has_nulls_for_what_it_did_not_measure(trained):
  _assert_shape(_summary(trained[4]), null=BEST | ALONE)
  _assert_complete(trained[4])


def test_seeds_with_local_batch_norm_and_held_out_images(finished):
  run_dir, shown = finished["seeds"]
  parts = []
  for seed in (0, 1):
    part = run_dir / f"seed_{seed}"
    _assert_complete(part)
    parts.append(_summary(part))
    _assert_shape(parts[-1], null=ALONE)
    assert parts[-1]["seed"] == seed
    assert f"seed_{seed}: epoch 1/1" in shown
    for member in parts[-1]["members"]:
      # There is one epoch only.
      assert member["best_epoch"] == 1
      assert member["best_top1"] == member["top1"]
  summary = _summary(run_dir)
  # The means of seeds have no one best epoch.
  _assert_shape(summary, null=ALONE | {"best_epoch"}, more=["std"])
  assert summary["seed"] == [0, 1]
  top1 = [part["members"][1]["top1"] for part in parts]
  assert summary["members"][1]["top1"] == pytest.approx(np.mean(top1))
  spread = summary["std"]["members"][1]["top1"]
  assert spread == pytest.approx(np.std(top1, ddof=1))
  assert (run_dir / "report.html").is_file()


def test_mutual_learning_in_bfloat16_on_an_archive_of_cifar100(finished):
  run_dir, _ = finished["cifar"]
  _assert_complete(run_dir)
  summary = _summary(run_dir)
  _assert_shape(summary, null=BEST | ALONE)
  assert (summary["method"], summary["dataset"]) == ("dml", "cifar100")
  lines = run_directory.read_metrics(run_dir)
  assert [line["kind"] for line in lines] == ["epoch", "test"]
  assert {"mutual/student_0", "mutual/student_1", "label/student_1"} <= set(
    lines[0]
  )
  assert lines[1]["examples"] == 40
  # The compute type is not the type of what is saved.
  state, _ = runs.final_state(run_dir)
  for part in ("params", "batch_stats"):
    kinds = {leaf.dtype for leaf in jax.tree.leaves(state["method"][part])}
    assert kinds == {np.dtype("float32")}
  # The data is read where it lies, not unpacked.
  (archive,) = (run_dir.parent / "data").iterdir()
  assert archive.name == "cifar-100-binary.tar.gz"
  config = run_directory.load_config(run_dir)
  assert config.data_dir == str(archive.parent)


@pytest.mark.slow
def test_quick_learns_to_read_digits(tmp_path):
  shown = runs.python(
    runs.EXPERIMENT, "--quick", "--run-dir", "run",
    cwd=tmp_path, devices=1, optimized=True,
  )  # fmt: skip
  run_dir = tmp_path / "run"
  assert shown.splitlines()[-1] == f"report: {run_dir / 'report.html'}"
  summary = _summary(run_dir)
  assert len(summary["members"]) == 4
  assert summary["ensemble"]["top1"] > 93
  # The thinnest has 3 % of the parameters.
  for member, least in zip(summary["members"], (90, 90, 90, 70), strict=True):
    assert member["top1"] > least, member["name"]
    assert member["solo_top1"] > least, member["name"]
  _assert_complete(run_dir)
