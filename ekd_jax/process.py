"""What the command line sets for its own process: memory, compiled programs.

A library must not change these for the program it is part of, so nothing but
`cli` calls this file.

Allocator: a step's scratch memory is hundreds of megabytes. glibc maps it anew
at every step and gives it back after it, which on a CPU costs a quarter of the
step in page faults. Told to keep what it has, it costs nothing. What compiling
leaves behind has to be tidied up then, or it is in the way of every step.

Compilation cache: XLA's programs are kept in the user's cache directory, so
that the same training starts in seconds the second time.
"""

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import pathlib
import platform
import shutil
import tempfile

import platformdirs

# Parameters of mallopt, from glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_TOP_PAD = -2
_M_MMAP_MAX = -4
_M_ARENA_MAX = -8

_CACHE_BYTES = 2 * 2**30
# A program takes up to 50 MB; the run's own checkpoints need the rest more.
_CACHE_FREE_BYTES = 200 * 2**20

# What JAX calls it when XLA has compiled a program.
_COMPILED_EVENT = "/jax/core/compile/backend_compile_duration"
# Shorter ones leave little behind, and tidying up takes half a second.
_LONG_COMPILATION_SECONDS = 2.0

_allocator_is_tuned = False


def tune_allocator() -> None:
  """Tells glibc to keep the memory it has, if JAX will run on the CPU.

  To be called before jax is imported: its threads must find the setting. Peak
  memory stays: what is freed is kept for the next step, and goes back to the
  system only after a compilation (`tidy_after_compiling`) or with the process.
  With an accelerator or another C library it does nothing.
  """
  global _allocator_is_tuned
  if platform.libc_ver()[0] != "glibc" or not _only_cpu():
    return
  mallopt = ctypes.CDLL(None).mallopt
  settings = {
    _M_ARENA_MAX: 1,  # What one thread freed, another can use.
    _M_MMAP_MAX: 0,  # Large blocks come from the heap, not from mmap ...
    _M_TRIM_THRESHOLD: -1,  # ... which never shrinks ...
    _M_TOP_PAD: 64 * 2**20,  # ... and grows in large pieces.
  }
  _allocator_is_tuned = all(
    mallopt(parameter, value) for parameter, value in settings.items()
  )


def allocator() -> str:
  """For the record: how this process allocates memory."""
  return "tuned glibc" if _allocator_is_tuned else "default"


class _Statistics(ctypes.Structure):
  """glibc's struct mallinfo2."""

  _fields_ = [
    (name, ctypes.c_size_t)
    for name in (
      *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
      *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
    )
  ]


def tidy_after_compiling() -> None:
  """Has the tuned allocator tidied up after each long compilation.

  A compiled program leaves up to a gigabyte in a hundred thousand free blocks.
  Their pages go back to the system. And those of middle size are taken out of
  circulation: a step allocates thousands of such blocks, and for each of them
  glibc would walk through lists of misfits, a tenth to a quarter of a step.

  To be called once, after `tune_allocator`; does nothing if that did nothing.
  """
  if not _allocator_is_tuned:
    return
  import jax

  def listen(event: str, seconds: float, **_: object) -> None:
    if event == _COMPILED_EVENT and seconds >= _LONG_COMPILATION_SECONDS:
      _tidy()

  jax.monitoring.register_event_duration_secs_listener(listen)


def _tidy() -> None:
  libc = ctypes.CDLL(None)
  libc.malloc_trim(ctypes.c_size_t(0))
  if not hasattr(libc, "mallinfo2"):  # glibc before 2.33.
    return
  libc.mallinfo2.restype = _Statistics
  libc.sbrk.argtypes, libc.sbrk.restype = [ctypes.c_ssize_t], ctypes.c_void_p
  libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
  libc.free.argtypes, libc.free.restype = [ctypes.c_void_p], None
  # Above this the heap is one piece; below it are the blocks in question.
  top = libc.sbrk(0) - libc.mallinfo2().keepcost

  def take(size: int) -> list[int]:
    """Allocates every free block of at least this size."""
    taken = []
    while (block := libc.malloc(size)) is not None and block < top:
      taken.append(block)
    libc.free(block)
    return taken

  # The large ones stay: they are put aside only so that none is cut up.
  kept = [block for power in range(30, 19, -1) for block in take(2**power)]
  for kibibytes in (512, 384, 256, 192, 128, 96, 64, 48, 32):
    take(1024 * kibibytes)  # Never freed. Untouched, they take no memory.
  for block in kept:
    libc.free(block)


def use_compilation_cache() -> str | None:
  """Keeps compiled programs in the user's cache directory.

  Its size is bounded, the least recently used program goes first; processes
  may share it. JAX_COMPILATION_CACHE_DIR names another directory.

  Returns:
    None, or why it cannot be used. That costs the time to compile at every
    start, and never the run.
  """
  import jax

  if jax.config.jax_compilation_cache_dir is not None:
    return None  # The user's own setting.
  directory = _cache_directory()
  try:
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=directory) as file:
      file.write(b"\0")
    problem = None
    if shutil.disk_usage(directory).free < _CACHE_FREE_BYTES:
      problem = "the disk is nearly full"
  except OSError as error:
    problem = error.strerror
  if problem is not None:
    return (
      f"compiled programs are not kept, {directory}: {problem}; name another "
      "place in JAX_COMPILATION_CACHE_DIR or give --no-compilation-cache"
    )
  jax.config.update("jax_compilation_cache_dir", str(directory))
  jax.config.update("jax_compilation_cache_max_size", _CACHE_BYTES)
  # Dozens of small programs draw the parameters; together they take seconds.
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
  return None


def _only_cpu() -> bool:
  """Whether JAX will find no accelerator, answered without importing it."""
  platforms = os.environ.get("JAX_PLATFORMS")
  if platforms:
    return platforms == "cpu"
  plugins = importlib.metadata.entry_points(group="jax_plugins")
  packages = map(importlib.util.find_spec, ("jax_plugins", "libtpu"))
  return not plugins and not any(packages)


def _cache_directory() -> pathlib.Path:
  # A home directory may be shared by machines with different processors, and
  # a program that was compiled for one can crash another.
  processor = platform.machine() + platform.processor()
  cpuinfo = pathlib.Path("/proc/cpuinfo")
  if cpuinfo.exists():
    lines = cpuinfo.read_text(encoding="utf-8").splitlines()
    processor += next((s for s in lines if s.startswith("flags")), "")
  name = hashlib.sha256(processor.encode()).hexdigest()[:12]
  return pathlib.Path(platformdirs.user_cache_dir("ekd_jax")) / "xla" / name
