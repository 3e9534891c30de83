"""The command line: one line for every mistake, and nothing written.

Trainings here are those of the tiny method (tests/tiny.py); real ones are in
test_end_to_end.py.
"""

import dataclasses
import json
import re
import shlex
import shutil

import pytest

from ekd_jax import build, cli
from ekd_jax import config as configs
from ekd_jax.config import Config
from ekd_jax.training import loop
from tests import runs, tiny

DEFAULTS = Config(dataset="cifar100", depth=110)
# Flags of a training that would be fine.
FINE = "--dataset digits --depth 8 --batch-size 32 --run-dir run "


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
  """An empty working directory, with a file and a foreign folder beside it."""
  (tmp_path / "foreign").mkdir()
  (tmp_path / "foreign" / "thesis.tex").write_text("years of work")
  (tmp_path / "file").write_text("")
  (tmp_path / "here").mkdir()
  monkeypatch.chdir(tmp_path / "here")
  return tmp_path


def _main(arguments, defaults=DEFAULTS):
  cli.main(defaults, "Trains.", ["train", *shlex.split(arguments)])


def _error(capsys, call):
  """The one line that a mistake is answered with."""
  with pytest.raises(SystemExit) as caught:
    call()
  shown = capsys.readouterr()
  assert caught.value.code == 2
  assert shown.out == ""
  (line,) = shown.err.splitlines()
  assert line.startswith("error: ")
  return line


MISTAKES = [
  # Words that are no flags.
  ("--epoch 3", "--epoch is not a known option: did you mean --epochs?"),
  ("--epoch=3", "did you mean --epochs?"),
  ("--ratio .5", "did you mean --ratios?"),
  ("--learning_rat .5", "did you mean --learning-rate?"),
  ("--no-plan", "did you mean --plan?"),
  ("--frobnicate", "--frobnicate is not a known option"),
  ("-x", "-x is not a known option"),
  ("run", "run is not a known option"),
  ("--ratios .5 .75", ".75 is not a known option"),
  ("--with-solo yes", "yes is not a known option"),
  # Values of the wrong kind.
  ("--epochs", "--epochs needs a value"),
  ("--epochs --plan", "--epochs needs a value"),
  ("--learning-rate", "--learning-rate needs a value"),
  ("--run-dir", "--run-dir needs a value"),
  ("--epochs ten", "--epochs: 'ten' is not a whole number"),
  ("--epochs 1.5", "--epochs: '1.5' is not a whole number"),
  ("--seed 1.5", "--seed: '1.5' is not a whole number"),
  ("--learning-rate fast", "--learning-rate: 'fast' is not a number"),
  ("--ratios a,b", "--ratios: 'a,b' is not a comma-separated list"),
  ("--ratios .5,", "--ratios: '.5,' is not a comma-separated list"),
  ("--ratios ''", "--ratios: '' is not a comma-separated list"),
  ("--seeds 0,x", "--seeds: '0,x' is not a comma-separated list"),
  ("--dataset imagenet", "choose one of cifar100, cifar10, digits"),
  ("--method edk", "--method edk is not possible: choose one of ekd, solo"),
  ("--precision float16", "choose one of float32, bfloat16"),
  ("--batch-norm sync", "choose one of global, local"),
  ("--base-gradients none", "choose one of all, first"),
  ("--conv im2col", "--conv im2col is not possible: choose one of auto, lax"),
  ("--scan yes", "--scan yes is not possible: choose one of auto, on, off"),
  ("--compilation-cache", "did you mean --no-compilation-cache?"),
  ("--tune-allocator", "did you mean --no-tune-allocator?"),
  # Values out of range.
  ("--epochs 0", "--epochs is 0: must be a whole number of at least 1"),
  ("--epochs -1", "--epochs is -1"),
  ("--learning-rate nan", "--learning-rate is nan"),
  ("--learning-rate inf", "--learning-rate is inf"),
  ("--momentum 1", "--momentum is 1: must be a number in [0, 1)"),
  ("--ratios 0", "--ratios is 0: must be fractions"),
  ("--ratios 1", "--ratios is 1: must be fractions"),
  ("--ratios 1.5", "--ratios is 1.5: must be fractions"),
  ("--ratios -.5", "--ratios is -0.5: must be fractions"),
  ("--ratios nan", "--ratios is nan: must be fractions"),
  ("--ratios .5,.5", "--ratios is 0.5,0.5: give each value once"),
  ("--seeds 1,1", "--seeds is 1,1: give each value once"),
  ("--seeds 0,-1", "--seeds is 0,-1"),
  ("--depth 21", "--depth is 21: must be 6n + 2"),
  ("--seed 4294967296", "--seed is 4294967296: must be below 2^32"),
  ("--batch-size 0", "--batch-size is 0"),
  ("--train-examples 0", "--train-examples is 0"),
  ("--validation-examples -1", "--validation-examples is -1"),
  # Networks that are not there.
  ("--ratios .0001", "ratio 0.0001 cannot be reached"),
  ("--ratios .5,.501", "ratio 0.501 gives the same network as student_1"),
  ("--ratios .5 --widths 1,.5", "--ratios and --widths were both given"),
  ("--widths .5,.25", "--widths starts with 0.5: the full network, 1, must"),
  ("--widths 1,.05", "width 0.05 leaves a stage without channels"),
  ("--widths 1,1.5", "--widths is 1,1.5"),
  # Things that do not go together.
  ("--with-solo --method solo", "--with-solo was given with --method solo"),
  # Data.
  ("--train-examples 1438", "--train-examples 1438 of digits is out of range"),
  ("--validation-examples 1437", "--validation-examples 1437 of digits"),
  (
    "--validation-examples 1400 --train-examples 38",
    "give 1 to 37",
  ),
  ("--dataset cifar100", "--dataset cifar100 needs --data-dir DIR"),
  ("--dataset cifar100 --data-dir nowhere", "which does not exist"),
  ("--dataset cifar10 --data-dir ../foreign", "has no cifar10"),
  ("--dataset cifar100 --data-dir ../file", "is a file"),
  # Batches.
  (
    "--train-examples 31",
    "--batch-size is 32 but there are only 31 training images: use at most 28",
  ),
  (
    "--batch-size 30",
    "--batch-size is 30, which does not divide by the 4 devices: use 28 or 32",
  ),
  ("--batch-size 3", "by the 4 devices: use 4"),
  # Directories.
  ("--run-dir ../file", "is a file: name a directory"),
  ("--run-dir ../file/run", "cannot be written"),
  ("--run-dir ../foreign", "holds files but no run"),
]


@pytest.mark.parametrize(
  ("flags", "said"), MISTAKES, ids=[flags for flags, _ in MISTAKES]
)
def test_a_mistake_is_told_in_one_line_and_nothing_is_written(
  flags, said, folder, capsys
):
  before = runs.contents(folder)
  line = _error(capsys, lambda: _main(FINE + flags))
  assert said in line
  assert runs.contents(folder) == before


def test_what_is_fine_is_not_refused(folder, capsys, monkeypatch):
  # That the mistakes above, and not FINE, are what is refused.
  class Started(Exception):
    pass

  def train(*arguments, **options):
    raise Started

  monkeypatch.setattr("ekd_jax.training.loop.train", train)
  with pytest.raises(Started):
    _main(FINE)


def test_split_convolutions_are_refused_where_there_is_no_cpu(
  folder, capsys, monkeypatch
):
  monkeypatch.setattr("jax.default_backend", lambda: "gpu")
  before = runs.contents(folder)
  line = _error(capsys, lambda: _main(FINE + "--conv split"))
  assert "--conv is split, which is for CPUs, and the devices are gpu" in line
  assert "use auto or lax" in line
  assert runs.contents(folder) == before


@pytest.mark.parametrize(
  ("conv", "platform"),
  [
    ("split", "cpu"),
    *((c, p) for c in ("auto", "lax") for p in ("cpu", "gpu")),
  ],
)
def test_other_formulations_are_for_every_platform(conv, platform, monkeypatch):
  monkeypatch.setattr("jax.default_backend", lambda: platform)
  loop.check_devices(Config(batch_size=32, conv=conv))


@pytest.mark.parametrize("flags", ["--seeds 0,1", "--with-solo"])
def test_a_foreign_directory_in_the_place_of_a_part_is_refused(
  flags, folder, capsys
):
  part = folder / "here" / "run" / ("seed_1" if "seeds" in flags else "solo")
  part.parent.mkdir()
  shutil.copytree(folder / "foreign", part)
  before = runs.contents(folder)
  assert "holds files but no run" in _error(capsys, lambda: _main(FINE + flags))
  assert runs.contents(folder) == before


# --plan and --help


def test_a_plan_shows_the_members_and_the_totals_and_writes_nothing(
  folder, capsys
):
  before = runs.contents(folder)
  _main(
    "--plan --ratios .5,.97 --epochs 3 --batch-size 100 --seeds 0,1 --with-solo"
  )
  shown = capsys.readouterr()
  assert shown.err == ""
  table, _, totals = shown.out.rpartition("ekd on")
  for member in build.members(configs.resolve(Config(ratios=(0.5, 0.97)))):
    (row,) = [row for row in table.splitlines() if member.name in row]
    assert f"{member.ratio:.3f}" in row
  # No data is there to count: the published set has 50,000.
  assert "cifar100: 50000 training images" in totals
  assert "3 epochs of 500 steps = 1500 steps of 100 images" in totals
  assert "2 seeds" in totals
  assert "each student alone" in totals
  assert runs.contents(folder) == before


def test_a_plan_counts_the_examples_that_are_left(capsys):
  _main(
    "--dataset digits --depth 8 --plan --batch-size 32 --epochs 2 "
    "--train-examples 110 --validation-examples 40"
  )
  assert "110 training images, 2 epochs of 3 steps" in capsys.readouterr().out
  _main("--dataset digits --depth 8 --plan --validation-examples 400")
  assert "1037 training images" in capsys.readouterr().out


@pytest.mark.parametrize(
  ("flags", "said"),
  [
    ("--widths 1,.05", "without channels"),
    ("--train-examples 50001", "--train-examples 50001 of cifar100"),
    ("--validation-examples 50000", "--validation-examples 50000"),
    ("--train-examples 100 --batch-size 128", "only 100 training images"),
  ],
)
def test_a_plan_refuses_what_training_would(flags, said, capsys):
  assert said in _error(capsys, lambda: _main("--plan " + flags))


def test_help_names_every_option_with_its_default(capsys):
  with pytest.raises(SystemExit) as caught:
    _main("--help")
  assert caught.value.code == 0
  shown = capsys.readouterr().out
  for field in dataclasses.fields(Config):
    # What is on by default has a switch that turns it off.
    name = f"no_{field.name}" if field.default is True else field.name
    assert f"{configs.flag(name)} " in shown + " ", field.name
  assert "Trains." in shown
  text = " ".join(re.sub(r"[│╭╮╰╯─]", " ", shown).split())
  assert "Learning rate at the start. (default: 0.1)" in text
  assert "Nesterov momentum, in [0, 1). (default: 0.9)" in text


def test_planning_and_helping_load_nothing_heavy(tmp_path):
  code = """
import sys
from ekd_jax import cli
from ekd_jax.config import Config
try:
  cli.main(Config(), "Trains.", ["train", sys.argv[1]])
except SystemExit as end:
  assert not end.code
heavy = {"orbax", "tensorflow", "tensorflow_datasets", "matplotlib",
         "sklearn", "tensorboardX"}
if sys.argv[1] == "--help":
  heavy |= {"jax", "flax"}
print("loaded:", sorted(heavy & set(sys.modules)))
"""
  processes = [
    runs.start("-c", code, flag, cwd=tmp_path) for flag in ("--plan", "--help")
  ]
  for process in processes:
    assert runs.finish(process).splitlines()[-1] == "loaded: []"


def test_losses_alone_need_no_flax(tmp_path):
  code = """
import sys, ekd_jax.losses
print(sorted({"flax", "orbax", "tyro", "rich"} & set(sys.modules)))
"""
  assert runs.python("-c", code, cwd=tmp_path) == "[]\n"


# How flags become a config.


def _parse(arguments, defaults=DEFAULTS):
  return cli.parse(defaults, "Trains.", shlex.split(arguments))


def test_every_option_can_be_given():
  given = _parse(
    "--ratios .5,.75 --seeds 3,4 --learning-rate-drops .3 --epochs 7 "
    "--train-examples 9 --method dml --with-solo --learning-rate 1e-3 "
    "--data-dir D --run-dir=R --batch_size 16"
  )
  assert given.ratios == (0.5, 0.75)
  assert given.seeds == (3, 4)
  assert given.learning_rate_drops == (0.3,)
  assert (given.epochs, given.train_examples) == (7, 9)
  assert (given.method, given.with_solo) == ("dml", True)
  assert (given.learning_rate, given.batch_size) == (1e-3, 16)
  assert (given.data_dir, given.run_dir) == ("D", "R")
  assert given.depth == 110


def test_quick_changes_what_is_not_given():
  quick = _parse("--quick")
  assert (quick.dataset, quick.depth) == ("digits", 8)
  assert quick.with_solo
  given = _parse("--epochs 2 --quick --batch-size 16 --widths 1,.5")
  assert (given.epochs, given.batch_size) == (2, 16)
  assert (given.dataset, given.widths, given.ratios) == (
    "digits", (1.0, 0.5), None,
  )  # fmt: skip


@pytest.mark.parametrize("method", ["ekd", "dml", "solo"])
def test_quick_works_with_every_method(method):
  config = configs.resolve(_parse(f"--quick --method {method}"))
  assert config.method == method
  # Members that are alone already need no second training.
  assert config.with_solo == (method != "solo")


def test_widths_take_the_place_of_an_experiments_ratios():
  defaults = dataclasses.replace(DEFAULTS, ratios=(0.5,))
  config = configs.resolve(_parse("--widths 1,.25", defaults))
  assert config.ratios is None


# Trainings.


@pytest.fixture
def tiny_method(monkeypatch):
  monkeypatch.setattr(build, "method", tiny.method)


def _train(more=""):
  _main(shlex.join(tiny.FLAGS) + " --run-dir run " + more)


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
  line = _error(capsys, lambda: _train("--learning-rate .5 --epochs 3"))
  assert "--learning-rate (there 0.02, now 0.5)" in line
  assert "--epochs (there 2, now 3)" in line
  line = _error(capsys, lambda: _train("--seeds 0,1"))
  assert "--seeds" in line
  assert runs.contents(folder) == before


def test_a_run_goes_on_in_another_formulation(tiny_method, folder, capsys):
  _train("--conv lax --scan off")
  capsys.readouterr()
  _train("--conv split --scan on --no-compilation-cache --no-tune-allocator")
  assert "finished before" in capsys.readouterr().out
  # The record says what was used last.
  config = json.loads((folder / "here" / "run" / "config.json").read_text())
  assert (config["conv"], config["scan"]) == ("split", "on")


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
  assert caught.value.code == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith("error: step ")
  assert "is not finite" in line


def test_a_bug_keeps_its_traceback(monkeypatch):
  def train(*arguments, **options):
    raise ZeroDivisionError("a bug")

  monkeypatch.setattr("ekd_jax.training.loop.train", train)
  with pytest.raises(ZeroDivisionError):
    _main(FINE)


# python -m ekd_jax


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
  assert said in _error(capsys, lambda: _tools(*arguments))
  assert runs.contents(folder) == before
