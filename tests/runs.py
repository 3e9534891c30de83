"""Real runs in processes of their own, with a chosen number of devices."""

import os
import pathlib
import shlex
import signal
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from ekd_jax import build, run_directory
from ekd_jax.training.checkpoint import Checkpoints

ROOT = pathlib.Path(__file__).parents[1]
EXPERIMENT = str(ROOT / "experiments" / "cifar100_resnet.py")
KILLED_RUN = str(ROOT / "tests" / "killed_run.py")

# XLA's older way to write loops, which compiles in half the time.
QUICK_TO_COMPILE = "--xla_cpu_use_fusion_emitters=false"

# Three steps an epoch; seven images are left over. Few activations and small
# steps, so that no other rounding, that of more devices, say, puts the input of
# a ReLU on the other side of zero (see benchmarks/parity.py).
SMALL = shlex.split(
  "--dataset digits --depth 8 --ratios .5 --epochs 2 --batch-size 16 "
  "--train-examples 55 --log-every 1 --learning-rate .01"
)


def start(*arguments, cwd, devices=4, optimized=False, variables=None):
  """Starts `python ARGUMENTS`, with these environment variables too."""
  flags = f"--xla_force_host_platform_device_count={devices}"
  if not optimized:  # Compiling is most of a short run.
    flags += f" {QUICK_TO_COMPILE}"
  environment = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": flags,
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "0" if optimized else "1",
    "PYTHONPATH": str(ROOT),
    **(variables or {}),
  }
  return subprocess.Popen(
    [sys.executable, *map(str, arguments)],
    cwd=cwd,
    env=environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def free_port():
  """Where the processes of a training can meet."""
  with socket.socket() as listener:
    listener.bind(("localhost", 0))
    return listener.getsockname()[1]


def finish(process, *, code=0):
  """Waits for a process, which must end with `code`; returns its output."""
  out, err = process.communicate()
  assert process.returncode == code, f"ended {process.returncode}\n{out}{err}"
  return out


def python(*arguments, **options):
  """Runs `python ARGUMENTS`, see `start`; returns its standard output."""
  return finish(start(*arguments, **options))


KILLED = -signal.SIGKILL


def final_state(run_dir):
  """The newest checkpoint, whole, and what the loop saved beside it."""
  target = build.abstract_state(run_directory.load_config(run_dir))
  with Checkpoints(run_dir) as checkpoints:
    restored = checkpoints.restore(target)
  return restored.state, restored.progress


def assert_same_result(run_a, run_b):
  """The two runs ended in the same state, to the bit, and said the same."""
  (state_a, progress_a), (state_b, progress_b) = map(
    final_state, (run_a, run_b)
  )
  assert progress_a == progress_b
  assert jax.tree.structure(state_a) == jax.tree.structure(state_b)
  for (path, a), b in zip(
    jax.tree_util.tree_leaves_with_path(state_a),
    jax.tree.leaves(state_b),
    strict=True,
  ):
    where = jax.tree_util.keystr(path)
    assert a.dtype == b.dtype, where
    # Bytes, so that NaN equals itself and -0.0 is not 0.0.
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), where
  for name in (run_directory.METRICS, run_directory.SUMMARY):
    assert (run_a / name).read_bytes() == (run_b / name).read_bytes(), name


def assert_close(run_a, run_b, tolerance=1e-5, examples=360):
  """The same work in both runs, and the same numbers but for rounding."""
  a, b = (
    {
      (line["kind"], line["step"]): line
      for line in run_directory.read_metrics(run)
    }
    for run in (run_a, run_b)
  )
  assert a.keys() == b.keys()
  for where, line in a.items():
    if where[0] == "step":
      assert line["loss"] == pytest.approx(b[where]["loss"], rel=tolerance)
    if where[0] == "test":
      assert line["examples"] == b[where]["examples"] == examples
  for (path, value), (expected_path, expected) in zip(
    *(
      jax.tree_util.tree_leaves_with_path(
        final_state(run)[0]["method"]["params"]
      )
      for run in (run_a, run_b)
    ),
    strict=True,
  ):
    assert path == expected_path
    far = np.linalg.norm(value - expected) / np.linalg.norm(expected)
    assert far <= tolerance, jax.tree_util.keystr(path)


def contents(folder):
  """{path: bytes} of everything below a folder, for "nothing changed"."""
  return {
    path.relative_to(folder): path.read_bytes() if path.is_file() else None
    for path in sorted(folder.rglob("*"))
  }
