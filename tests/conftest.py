"""Four CPU devices for every test, set before jax is imported.

Tests that need one device take the first of the four, or start a process of
their own (see runs.py).
"""

import gc
import os
import shutil
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
# XLA's older way to write loops compiles in half the time. Where the compiled
# program itself is tested (training/test_program.py), and where a user's own
# command is (test_end_to_end.py), it is the way that users get.
os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "")
  + " --xla_force_host_platform_device_count=4"
  + " --xla_cpu_use_fusion_emitters=false"
).strip()
# What one test compiles, another test or a process that it starts finds.
_compiled = None
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
  _compiled = tempfile.mkdtemp(prefix="ekd_jax_compiled_")
  os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import filelock  # noqa: E402
import pytest  # noqa: E402

from tests import runs  # noqa: E402


def pytest_unconfigure():
  if _compiled is not None:
    shutil.rmtree(_compiled, ignore_errors=True)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
  """{devices: finished run} of `runs.SMALL` on one and on four devices.

  Shared: whoever changes one makes a copy first.
  """
  root = tmp_path_factory.getbasetemp()
  if "PYTEST_XDIST_WORKER" in os.environ:
    root = root.parent  # Of all workers: the first trains, the others wait.
  folder = root / "trained"
  found = {devices: folder / f"on_{devices}" for devices in (1, 4)}
  with filelock.FileLock(root / "trained.lock"):
    if not folder.exists():
      folder.mkdir()
      processes = {
        run_dir: runs.start(
          *(runs.EXPERIMENT, *runs.SMALL, "--run-dir", run_dir),
          cwd=folder,
          devices=devices,
        )
        for devices, run_dir in found.items()
      }
      for run_dir, process in processes.items():
        run_dir.with_suffix(".txt").write_text(runs.finish(process))
  return found


@pytest.fixture(scope="module", autouse=True)
def _programs_forgotten():
  """A module's compiled programs go when its tests are done.

  Each takes memory maps, of which Linux gives a process 65,530; a session's
  programs together would need more, and XLA does not survive that.
  """
  yield
  import jax

  jax.clear_caches()
  gc.collect()


@pytest.fixture
def compilations():
  """The names of the programs that XLA is asked for during the test."""
  from jax import monitoring

  names = []

  def listen(event, duration, **details):
    if event == "/jax/core/compile/backend_compile_duration":
      names.append(details["fun_name"])

  monitoring.register_event_duration_secs_listener(listen)
  yield names
  monitoring.unregister_event_duration_listener(listen)
