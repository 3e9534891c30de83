"""The three programs are what they claim to be; no test asserts a time."""

import json
from functools import partial

import jax
import numpy as np
import pytest
from rich.console import Console

import command_line
import input as input_share
import product_step
import workload
from ekd_jax import config as configs
from ekd_jax.config import Config
from timing import Pair

TINY = configs.resolve(
  Config(depth=8, widths=(1.0,), dataset="digits", batch_size=16)
)


def test_shares():
  pairs = [Pair(1.0, 0.75), Pair(2.0, 2.5), Pair(4.0, 3.0)]
  found = input_share.record("case", pairs, 0.5, 20.0, 10)
  assert (found["seconds_a"], found["seconds_b"]) == (2.0, 2.5)
  assert found["share_median"] == 0.25
  assert (found["share_min"], found["share_max"]) == (-0.25, 0.25)
  assert found["input_share"] == 0.25
  # Ten steps of two seconds and the order.
  assert found["order_share"] == 0.5


def test_the_constant_batch_is_trained_on_and_no_image_is_read():
  change = partial(input_share.on_a_constant_batch, TINY)
  train_step, state, inputs = product_step.program(TINY, change=change)
  text = train_step.lower(state, *inputs).as_text()
  assert "ui8" not in text  # The images' type.
  shapes = {tuple(leaf.shape[1:]) for leaf in jax.tree.leaves(state)}
  assert (16, 8, 8, 1) in shapes


def test_the_input_alone_is_the_batch_of_the_step():
  train_step, state, inputs = product_step.program(
    TINY, change=input_share.input_alone
  )
  _, batch = train_step(state, *inputs)
  assert batch["image"].shape == (1, 16, 8, 8, 1)
  assert batch["image"].dtype == np.float32
  labels, order = (np.asarray(x)[0] for x in (inputs[0]["label"], inputs[1]))
  np.testing.assert_array_equal(batch["label"][0], labels[order[:16]])


def test_mistakes_are_one_line(capsys):
  with pytest.raises(SystemExit) as caught:
    command_line.main(input_share.Options, input_share.run, ["--pairs", "0"])
  assert caught.value.code == 2
  assert capsys.readouterr().err == "error: --pairs is 0: at least 1\n"


@pytest.mark.slow
def test_whole_runs(monkeypatch, tmp_path):
  monkeypatch.setattr(workload, "CASES", {"resnet20x5": TINY})
  path = tmp_path / "records.json"
  options = input_share.Options(
    case="resnet20x5", pairs=1, steps=1, json=str(path)
  )
  input_share.run(options, Console())
  (found,) = json.loads(path.read_text())
  assert found["epoch_steps"] == 1437 // 16
