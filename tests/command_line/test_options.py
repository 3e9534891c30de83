"""Plans, the help text, and how flags become a config."""

import dataclasses
import re
import shlex

import pytest

from ekd_jax import build, cli
from ekd_jax import config as configs
from ekd_jax.config import Config
from tests import runs
from tests.command_line.called import DEFAULTS, error, main

# --plan and --help


def test_a_plan_shows_the_members_and_the_totals_and_writes_nothing(
  folder, capsys
):
  before = runs.contents(folder)
  main(
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
  main(
    "--dataset digits --depth 8 --plan --batch-size 32 --epochs 2 "
    "--train-examples 110 --validation-examples 40"
  )
  assert "110 training images, 2 epochs of 3 steps" in capsys.readouterr().out
  main("--dataset digits --depth 8 --plan --validation-examples 400")
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
  assert said in error(capsys, lambda: main("--plan " + flags))


def test_help_names_every_option_with_its_default(capsys):
  with pytest.raises(SystemExit) as caught:
    main("--help")
  assert caught.value.code == 0
  shown = capsys.readouterr().out
  for field in dataclasses.fields(Config):
    # What is on by default has a switch that turns it off.
    name = f"no_{field.name}" if field.default is True else field.name
    assert f"{configs.flag(name)} " in shown + " ", field.name
  assert "Trains." in shown
  text = " ".join(re.sub(r"[│╭╮╰╯─]", " ", shown).split())
  assert "Learning rate at the start. (default: 0.1)" in text
  assert "Momentum, in [0, 1). (default: 0.9)" in text


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


@pytest.mark.parametrize(
  ("flags", "expected"),
  [
    ("", {"ratios": (0.5, 0.75, 0.97), "temperature": 2.0, "peers": None}),
    ("--method dml", {"ratios": (0.5, 0.75, 0.97), "temperature": 1.0}),
    # 80 of 300 epochs, and 5, in proportion.
    (
      "--method ffl --epochs 150",
      {"peers": 2, "ratios": None, "temperature": 3.0, "ramp_up_epochs": 40},
    ),
    (
      "--method pcl --epochs 300",
      {"peers": 3, "views": 3, "temperature": 3.0, "ramp_up_epochs": 80},
    ),
    (
      "--method ffsd --epochs 300",
      {
        "peers": 1,
        "common_students": 2,
        "temperature": 2.0,
        "ramp_up_epochs": 5,
      },
    ),
    ("--method ffsd --epochs 10", {"ramp_up_epochs": 1}),
    ("--method pcl --ratios .5", {"peers": None, "views": 2}),
    ("--method ffl --peers 4 --temperature 5", {"peers": 4, "temperature": 5}),
    ("--method solo", {"temperature": None, "ramp_up_epochs": None}),
    ("--quick --method ffl", {"peers": 2, "ratios": None}),
  ],
)
def test_a_method_has_its_own_defaults(flags, expected):
  found = configs.resolve(_parse(flags))
  assert {name: getattr(found, name) for name in expected} == expected


def test_what_is_trained_alone_has_the_members_and_no_method():
  config = configs.resolve(
    _parse("--method pcl --peers 2 --epochs 9 --views 1 --ramp-up as_coded")
  )
  alone = configs.resolve(configs.alone(config))
  assert build.members(alone) == build.members(config)
  assert (alone.method, alone.epochs, alone.views) == ("solo", 9, None)


def test_drops_that_are_given_take_the_place_of_an_experiment_s_own():
  defaults = Config(learning_rate_drop_every=3, crop_padding=30)
  config = _parse("--learning-rate-drops .5", defaults)
  assert config.learning_rate_drop_every is None
  assert _parse("", defaults).learning_rate_drop_every == 3
  assert _parse("", defaults).crop_padding == 30
  assert _parse("--image-size 64", defaults).crop_padding is None


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
