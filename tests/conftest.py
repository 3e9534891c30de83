"""Four CPU devices for every test, set before jax is imported.

Tests that need one device take the first of the four, or start a process of
their own (see runs.py).
"""

import gc
import os
import shutil
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
).strip()
# What one test compiles, another test or a process that it starts finds.
_compiled = None
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
  _compiled = tempfile.mkdtemp(prefix="ekd_jax_compiled_")
  os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

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
  folder = tmp_path_factory.mktemp("trained")
  processes = {
    devices: runs.start(
      runs.EXPERIMENT,
      *runs.SMALL,
      "--run-dir",
      f"on_{devices}",
      cwd=folder,
      devices=devices,
    )
    for devices in (1, 4)
  }
  shown = {n: runs.finish(process) for n, process in processes.items()}
  for devices, output in shown.items():
    (folder / f"on_{devices}.txt").write_text(output)
  return {devices: folder / f"on_{devices}" for devices in processes}


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
