"""The one place that knows orbax: a run's checkpoints.

A checkpoint holds the whole state of the loop as host arrays, without any
device axis, so that it can be restored onto any number of devices; and a
small JSON record: what the loop itself remembers (this epoch's running means)
and a digest of all of it. Saving is asynchronous: the copy to the host is
taken at once, the files are written while training goes on.

The digest is of what was meant to be saved, not of files: whatever happened to
them since, a checkpoint whose arrays do not have it is damaged. Then the one
before is taken, and the damaged one is put aside, not deleted.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from ekd_jax import storage
from ekd_jax.errors import Stopped, UserError

# The newest two: should the newest turn out damaged, there is another.
KEPT_NEWEST = 2

FOLDER = "checkpoints"
DAMAGED = "damaged_checkpoints"


class Restored(NamedTuple):
  """What a checkpoint held.

  Attributes:
    step: optimizer steps done.
    state: NumPy arrays.
    progress: JSON values.
    damaged: {step: what is wrong} of the newer checkpoints that were passed
      over.
  """

  step: int
  state: Any
  progress: dict[str, Any]
  damaged: dict[int, str]


class Checkpoints:
  """The checkpoints of one run directory; a context manager.

  Kept are the newest two and `best_step`, if there is one.

  Attributes:
    best_step: the step that did best on held-out examples. Without these no
      checkpoint is "best": the test set chooses nothing.
  """

  def __init__(self, run_dir: str | os.PathLike, *, read_only: bool = False):
    """Opens the checkpoints of `run_dir`.

    Args:
      run_dir: the run directory.
      read_only: changes nothing on disk, so that a run that is training at
        the same time can be read.
    """
    self.best_step: int | None = None
    if not storage.is_remote(run_dir):
      run_dir = os.path.abspath(run_dir)  # Orbax insists.
    self._run_dir = storage.path(run_dir)
    self._folder = self._run_dir / FOLDER
    if not read_only:
      # Orbax does not make it for one process of several.
      self._folder.mkdir(parents=True, exist_ok=True)
    self._manager = ocp.CheckpointManager(
      self._folder,
      options=ocp.CheckpointManagerOptions(
        preservation_policy=_Kept(self),
        # What a killed save left behind.
        cleanup_tmp_directories=not read_only,
        create=False,
        read_only=read_only,
        # Of several processes only this one has checkpoints.
        multiprocessing_options=ocp.options.MultiprocessingOptions(
          primary_host=jax.process_index(),
          active_processes={jax.process_index()},
          barrier_sync_key_prefix=f"process_{jax.process_index()}",
        ),
      ),
    )

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, kind: type | None, *exception: object) -> None:
    # A save that failed in the background is raised here, not lost; unless
    # something else has failed already, which then is what counts.
    try:
      self.wait()
      self._manager.close()
    except Exception:
      if kind is None or issubclass(kind, Stopped):
        raise

  def latest_step(self) -> int | None:
    """The step of the newest checkpoint, None if there is none."""
    return self._manager.latest_step()

  def kept(self) -> str:
    """In a clause: where a run would go on from."""
    last = self.latest_step()
    if last is None:
      return "there is no checkpoint yet"
    return f"the checkpoint of step {last} is kept"

  def save(self, step: int, state: Any, progress: dict[str, Any]) -> None:
    """Starts saving a checkpoint; does nothing if the step has one.

    Args:
      step: optimizer steps done.
      state: pytree of NumPy arrays that nobody changes afterwards.
      progress: JSON values.

    Raises:
      StorageError: there is no room for it, or the one before could not be
        saved.
    """
    if step in self._manager.all_steps():
      return
    needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    self.wait()
    storage.require_room(self._run_dir, needed, self.kept)
    record = {"progress": progress, "sha256": _digest(step, state, progress)}
    with storage.failures_told(
      self._run_dir, needed_bytes=needed, kept=self.kept
    ):
      self._manager.save(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardSave(state),
          progress=ocp.args.JsonSave(record),
        ),
      )

  def wait(self) -> None:
    """Waits for the save under way; raises what went wrong in it.

    Raises:
      StorageError: there was no room for it.
    """
    with storage.failures_told(self._run_dir, kept=self.kept):
      self._manager.wait_until_finished()

  def restore(self, target: Any) -> Restored:
    """Reads the newest checkpoint that is whole.

    Changes nothing on disk; `put_aside` does.

    Args:
      target: a pytree with the structure, shapes and types of the state.

    Raises:
      UserError: there is no checkpoint, or none that is whole.
    """
    steps = sorted(self._manager.all_steps(), reverse=True)
    if not steps:
      raise UserError(
        f"no checkpoint under {self._folder}: nothing has been saved yet; run "
        "the training command again"
      )
    damaged = {}
    for step in steps:
      try:
        state, progress = self._read(step, target)
      except (PermissionError, MemoryError):
        raise
      # Whatever reading it raises, it cannot be read: a missing file, a
      # shortened one and flipped bytes all end in other exceptions.
      except Exception as error:
        reason = " ".join(f"{error}".split()) or type(error).__name__
        damaged[step] = reason[:200]
        continue
      return Restored(step, state, progress, damaged)
    found = "; ".join(f"step {step}: {why}" for step, why in damaged.items())
    raise UserError(
      f"no checkpoint under {self._folder} can be read ({found}): nothing was "
      "changed; bring back a copy of them, or start again in another --run-dir"
    )

  def put_aside(self, steps: Sequence[int]) -> None:
    """Moves damaged checkpoints to a folder beside, where nobody reads them."""
    folder = self._run_dir / DAMAGED
    with storage.failures_told(self._run_dir, kept=self.kept):
      for step in steps:
        folder.mkdir(parents=True, exist_ok=True)
        target, number = folder / str(step), 1
        while target.exists():
          number += 1
          target = folder / f"{step}_{number}"
        (self._folder / str(step)).rename(target)
    self._manager.reload()

  def _read(self, step: int, target: Any) -> tuple[Any, dict[str, Any]]:
    record = self._manager.restore(
      step, args=ocp.args.Composite(progress=ocp.args.JsonRestore())
    )["progress"]
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), target)
    state = self._manager.restore(
      step, args=ocp.args.Composite(state=ocp.args.StandardRestore(zeros))
    )["state"]
    for (path, leaf), found in zip(
      jax.tree_util.tree_leaves_with_path(target),
      jax.tree.leaves(state),
      strict=True,
    ):
      if (found.shape, found.dtype) != (leaf.shape, leaf.dtype):
        raise ValueError(
          f"{jax.tree_util.keystr(path, simple=True, separator='/')} is "
          f"{found.dtype}{list(found.shape)} instead of "
          f"{leaf.dtype}{list(leaf.shape)}: of another network"
        )
    if "sha256" not in record:
      return state, record  # Saved before there were digests.
    progress = record["progress"]
    if _digest(step, state, progress) != record["sha256"]:
      raise ValueError("its contents are not those that were saved")
    return state, progress


class _Kept:
  """Orbax's question, which checkpoints not to delete, answered."""

  def __init__(self, checkpoints: Checkpoints):
    self._checkpoints = checkpoints
    self._newest = checkpoint_managers.LatestN(KEPT_NEWEST)

  def should_preserve(
    self,
    checkpoints: Sequence[checkpoint_managers.PolicyCheckpointInfo],
    *,
    context: checkpoint_managers.PreservationContext,
  ) -> list[bool]:
    newest = self._newest.should_preserve(checkpoints, context=context)
    best = self._checkpoints.best_step
    return [
      keep or info.step == best
      for keep, info in zip(newest, checkpoints, strict=True)
    ]


def _digest(step: int, state: Any, progress: dict[str, Any]) -> str:
  """SHA-256 of everything in a checkpoint, names, shapes and types too."""
  digest = hashlib.sha256(json.dumps([step, progress], sort_keys=True).encode())
  for path, leaf in jax.tree_util.tree_leaves_with_path(state):
    name = jax.tree_util.keystr(path)
    digest.update(f"{name} {leaf.dtype} {leaf.shape}".encode())
    digest.update(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8))
  return digest.hexdigest()
