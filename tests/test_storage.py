"""Paths here and in buckets; what a full disk and a busy directory say."""

import errno
import os
import pathlib
import signal
import subprocess
import sys

import pytest

from ekd_jax import storage
from ekd_jax.errors import StorageError, UserError
from tests import runs


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
  target = storage.path(tmp_path / "file")
  storage.write_atomically(target, "old")

  def fail(*arguments):
    raise OSError(errno.ENOSPC, "No space left on device")

  with monkeypatch.context() as patch, pytest.raises(OSError):
    patch.setattr(os, "fsync", fail)
    storage.write_atomically(target, "new")
  assert target.read_text() == "old"
  storage.write_atomically(target, b"new")
  assert target.read_text() == "new"
  assert [path.name for path in tmp_path.iterdir()] == ["file"]


# Locks.


def test_a_directory_is_for_one_process_at_a_time(tmp_path):
  run_dir = tmp_path / "run"
  code = f"""
import sys
from ekd_jax import storage
with storage.locked({str(run_dir)!r}):
  print("locked", flush=True)
  sys.stdin.read()
"""
  owner = subprocess.Popen(
    [sys.executable, "-c", code],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
    env=os.environ | {"PYTHONPATH": str(runs.ROOT)},
  )
  assert owner.stdout.readline() == "locked\n"
  with (
    pytest.raises(
      UserError, match=f"in use by process {owner.pid} on "
    ) as told,
    storage.locked(run_dir),
  ):
    pytest.fail("got in")
  assert "\n" not in str(told.value)
  # The lock goes with its owner, however that ends.
  owner.send_signal(signal.SIGKILL)
  owner.communicate()
  with storage.locked(run_dir):
    pass
  with storage.locked(run_dir):
    pass


# Failures.


@pytest.mark.parametrize(
  ("error", "said"),
  [
    (OSError(errno.ENOSPC, "x"), "no space is left"),
    (OSError(errno.EROFS, "x"), "read-only"),
    (OSError(errno.EFBIG, "x"), "larger than is allowed"),
    (OSError(errno.EDQUOT, "x"), "quota"),
    (PermissionError(errno.EACCES, "x"), "not permitted"),
    # As tensorstore says it: in words, in an error of another type.
    (
      ValueError("UNAVAILABLE: write: No space left on device [f='x']"),
      "space",
    ),
    (RuntimeError("Read-only file system"), "read-only"),
  ],
)
def test_a_failure_to_write_is_told_in_one_line(error, said, tmp_path):
  with (
    pytest.raises(StorageError) as told,
    storage.failures_told(
      tmp_path, needed_bytes=12_000_000, kept=lambda: "step 3 is kept"
    ),
  ):
    raise error
  message = str(told.value)
  assert said in message
  assert str(tmp_path) in message
  assert "about 12 MB" in message
  assert "step 3 is kept" in message
  assert "\n" not in message
  assert told.value.__cause__ is error


def test_a_failure_is_found_behind_others(tmp_path):
  with (
    pytest.raises(StorageError, match="no space"),
    storage.failures_told(tmp_path),
  ):
    try:
      raise OSError(errno.ENOSPC, "x")
    except OSError as error:
      raise RuntimeError("saving failed") from error


@pytest.mark.parametrize(
  "error", [ValueError("a bug"), OSError(errno.EIO, "x"), KeyError("step")]
)
def test_what_is_no_failure_to_write_stays_what_it_is(error, tmp_path):
  with pytest.raises(type(error)) as caught, storage.failures_told(tmp_path):
    raise error
  assert caught.value is error


def test_a_mistake_keeps_its_words(tmp_path):
  mistake = UserError("Permission denied, said somebody")
  with pytest.raises(UserError) as caught, storage.failures_told(tmp_path):
    raise mistake
  assert caught.value is mistake


# Buckets, as far as that needs none.


@pytest.mark.parametrize(
  ("where", "remote"),
  [
    ("gs://b/run", True),
    ("run", False),
    ("/a/b", False),
    (pathlib.Path("a"), 0),
  ],
)
def test_what_is_in_a_bucket(where, remote):
  assert storage.is_remote(where) == remote


def test_what_goes_wrong_with_a_bucket_is_one_line():
  def reach(where, error):
    with storage.reached(where, "--run-dir"):
      raise error

  with pytest.raises(UserError) as told:
    reach("gs://b/run", ConnectionError("no route\nto host"))
  assert str(told.value).startswith("--run-dir gs://b/run cannot be reached")
  assert "\n" not in str(told.value)
  with pytest.raises(UserError, match=r"pip install 'ekd-jax\[gs\]'"):
    reach("gs://b/run", ImportError("No module named 'gcsfs'"))
  # Here, it is whatever it is.
  with pytest.raises(ConnectionError):
    reach("run", ConnectionError("x"))
