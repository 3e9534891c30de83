"""One line for every mistake, and nothing written."""

import shutil

import pytest

from ekd_jax.config import Config
from ekd_jax.training import loop
from tests import runs
from tests.command_line.called import FINE, error, main

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
  ("--dataset mnist", "choose one of cifar100, cifar10, svhn, imagenet"),
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
  # Other networks.
  ("--network densnet", "--network densnet is not known (did you mean dense"),
  ("--network densenet", "--variant is missing: densenet is one of 12/100"),
  ("--network densenet --variant 12/101", "--variant is 12/101: densenet is"),
  ("--network densenet --variant 0/100", "--variant is 0/100"),
  (
    "--network wide_resnet --variant 16-0",
    "any DEPTH-FACTOR with depth 6n + 4",
  ),
  ("--network wide_resnet --variant 17-2", "--variant is 17-2: wide_resnet is"),
  ("--network plain_densenet --variant 12/41", "depth 3n + 4"),
  ("--network bottleneck_resnet --variant 20", "one of 110, wide20-8"),
  (
    "--network googlenet --variant 1",
    "googlenet, which has none: leave it out",
  ),
  ("--network efficientnet --variant b9", "--variant is b9: efficientnet is"),
  ("--network imagenet_resnet --variant 19", "is one of 18, 34, 50, 101"),
  ("--variant 18", "--variant 18 was given with --network resnet, which has"),
  (
    "--network densenet --variant 12/100 --depth 40",
    "--depth 40 was given with --network densenet, which has none: leave it "
    "out, --variant says which",
  ),
  ("--network nowhere:family", "there is no module nowhere"),
  ("--network json:family", "json has no family"),
  (
    "--network efficientnet --variant b0 --image-size 31",
    "images of 31 pixels are too small for efficientnet_b0: use --image-size "
    "32 or more",
  ),
  (
    "--network densenet --variant 12/100 --ratios .67",
    "ratio 0.67 cannot be reached: the nearest network removes 0.6",
  ),
  (
    "--network imagenet_resnet --variant 50 --image-size 32 --widths 1,.001",
    "width 0.001 leaves a stage without channels",
  ),
  ("--image-size 0", "--image-size is 0"),
  # Other methods.
  ("--method ffl --peers 1", "--method ffl needs two networks or more"),
  ("--method pcl --widths 1", "--method pcl needs two networks or more"),
  ("--peers 0", "--peers is 0: must be a whole number of at least 1"),
  ("--peers 2 --ratios .5", "--ratios and --peers were both given"),
  (
    "--method ffl --partners resnet",
    "--partners has 'resnet': give resnet:DEPTH",
  ),
  ("--method ffl --partners resnet:21", "--depth is 21: must be 6n + 2"),
  ("--method ffl --partners vgg9", "vgg9 is not known (did you mean vgg16?)"),
  ("--method ffl --partners wide_resnet", "--variant is missing: wide_resnet"),
  ("--method ffl --partners vgg16:16", "--network vgg16, which has none"),
  ("--partners resnet:14", "--partners resnet:14 was given with --method ekd"),
  ("--method pcl --views 0", "--views is 0: must be a whole number of at"),
  ("--method pcl --views 4", "--views is 4 and there are 3 networks"),
  ("--views 2", "--views 2 was given with --method ekd: it is for pcl"),
  ("--method pcl --mean-teacher-decay 1", "--mean-teacher-decay is 1: must"),
  ("--method pcl --mean-teacher-decay -.1", "--mean-teacher-decay is -0.1"),
  (
    "--method ffl --epochs 10 --ramp-up-epochs 11",
    "--ramp-up-epochs is 11 and --epochs is 10: give at most 10",
  ),
  ("--method ffsd --ramp-up-epochs -1", "--ramp-up-epochs is -1"),
  ("--ramp-up-epochs 3", "was given with --method ekd: it is for ffl, pcl"),
  ("--method ffl --ramp-up as_coded", "--ramp-up as_coded was given with"),
  ("--method ffsd --common-students 1", "--common-students is 1: must be"),
  ("--method ffl --common-students 2", "it is for ffsd, leave it out"),
  ("--method ffsd --partners resnet:14", "with --method ffsd: it is for ffl"),
  ("--method ffsd --image-size 9", "are 9 x 9, 5 x 5, 3 x 3; try another"),
  ("--method ffl --optimizer rmsprop", "which is trained with nesterov"),
  ("--method ffsd --decoder-weight -1", "--decoder-weight is -1: must be a"),
  ("--accumulate 0", "--accumulate is 0"),
  # Things that do not go together.
  ("--compile", "--compile was given without --plan"),
  ("--crop rotated", "--crop was given with --dataset digits"),
  ("--skip-broken", "--skip-broken was given with --dataset digits"),
  ("--workers 2", "--workers was given with --dataset digits"),
  ("--num-classes 3", "--num-classes was given with --dataset digits"),
  (
    "--dataset folder --data-dir . --crop-padding 4",
    "--crop-padding was given with --dataset folder",
  ),
  (
    "--dataset folder --data-dir . --crop-fill reflect",
    "--crop-fill reflect was given with --dataset folder",
  ),
  (
    "--learning-rate-drops .5 --learning-rate-drop-every 3",
    "--learning-rate-drops and --learning-rate-drop-every were both given",
  ),
  ("--network .x:family", "--network .x:family is not known"),
  (
    "--dataset imagenet --data-dir . --download",
    "--download was given with --dataset imagenet",
  ),
  ("--with-solo --method solo", "--with-solo was given with --method solo"),
  # Several processes.
  ("--num-processes 2", "--num-processes was given without --distributed"),
  (
    "--distributed --num-processes 2",
    "--coordinator-address, --process-id is missing: give all of",
  ),
  (
    "--distributed --coordinator-address here --num-processes 2 --process-id 0",
    "--coordinator-address is here: must be HOST:PORT",
  ),
  (
    "--distributed --coordinator-address a:99999 --num-processes 2 "
    "--process-id 0",
    "must be HOST:PORT",
  ),
  (
    "--distributed --coordinator-address a:1 --num-processes 2 --process-id 2",
    "--process-id is 2 of --num-processes 2: must be 0 to 1",
  ),
  ("--num-processes 0", "--num-processes is 0"),
  ("--process-id -1", "--process-id is -1"),
  ("--join-timeout 0", "--join-timeout is 0"),
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
  ("--dataset folder", "--dataset folder needs --data-dir DIR"),
  ("--dataset folder --data-dir ../foreign", "has no folder train/"),
  ("--dataset svhn --data-dir ../foreign", "has no svhn"),
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
  (
    "--batch-size 32 --accumulate 3",
    "by the 4 devices times 3 micro-batches: use 24 or 36",
  ),
  # Directories.
  ("--run-dir ../file", "is a file: name a directory"),
  ("--run-dir ../file/run", "cannot be written"),
  ("--run-dir ../foreign", "holds files but no run"),
  ("--run-dir ''", "--run-dir is '': name a directory"),
  ("--run-dir ~nobody-of-this-name/run", "--run-dir is ~nobody"),
  ("--run-dir s3://bucket/run", "use a directory or gs://BUCKET/FOLDER"),
  ("--run-dir gs://bucket", "name a bucket and a folder in it"),
  ("--run-dir gs:///run", "name a bucket and a folder in it"),
  ("--dataset cifar10 --data-dir http://x/y", "use a directory or gs://"),
]


@pytest.mark.parametrize(
  ("flags", "said"), MISTAKES, ids=[flags for flags, _ in MISTAKES]
)
def test_a_mistake_is_told_in_one_line_and_nothing_is_written(
  flags, said, folder, capsys
):
  before = runs.contents(folder)
  # Its --depth is the CIFAR ResNet's.
  fine = FINE.replace("--depth 8 ", "") if "--network" in flags else FINE
  line = error(capsys, lambda: main(fine + flags))
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
    main(FINE)


def test_split_convolutions_are_refused_where_there_is_no_cpu(
  folder, capsys, monkeypatch
):
  monkeypatch.setattr("jax.default_backend", lambda: "gpu")
  before = runs.contents(folder)
  line = error(capsys, lambda: main(FINE + "--conv split"))
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
  assert "holds files but no run" in error(capsys, lambda: main(FINE + flags))
  assert runs.contents(folder) == before
