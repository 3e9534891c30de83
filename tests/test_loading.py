"""A finished run from Python: ordinary modules that do what the run said."""

import shutil

import flax.linen as nn
import jax
import numpy as np
import pytest

import ekd_jax
from ekd_jax import data, loading, run_directory
from ekd_jax.errors import UserError
from tests import runs, tiny
from tests.reference.augment import normalize

# One test image of 360, in percent: what rounding in another program may flip.
ONE_IMAGE = 100 / 360 + 1e-9


@pytest.fixture(scope="module")
def run(trained):
  return ekd_jax.load_run(trained[4])


@pytest.fixture(scope="module")
def digits():
  """Normalised test images, by the published statistics, and labels."""
  dataset = data.load("digits")
  images = normalize(
    dataset.test_images, dataset.info.mean, dataset.info.std
  ).astype(np.float32)
  return images, dataset.test_labels


def test_a_student_alone_is_as_accurate_as_the_summary_says(trained, digits):
  images, labels = digits
  summary = run_directory.read_json(trained[4] / "summary.json")
  for member in summary["members"]:
    module, variables = ekd_jax.load_student(trained[4], member["name"])
    assert isinstance(module, nn.Module)
    assert set(variables) == {"params", "batch_stats"}
    logits = np.asarray(jax.jit(module.apply)(variables, images).logits)
    top1 = 100 * np.mean(logits.argmax(1) == labels)
    assert top1 == pytest.approx(member["top1"], abs=ONE_IMAGE)
    assert (
      sum(x.size for x in jax.tree.leaves(variables["params"]))
      == (member["params"])
    )


def test_a_student_alone_answers_as_it_does_in_the_run(trained, run, digits):
  images = digits[0][:20]
  together = jax.jit(run.method.predict)(run.state, images)
  assert set(together) == {"ensemble", "student_0", "student_1"}
  alone = {}
  for name in run.students:
    module, variables = ekd_jax.load_student(trained[4], name)
    alone[name] = np.asarray(jax.jit(module.apply)(variables, images).logits)
    np.testing.assert_allclose(
      alone[name], together[name], rtol=1e-4, atol=1e-4
    )
  np.testing.assert_allclose(
    (alone["student_0"] + alone["student_1"]) / 2,
    together["ensemble"],
    rtol=1e-4,
    atol=1e-4,
  )
  assert not np.allclose(alone["student_0"], alone["student_1"], atol=1e-2)


def test_a_student_can_be_trained_on_by_ordinary_flax_code(trained, digits):
  # It was trained with statistics over all devices; alone there is no axis.
  images = digits[0][:8]
  module, variables = ekd_jax.load_student(trained[4], "student_1")
  outputs, changed = jax.jit(
    lambda v, x: module.apply(v, x, train=True, mutable=["batch_stats"])
  )(variables, images)
  assert outputs.logits.shape == (8, 10)
  before = variables["batch_stats"]["stem"]["norm"]["mean"]
  after = changed["batch_stats"]["stem"]["norm"]["mean"]
  assert not np.allclose(before, after)


def test_a_run_is_loaded_whole(trained, run):
  assert run.step == 6
  assert run.config.run_dir == str(trained[4])
  assert list(run.students) == ["student_0", "student_1"]
  assert run.summary == run_directory.read_json(trained[4] / "summary.json")
  assert run.metrics == run_directory.read_metrics(trained[4])
  for leaf in jax.tree.leaves(run.state):
    assert isinstance(leaf, np.ndarray | np.generic)


def test_evaluating_again_gives_the_last_test_line(run):
  scores = loading.evaluate(run)
  last = [line for line in run.metrics if line["kind"] == "test"][-1]
  assert scores["examples"] == 360
  assert scores.keys() == last.keys() - {"kind", "epoch", "step"}
  for name, value in scores.items():
    if name.startswith("loss/"):
      assert value == pytest.approx(last[name], rel=1e-4), name
    else:
      assert value == pytest.approx(last[name], abs=ONE_IMAGE), name


def test_loading_leaves_the_run_as_it_was(trained, tmp_path):
  run_dir = tmp_path / "run"
  shutil.copytree(trained[4], run_dir)
  before = runs.contents(run_dir)
  ekd_jax.load_student(run_dir, "student_1")
  assert runs.contents(run_dir) == before


def test_a_run_that_was_moved_and_named_relatively(
  trained, tmp_path, monkeypatch
):
  shutil.copytree(trained[4], tmp_path / "elsewhere" / "run")
  monkeypatch.chdir(tmp_path / "elsewhere")
  assert ekd_jax.load_run("run").step == 6


def _message(*arguments):
  with pytest.raises(UserError) as caught:
    ekd_jax.load_student(*arguments)
  assert "\n" not in str(caught.value)
  return str(caught.value)


def test_an_unknown_student_is_told_the_known_ones(trained):
  message = _message(trained[4], "student_7")
  assert "student_7" in message
  assert "student_0, student_1" in message


def test_no_run_there(tmp_path):
  assert "no run directory" in _message(tmp_path, "student_0")
  assert list(tmp_path.iterdir()) == []


def test_a_run_without_a_checkpoint_yet(tmp_path):
  run_directory.open_run(tmp_path, tiny.config(tmp_path), ["train"])
  before = runs.contents(tmp_path)
  assert "no checkpoint" in _message(tmp_path, "student_0")
  assert runs.contents(tmp_path) == before


def test_of_several_seeds_one_must_be_named(tmp_path):
  config = tiny.config(tmp_path, seeds=(3, 4))
  run_directory.open_run(tmp_path, config, ["train"])
  assert str(tmp_path / "seed_3") in _message(tmp_path, "student_0")


def test_the_package_offers_what_it_lists():
  assert ekd_jax.load_run is loading.load_run
  assert ekd_jax.load_student is loading.load_student
  for name in ekd_jax.__all__:
    assert getattr(ekd_jax, name) is not None
  with pytest.raises(AttributeError, match="nothing_like_it"):
    _ = ekd_jax.nothing_like_it
