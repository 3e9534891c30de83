"""Checkpoints: whole, exact, on any number of devices, and the right ones."""

import errno
import pathlib
import shutil

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from ekd_jax import build, data
from ekd_jax import config as configs
from ekd_jax.errors import StorageError, UserError
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
    restored = checkpoints.restore(_abstract(state))
  _assert_bitwise(restored.state, state)
  assert (restored.step, restored.progress) == (7, progress)
  chain = restored.state["method"]["opt_state"]
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
      restored = checkpoints.restore(build.abstract_state(after))
      _assert_bitwise(restored.state, state)
      # And what a start from nothing draws is no other state.
      method = build.method(after, total_steps=1)
      drawn = init_state(method, data.info("digits"), seed=3)
      _assert_bitwise(jax.tree.map(np.asarray, drawn), state)


def test_the_newest_checkpoint_is_the_one_restored(tmp_path):
  states = {step: _state(step) for step in (1, 2, 10)}
  with Checkpoints(tmp_path) as checkpoints:
    for step, state in states.items():
      checkpoints.save(step, state, {"steps": step, "sums": {}})
    restored = checkpoints.restore(_abstract(states[1]))
  _assert_bitwise(restored.state, states[10])
  assert restored.progress["steps"] == 10


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
    restored = checkpoints.restore(_abstract(state))
  final = train(restored.state, jax.devices()[:after])
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
    restored = checkpoints.restore(
      {"x": jax.ShapeDtypeStruct((512, 512), np.float32)}
    )
  np.testing.assert_array_equal(restored.state["x"], np.ones((512, 512)))


def test_the_newest_two_are_kept(tmp_path):
  with Checkpoints(tmp_path) as checkpoints:
    for step in range(1, 6):
      checkpoints.save(step, _state(), {})
  assert _kept(tmp_path) == [4, 5]


def test_the_best_is_kept_too(tmp_path):
  with Checkpoints(tmp_path) as checkpoints:
    for step in range(1, 8):
      checkpoints.save(step, _state(), {})
      # As the loop does: known when the checkpoint has been evaluated.
      if step >= 3:
        checkpoints.best_step = 3
  assert _kept(tmp_path) == [3, 6, 7]
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.best_step = 7
    for step in (8, 9, 10):
      checkpoints.save(step, _state(), {})
  assert _kept(tmp_path) == [7, 9, 10]


def test_saving_a_step_again_changes_nothing(tmp_path):
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(3, _state(0), {"steps": 0})
    checkpoints.save(3, _state(1), {"steps": 1})
    restored = checkpoints.restore(_abstract(_state()))
  _assert_bitwise(restored.state, _state(0))
  assert restored.progress == {"steps": 0}


def test_a_relative_run_directory(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with Checkpoints(pathlib.Path("runs/one")) as checkpoints:
    checkpoints.save(1, _state(), {})
  with Checkpoints(tmp_path / "runs" / "one") as checkpoints:
    restored = checkpoints.restore(_abstract(_state()))
  _assert_bitwise(restored.state, _state())


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
    raise OSError(errno.EIO, "bad sector")

  with pytest.raises(OSError, match="bad sector"), checkpoints:
    # Files of a state are put in place by renaming them when all are there.
    monkeypatch.setattr(pathlib.Path, "rename", fail)
    monkeypatch.setattr("os.rename", fail)
    monkeypatch.setattr("os.replace", fail)
    checkpoints.save(1, _state(), {})


# Damage. A state here is one array, so that a flipped byte is surely in it.

STATE = {"weights": np.arange(4096, dtype=np.float32)}


def _two(run_dir):
  """The folders of checkpoints 1 and 2; their states differ."""
  with Checkpoints(run_dir) as checkpoints:
    for step in (1, 2):
      state = {"weights": STATE["weights"] * step}
      checkpoints.save(step, state, {"steps": step})
  return [run_dir / "checkpoints" / str(step) for step in (1, 2)]


def _files(folder):
  return sorted(path for path in folder.rglob("*") if path.is_file())


def _truncate(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flip(path):
  contents = bytearray(path.read_bytes())
  for index in range(0, len(contents), 7):
    contents[index] ^= 0xFF
  path.write_bytes(contents)


def _restore(run_dir):
  with Checkpoints(run_dir) as checkpoints:
    return checkpoints.restore(_abstract(STATE))


@pytest.mark.parametrize(
  "damage",
  [
    _truncate,
    _flip,
    pathlib.Path.unlink,
    lambda path: path.write_bytes(b""),
    lambda path: path.write_text("<html>404</html>"),
  ],
  ids=["truncated", "flipped", "deleted", "emptied", "replaced"],
)
def test_no_damage_to_any_file_gives_other_numbers(damage, tmp_path):
  """Each file in turn: the newest is restored as saved, or passed over."""
  whole = tmp_path / "whole"
  _, newest = _two(whole)
  passed_over = 0
  for number, file in enumerate(_files(newest)):
    run_dir = tmp_path / str(number)
    shutil.copytree(whole, run_dir)
    damage(run_dir / file.relative_to(whole))
    found = _restore(run_dir)
    np.testing.assert_array_equal(
      found.state["weights"], STATE["weights"] * found.step
    )
    assert found.progress == {"steps": found.step}
    assert set(found.damaged) == {2} - {found.step}
    passed_over += found.step == 1
  # Some files are copies of what others say; the arrays are not.
  assert passed_over >= 2


def test_a_checkpoint_of_other_numbers_is_damaged(tmp_path, monkeypatch):
  """Damage that no checksum of orbax's can see: a file that was swapped."""
  first, second = _two(tmp_path)
  shutil.rmtree(second / "state")
  shutil.copytree(first / "state", second / "state")
  found = _restore(tmp_path)
  assert found.step == 1
  assert found.damaged == {2: "its contents are not those that were saved"}


def test_damaged_checkpoints_are_put_aside(tmp_path):
  for _ in range(2):
    shutil.rmtree(tmp_path / "checkpoints", ignore_errors=True)
    _, newest = _two(tmp_path)
    before = {p.relative_to(newest): p.read_bytes() for p in _files(newest)}
    with Checkpoints(tmp_path) as checkpoints:
      checkpoints.put_aside([2])
      assert checkpoints.latest_step() == 1
      checkpoints.save(2, STATE, {})
    assert _kept(tmp_path) == [1, 2]
  aside = tmp_path / "damaged_checkpoints"
  assert sorted(path.name for path in aside.iterdir()) == ["2", "2_2"]
  assert {
    p.relative_to(aside / "2_2"): p.read_bytes() for p in _files(aside / "2_2")
  } == before


def test_when_all_are_damaged_nothing_is_changed(tmp_path):
  for folder in _two(tmp_path):
    for file in _files(folder):
      _truncate(file)
  before = {path: path.read_bytes() for path in _files(tmp_path)}
  with pytest.raises(UserError, match="can be read") as caught:
    _restore(tmp_path)
  message = str(caught.value)
  assert "step 1: " in message
  assert "step 2: " in message
  assert "\n" not in message
  assert {path: path.read_bytes() for path in _files(tmp_path)} == before


@pytest.mark.parametrize(
  "target",
  [
    {"weights": np.zeros(4095, np.float32)},
    {"weights": np.zeros(4096, np.int32)},
    {"weights": STATE["weights"], "more": np.zeros(2, np.float32)},
    {},
  ],
  ids=["shorter", "of another type", "with more", "with less"],
)
def test_a_checkpoint_of_another_network_is_refused(target, tmp_path):
  _two(tmp_path)
  with (
    Checkpoints(tmp_path) as checkpoints,
    pytest.raises(UserError, match="no checkpoint under .* can be read"),
  ):
    checkpoints.restore(_abstract(target))


def test_checkpoints_without_a_digest_are_read(tmp_path):
  """As versions before there were digests wrote them."""
  with ocp.CheckpointManager(tmp_path / "checkpoints") as manager:
    manager.save(
      3,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(STATE),
        progress=ocp.args.JsonSave({"steps": 3, "sums": {}}),
      ),
    )
  found = _restore(tmp_path)
  _assert_bitwise(found.state, STATE)
  assert (found.step, found.progress) == (3, {"steps": 3, "sums": {}})


def test_a_checkpoint_that_may_not_be_read_is_not_called_damaged(
  tmp_path, monkeypatch
):
  _two(tmp_path)

  def refuse(*arguments, **options):
    raise PermissionError(errno.EACCES, "Permission denied")

  with Checkpoints(tmp_path) as checkpoints:
    monkeypatch.setattr(ocp.CheckpointManager, "restore", refuse)
    with pytest.raises(PermissionError):
      checkpoints.restore(_abstract(STATE))


# Room.


def test_a_checkpoint_that_will_not_fit_is_not_begun(tmp_path, monkeypatch):
  _two(tmp_path)
  usage = shutil.disk_usage(tmp_path)
  with Checkpoints(tmp_path) as checkpoints:
    monkeypatch.setattr(
      shutil, "disk_usage", lambda path: usage._replace(free=9_000)
    )
    with pytest.raises(StorageError) as caught:
      checkpoints.save(3, STATE, {})
  message = str(caught.value)
  assert "no space is left" in message
  assert "about 0.0164 MB and 0.009 MB are free" in message
  assert "the checkpoint of step 2 is kept" in message
  assert _kept(tmp_path) == [1, 2]
