"""The one place that knows orbax: a run's checkpoints.

A checkpoint holds the whole state of the loop as host arrays, without any
device axis, so that it can be restored onto any number of devices; and a
small JSON record of what the loop itself remembers (this epoch's running
means). Saving is asynchronous: the copy to the host is taken at once, the
files are written while training goes on.
"""

import pathlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from ekd_jax.errors import UserError

# The newest two: should the newest turn out damaged, deleting its folder lets
# the run go on from the other.
KEPT_NEWEST = 2

_SCORE = "validation_top1"


class Checkpoints:
  """The checkpoints of one run directory; a context manager.

  Kept are the newest two and, where examples were held out for validation,
  the one with the best ensemble accuracy on them. Without held-out examples
  no checkpoint is "best": the test set chooses nothing.
  """

  def __init__(self, run_dir: pathlib.Path, *, read_only: bool = False):
    """Opens the checkpoints of `run_dir`.

    Args:
      run_dir: the run directory.
      read_only: changes nothing on disk, so that a run that is training at
        the same time can be read.
    """
    policies = [
      checkpoint_managers.LatestN(KEPT_NEWEST),
      checkpoint_managers.BestN(
        # The first of equals, as summary.json's best_epoch.
        get_metric_fn=lambda scores: (scores[_SCORE], -scores["step"]),
        n=1,
        keep_checkpoints_without_metrics=False,
      ),
    ]
    self._manager = ocp.CheckpointManager(
      pathlib.Path(run_dir).absolute() / "checkpoints",
      options=ocp.CheckpointManagerOptions(
        preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
        # Without it orbax does not write the scores down, and the next start
        # would not know which checkpoint is the best.
        best_fn=lambda scores: scores[_SCORE],
        # What a killed save left behind.
        cleanup_tmp_directories=not read_only,
        create=not read_only,
        read_only=read_only,
      ),
    )

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, *exception: object) -> None:
    # A save that failed in the background is raised here, not lost.
    self.wait()
    self._manager.close()

  def latest_step(self) -> int | None:
    """The step of the newest checkpoint, None if there is none."""
    return self._manager.latest_step()

  def save(
    self,
    step: int,
    state: Any,
    progress: dict[str, Any],
    *,
    validation_top1: float | None = None,
  ) -> None:
    """Starts saving a checkpoint; does nothing if the step has one.

    Args:
      step: optimizer steps done.
      state: pytree of NumPy arrays that nobody changes afterwards.
      progress: JSON values.
      validation_top1: the ensemble's accuracy on held-out examples, if any.
    """
    if step in self._manager.all_steps():
      return
    scores = None
    if validation_top1 is not None:
      scores = {_SCORE: validation_top1, "step": step}
    self._manager.save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(state),
        progress=ocp.args.JsonSave(progress),
      ),
      metrics=scores,
    )

  def wait(self) -> None:
    """Waits for the save under way; raises what went wrong in it."""
    self._manager.wait_until_finished()

  def restore(self, target: Any) -> tuple[Any, dict[str, Any]]:
    """Reads the newest checkpoint.

    Args:
      target: a pytree with the structure, shapes and types of the state.

    Returns:
      The state as NumPy arrays in the target's structure, and the progress.

    Raises:
      UserError: there is no checkpoint.
    """
    step = self.latest_step()
    if step is None:
      raise UserError(
        f"no checkpoint under {self._manager.directory}: nothing has been "
        "saved yet; run the training command again"
      )
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), target)
    restored = self._manager.restore(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardRestore(zeros),
        progress=ocp.args.JsonRestore(),
      ),
    )
    return restored["state"], restored["progress"]
