"""What a plan says of a step's memory."""

import re

import jax
import numpy as np

from ekd_jax import build
from ekd_jax.training import planning
from tests import tiny
from tests.command_line.called import main

BATCH = 256


def bytes_of(tree):
  return sum(
    np.dtype(leaf.dtype).itemsize * int(np.prod(leaf.shape))
    for leaf in jax.tree.leaves(tree)
    if leaf.dtype != jax.dtypes.float0
  )


def test_a_step_takes_its_state_its_images_and_its_maps(tmp_path):
  config = tiny.config(
    tmp_path, batch_size=BATCH, train_examples=300, conv="lax"
  )
  found = planning.step_bytes(config, 300)
  assert list(found) == ["all members", "student_0 alone", "student_1 alone"]
  given = bytes_of(build.abstract_state(config)) + 300 * (8 * 8 + 4 + 4)
  # At least the outputs of the full network's seven convolutions are kept, of
  # 8, 4 and 2 pixels a side, by each of the four devices for its share.
  maps = BATCH // 4 * 4 * (3 * 16 * 64 + 2 * 32 * 16 + 2 * 64 * 4)
  assert found["all members"] > given + maps
  assert found["all members"] < given + 40 * maps
  alone = found["student_0 alone"], found["student_1 alone"]
  assert found["all members"] > alone[0] > alone[1]


def test_micro_batches_take_less(tmp_path):
  options = {"batch_size": 1024, "train_examples": 1024, "ratios": (0.9,)}

  def taken(accumulate):
    config = tiny.config(tmp_path, **options, conv="lax", accumulate=accumulate)
    return planning.method_bytes(config, build.method(config, 1), 1024)

  assert taken(accumulate=16) < taken(accumulate=1) / 2


def test_the_plan_prints_it(tmp_path, capsys):
  main(
    "--dataset digits --depth 8 --batch-size 32 --ratios .9 --plan --compile "
    f"--run-dir {tmp_path / 'run'}"
  )
  out = capsys.readouterr().out
  assert "memory of a step, MiB per device" in out
  for name in ("all members", "student_0 alone", "student_1 alone"):
    (line,) = [line for line in out.splitlines() if name in line]
    assert float(re.findall(r"[\d.]+", line)[-1]) > 0.1
  assert not (tmp_path / "run").exists()
