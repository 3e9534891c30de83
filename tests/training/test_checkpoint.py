"""Checkpoints: whole, exact, on any number of devices, and the right ones."""

import pathlib

import jax
import numpy as np
import optax
import pytest

from ekd_jax import build, data
from ekd_jax import config as configs
from ekd_jax.errors import UserError
from ekd_jax.training import parallel
from ekd_jax.training.checkpoint import Checkpoints
from ekd_jax.training.step import init_state


def _state(seed=0):
  random = np.random.default_rng(seed)
  params = {
    "stem": {"kernel": random.normal(size=(3, 4)).astype(np.float32)},
    "branches": {"student_0": {"bias": random.normal(size=4)}},
  }
  params = jax.tree.map(lambda x: np.asarray(x, np.float32), params)
  optimizer = optax.chain(
    optax.add_decayed_weights(1e-4),
    optax.sgd(optax.constant_schedule(0.1), momentum=0.9),
    optax.masked(optax.scale(0.5), {"stem": False, "branches": True}),
  )
  return jax.tree.map(
    np.asarray,
    {
      "method": {"params": params, "opt_state": optimizer.init(params)},
      "keys": {"order": np.uint32([1, 2**32 - 1])},
      "step": np.int32(7),
    },
  )


def _abstract(state):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)


def _assert_bitwise(restored, wanted):
  assert jax.tree.structure(restored) == jax.tree.structure(wanted)
  for a, b in zip(
    jax.tree.leaves(restored), jax.tree.leaves(wanted), strict=True
  ):
    assert (a.dtype, a.shape) == (b.dtype, b.shape)
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def _kept(run_dir):
  return sorted(int(path.name) for path in (run_dir / "checkpoints").iterdir())


def test_restores_the_whole_state_bit_by_bit(tmp_path):
  state = _state()
  kernel = state["method"]["params"]["stem"]["kernel"]
  # What a detour over text or another type would not keep.
  kernel.flat[:4] = [-0.0, 1e-42, np.nan, np.float32(1) / 3]
  progress = {"steps": 2, "sums": {"loss": 0.1 + 0.2, "top1/student_0": 1e-300}}
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(7, state, progress)
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.latest_step() == 7
    restored, restored_progress = checkpoints.restore(_abstract(state))
  _assert_bitwise(restored, state)
  assert restored_progress == progress
  chain = restored["method"]["opt_state"]
  trace, count = chain[1]
  assert isinstance(trace, optax.TraceState)
  assert isinstance(count, optax.ScaleByScheduleState)
  assert isinstance(chain[2], optax.MaskedState)


def test_a_checkpoint_fits_every_formulation_and_loop(tmp_path):
  """A run that was started on one kind of device goes on on another."""

  def config(**options):
    return configs.resolve(
      configs.Config(
        dataset="digits", depth=14, ratios=(0.5,), run_dir="run", **options
      )
    )

  before = config(conv="lax", scan="off")
  state = init_state(
    build.method(before, total_steps=1), data.info("digits"), seed=3
  )
  state = jax.tree.map(np.asarray, state)
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, state, {})
    for conv, scan in [("split", "off"), ("split", "on"), ("auto", "auto")]:
      after = config(conv=conv, scan=scan)
      restored, _ = checkpoints.restore(build.abstract_state(after))
      _assert_bitwise(restored, state)
      # And what a start from nothing draws is no other state.
      method = build.method(after, total_steps=1)
      drawn = init_state(method, data.info("digits"), seed=3)
      _assert_bitwise(jax.tree.map(np.asarray, drawn), state)


def test_the_newest_checkpoint_is_the_one_restored(tmp_path):
  states = {step: _state(step) for step in (1, 2, 10)}
  with Checkpoints(tmp_path) as checkpoints:
    for step, state in states.items():
      checkpoints.save(step, state, {"steps": step, "sums": {}})
    restored, progress = checkpoints.restore(_abstract(states[1]))
  _assert_bitwise(restored, states[10])
  assert progress["steps"] == 10


@pytest.mark.parametrize(("before", "after"), [(4, 1), (1, 4), (4, 2)])
def test_a_state_saved_on_some_devices_goes_on_on_others(
  before, after, tmp_path
):
  state = {"weights": np.linspace(0, 1, 6, dtype=np.float32)}

  def train(state, devices):
    step = parallel.per_device(
      lambda s: {"weights": s["weights"] * 2}, devices, donate_argnums=(0,)
    )
    return parallel.unreplicate(step(parallel.replicate(state, devices)))

  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, train(state, jax.devices()[:before]), {})
  with Checkpoints(tmp_path) as checkpoints:
    restored, _ = checkpoints.restore(_abstract(state))
  final = train(restored, jax.devices()[:after])
  np.testing.assert_array_equal(final["weights"], 4 * state["weights"])


def test_what_is_being_saved_is_not_changed_by_the_steps_that_follow(tmp_path):
  devices = jax.devices()
  step = parallel.per_device(lambda x: x + 1, devices, donate_argnums=(0,))
  state = step(parallel.replicate(np.zeros((512, 512), np.float32), devices))
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, {"x": parallel.unreplicate(state)}, {})
    for _ in range(10):
      state = step(state)
    jax.block_until_ready(state)
    checkpoints.wait()
    restored, _ = checkpoints.restore(
      {"x": jax.ShapeDtypeStruct((512, 512), np.float32)}
    )
  np.testing.assert_array_equal(restored["x"], np.ones((512, 512)))


def test_the_newest_two_are_kept(tmp_path):
  with Checkpoints(tmp_path) as checkpoints:
    for step in range(1, 6):
      checkpoints.save(step, _state(), {})
  assert _kept(tmp_path) == [4, 5]


def test_the_best_on_validation_is_kept_too(tmp_path):
  scores = {1: 10.0, 2: None, 3: 50.0, 4: None, 5: 40.0, 6: None, 7: None}
  with Checkpoints(tmp_path) as checkpoints:
    for step, score in scores.items():
      checkpoints.save(step, _state(), {}, validation_top1=score)
  assert _kept(tmp_path) == [3, 6, 7]


def test_the_best_is_still_kept_after_a_restart(tmp_path):
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, _state(), {}, validation_top1=50.0)
    checkpoints.save(2, _state(), {}, validation_top1=20.0)
  with Checkpoints(tmp_path) as checkpoints:
    for step in (3, 4, 5):
      checkpoints.save(step, _state(), {}, validation_top1=30.0)
  assert _kept(tmp_path) == [1, 4, 5]


def test_the_first_of_equals_is_the_best(tmp_path):
  # As in summary.json's best_epoch.
  with Checkpoints(tmp_path) as checkpoints:
    for step in range(1, 6):
      checkpoints.save(step, _state(), {}, validation_top1=50.0)
  assert _kept(tmp_path) == [1, 4, 5]


def test_saving_a_step_again_changes_nothing(tmp_path):
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(3, _state(0), {"steps": 0})
    checkpoints.save(3, _state(1), {"steps": 1})
    restored, progress = checkpoints.restore(_abstract(_state()))
  _assert_bitwise(restored, _state(0))
  assert progress == {"steps": 0}


def test_a_relative_run_directory(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with Checkpoints(pathlib.Path("runs/one")) as checkpoints:
    checkpoints.save(1, _state(), {})
  with Checkpoints(tmp_path / "runs" / "one") as checkpoints:
    restored, _ = checkpoints.restore(_abstract(_state()))
  _assert_bitwise(restored, _state())


def test_an_empty_directory_has_no_checkpoint(tmp_path):
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.latest_step() is None
    with pytest.raises(UserError, match="no checkpoint") as caught:
      checkpoints.restore(_abstract(_state()))
  assert "\n" not in str(caught.value)
  assert str(tmp_path) in str(caught.value)


def test_what_a_killed_save_left_is_not_taken_for_a_checkpoint(tmp_path):
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(3, _state(), {})
  # The name that orbax gives a directory until it is whole.
  torn = tmp_path / "checkpoints" / "5.orbax-checkpoint-tmp"
  (torn / "state").mkdir(parents=True)
  with Checkpoints(tmp_path, read_only=True) as checkpoints:
    assert checkpoints.latest_step() == 3
  assert torn.exists(), "a reader removed what a trainer may be writing"
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.latest_step() == 3
    checkpoints.save(5, _state(1), {})
  assert _kept(tmp_path) == [3, 5]


def test_a_reader_writes_nothing(tmp_path):
  with Checkpoints(tmp_path / "new", read_only=True) as checkpoints:
    assert checkpoints.latest_step() is None
  assert list(tmp_path.iterdir()) == []


def test_a_save_that_fails_in_the_background_is_not_lost(tmp_path, monkeypatch):
  checkpoints = Checkpoints(tmp_path)

  def fail(*args, **options):
    raise OSError("disk full")

  with pytest.raises(OSError, match="disk full"), checkpoints:
    # Files of a state are put in place by renaming them when all are there.
    monkeypatch.setattr(pathlib.Path, "rename", fail)
    monkeypatch.setattr("os.rename", fail)
    monkeypatch.setattr("os.replace", fail)
    checkpoints.save(1, _state(), {})
