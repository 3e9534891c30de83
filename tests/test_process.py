"""The process's own settings: allocator, compiled programs, their switches.

What JAX and this process were set to is put back after each test.
"""

import collections
import errno
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
import shlex
import shutil
import tempfile
import types

import jax
import platformdirs
import pytest

from ekd_jax import build, cli, process
from ekd_jax.config import Config
from tests import runs, tiny
from tests.models.conftest import OPTION

GIBIBYTE = 2**30
CACHE_OPTIONS = (
  "jax_compilation_cache_dir",
  "jax_compilation_cache_max_size",
  "jax_persistent_cache_min_compile_time_secs",
)


@pytest.fixture
def caches(tmp_path, monkeypatch):
  """A user's cache directory, as long as JAX has been told of none."""
  before = {name: getattr(jax.config, name) for name in CACHE_OPTIONS}
  jax.config.update("jax_compilation_cache_dir", None)
  directory = tmp_path / "caches"
  monkeypatch.setattr(
    platformdirs, "user_cache_dir", lambda name: str(directory / name)
  )
  yield directory
  for name, value in before.items():
    jax.config.update(name, value)


def _cache_settings():
  return {name: getattr(jax.config, name) for name in CACHE_OPTIONS}


# Compiled programs.


def test_programs_are_kept_in_the_users_cache_directory_and_bounded(caches):
  assert process.use_compilation_cache() is None
  directory = pathlib.Path(jax.config.jax_compilation_cache_dir)
  assert directory.is_dir()
  assert directory.parent == caches / "ekd_jax" / "xla"
  # What tried the directory out is gone.
  assert list(directory.iterdir()) == []
  assert jax.config.jax_compilation_cache_max_size == 2 * GIBIBYTE
  # Another process of the same machine finds the same programs.
  jax.config.update("jax_compilation_cache_dir", None)
  assert process.use_compilation_cache() is None
  assert jax.config.jax_compilation_cache_dir == str(directory)


def test_another_processor_has_other_programs(caches, monkeypatch):
  process.use_compilation_cache()
  here = jax.config.jax_compilation_cache_dir
  jax.config.update("jax_compilation_cache_dir", None)
  monkeypatch.setattr(platform, "machine", lambda: "another")
  process.use_compilation_cache()
  assert jax.config.jax_compilation_cache_dir != here


def test_a_users_own_directory_is_left_as_it_is(caches, tmp_path):
  jax.config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
  before = _cache_settings()
  assert process.use_compilation_cache() is None
  assert _cache_settings() == before
  assert not caches.exists()


def _denied(*arguments, **options):
  raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def _without_space(*arguments, **options):
  raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture(
  params=["a file is there", "not writable", "full", "nearly full"]
)
def unusable(request, caches, monkeypatch):
  """A cache directory that cannot be used; returns the reason to be given.

  Patched, because the superuser may write anywhere.
  """
  if request.param == "a file is there":
    caches.write_text("")
    return "Not a directory"
  if request.param == "not writable":
    monkeypatch.setattr(tempfile, "TemporaryFile", _denied)
    return "Permission denied"
  if request.param == "full":
    monkeypatch.setattr(tempfile, "TemporaryFile", _without_space)
    return "No space left on device"
  usage = collections.namedtuple("usage", "total used free")
  monkeypatch.setattr(
    shutil,
    "disk_usage",
    lambda path: usage(10 * GIBIBYTE, 10 * GIBIBYTE - 10**8, 10**8),
  )
  return "the disk is nearly full"


def test_why_no_programs_are_kept_is_said_in_one_line(unusable, caches):
  before = _cache_settings()
  reason = process.use_compilation_cache()
  assert "\n" not in reason
  assert str(caches / "ekd_jax") in reason
  assert f": {unusable}; " in reason
  # Both ways out are named.
  assert "JAX_COMPILATION_CACHE_DIR" in reason
  assert "--no-compilation-cache" in reason
  assert _cache_settings() == before


_SHARING = """
import sys
import jax, jax.numpy as jnp, platformdirs
from jax import monitoring
from ekd_jax import process

platformdirs.user_cache_dir = lambda name: sys.argv[1]
hits = []
monitoring.register_event_listener(
  lambda event, **_: hits.append(event.endswith("/cache_hits")))
assert process.use_compilation_cache() is None
for size in range(3, 9):
  jax.jit(lambda x: jnp.sin(x) @ jnp.cos(x).T)(jnp.ones((size, size)))
print(sum(hits))
"""


def test_processes_share_their_programs(tmp_path, monkeypatch):
  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
  # Small programs are kept without being asked for.
  monkeypatch.delenv(
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", raising=False
  )

  def start():
    return runs.start("-c", _SHARING, tmp_path / "caches", cwd=tmp_path)

  # Two write at the same time, each perhaps what the other is reading.
  for one in [start(), start()]:
    runs.finish(one)
  assert int(runs.finish(start())) >= 6


# Memory.


@pytest.fixture
def mallopt(monkeypatch):
  """What glibc is told, without telling it: {parameter: value}."""
  told = {}

  class Library:
    @staticmethod
    def mallopt(parameter, value):
      told[parameter] = value
      return 1

  _replace_libraries(monkeypatch, Library)
  monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.36"))
  monkeypatch.setattr(process, "_allocator_is_tuned", False)
  monkeypatch.setattr(process, "tidy_after_compiling", lambda: None)
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  return told


def _replace_libraries(monkeypatch, library):
  # Not in ctypes itself: others load libraries meanwhile.
  loader = types.SimpleNamespace(CDLL=lambda name: library)
  monkeypatch.setattr(process, "ctypes", loader)


def _no_accelerator(monkeypatch):
  monkeypatch.delenv("JAX_PLATFORMS")
  monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: ())
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


def test_glibc_is_told_to_keep_its_memory_on_a_cpu(mallopt):
  assert process.allocator() == "default"
  process.tune_allocator()
  # The parameters' numbers are those of glibc's malloc.h.
  assert mallopt == {-8: 1, -4: 0, -1: -1, -2: 64 * 2**20}
  assert process.allocator() == "tuned glibc"


def test_a_machine_without_accelerators_is_a_cpu(mallopt, monkeypatch):
  _no_accelerator(monkeypatch)
  process.tune_allocator()
  assert mallopt


@pytest.mark.parametrize("platforms", ["cuda", "cuda,cpu", "tpu", "rocm"])
def test_the_allocator_is_left_alone_beside_an_accelerator(
  platforms, mallopt, monkeypatch
):
  monkeypatch.setenv("JAX_PLATFORMS", platforms)
  process.tune_allocator()
  assert mallopt == {}
  assert process.allocator() == "default"


@pytest.mark.parametrize("package", ["jax_plugins", "libtpu"])
def test_an_installed_plugin_counts_as_an_accelerator(
  package, mallopt, monkeypatch
):
  _no_accelerator(monkeypatch)
  monkeypatch.setattr(
    importlib.util, "find_spec", lambda name: name if name == package else None
  )
  process.tune_allocator()
  assert mallopt == {}


def test_an_announced_plugin_counts_as_an_accelerator(mallopt, monkeypatch):
  _no_accelerator(monkeypatch)
  groups = {"jax_plugins": ("cuda",)}
  monkeypatch.setattr(
    importlib.metadata, "entry_points", lambda group: groups.get(group, ())
  )
  process.tune_allocator()
  assert mallopt == {}


@pytest.mark.parametrize("library", [("", ""), ("musl", "1.2")])
def test_another_c_library_is_left_alone(library, mallopt, monkeypatch):
  monkeypatch.setattr(platform, "libc_ver", lambda: library)
  process.tune_allocator()
  assert mallopt == {}
  assert process.allocator() == "default"


def test_a_setting_that_glibc_refuses_is_not_called_tuned(mallopt, monkeypatch):
  refused = lambda parameter, value: int(parameter != -4)  # noqa: E731
  library = type("Library", (), {"mallopt": staticmethod(refused)})
  _replace_libraries(monkeypatch, library)
  process.tune_allocator()
  assert process.allocator() == "default"


_TIDYING = """
import ctypes, os, pathlib, random
from ekd_jax import process

process.tune_allocator()
libc = ctypes.CDLL(None)
libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]

def resident():
  pages = pathlib.Path("/proc/self/statm").read_text().split()[1]
  return int(pages) * os.sysconf("SC_PAGE_SIZE")

def in_a_gap(size):
  block = libc.malloc(size)
  return any(start <= block < start + gap for start, gap in gaps)

random.seed(0)
sizes = [1024 * random.randrange(40, 500) for _ in range(2000)]
blocks = sorted((libc.malloc(size), size) for size in sizes)
gaps = blocks[::2]  # The others stay and keep them apart.
for start, size in gaps:
  ctypes.memset(start, 1, size)
for start, _ in gaps:
  libc.free(start)
before = resident()
assert in_a_gap(100_000)
process._tidy()
assert not in_a_gap(100_000) and not in_a_gap(200_000)
print((before - resident()) / sum(size for _, size in gaps))
"""


def _has_mallinfo2():
  name, version = platform.libc_ver()
  return name == "glibc" and tuple(map(int, version.split("."))) >= (2, 33)


@pytest.mark.skipif(not _has_mallinfo2(), reason="glibc 2.33 or later")
def test_tidying_up_returns_free_pages_and_retires_the_gaps(tmp_path):
  assert float(runs.python("-c", _TIDYING, cwd=tmp_path)) > 0.9


_LISTENING = """
import jax, jax.numpy as jnp
from ekd_jax import process

tidied = []
process._tidy = lambda: tidied.append(1)
jax.config.update("jax_enable_compilation_cache", False)
if {tuned}:
  process.tune_allocator()
process.tidy_after_compiling()
for seconds in (1e9, 0):
  process._LONG_COMPILATION_SECONDS = seconds
  jax.jit(lambda x: jnp.sin(x) + seconds)(1.0)
  print(len(tidied))
"""


@pytest.mark.skipif(
  platform.libc_ver()[0] != "glibc", reason="another C library is left alone"
)
@pytest.mark.parametrize("tuned", [True, False])
def test_only_long_compilations_are_tidied_up_after(tuned, tmp_path):
  script = _LISTENING.format(tuned=tuned)
  short, long = runs.python("-c", script, cwd=tmp_path).split()
  assert short == "0"
  assert (int(long) > 0) == tuned


# The command line.


@pytest.fixture
def train(tmp_path, monkeypatch):
  """Runs the tiny training; returns what the start left on record."""
  monkeypatch.setattr(build, "method", tiny.method)
  monkeypatch.chdir(tmp_path)

  def run(more=""):
    arguments = [*tiny.FLAGS, "--run-dir", "run", *shlex.split(more)]
    cli.main(Config(), "Trains.", ["train", *arguments])
    record = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert (tmp_path / "run" / "summary.json").is_file()
    return record["starts"][-1]

  # Compiling is most of such a run, and nothing compiled was kept before it.
  before = jax.config.read(OPTION)
  jax.config.update(OPTION, True)
  yield run
  jax.config.update(OPTION, before)


def test_a_run_keeps_its_programs_and_says_where(train, caches, mallopt):
  start = train()
  assert start["compilation_cache"] == jax.config.jax_compilation_cache_dir
  assert start["compilation_cache"].startswith(str(caches))
  assert start["allocator"] == "tuned glibc"
  assert mallopt


def test_both_can_be_switched_off(train, caches, mallopt):
  start = train("--no-compilation-cache --no-tune-allocator")
  assert start["compilation_cache"] is None
  assert start["allocator"] == "default"
  assert mallopt == {}
  assert not caches.exists()


def test_a_run_goes_on_without_a_cache(
  train, unusable, caches, mallopt, monkeypatch, capsys
):
  start = train("--epochs 1")
  shown = capsys.readouterr().out
  (warning,) = [s for s in shown.splitlines() if "warning: compiled" in s]
  assert unusable in warning
  assert start["compilation_cache"] is None


def test_a_real_run_has_both_on_record(trained):
  record = json.loads((trained[1] / "environment.json").read_text())
  tuned = platform.libc_ver()[0] == "glibc"
  for start in record["starts"]:
    assert start["allocator"] == ("tuned glibc" if tuned else "default")
    # Set for all tests, see conftest.py.
    own = os.environ["JAX_COMPILATION_CACHE_DIR"]
    assert start["compilation_cache"] == own
