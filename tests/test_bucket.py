"""Runs and data in a bucket: the whole command line, against a fake one."""

import json

import pytest

from ekd_jax import run_directory
from tests import runs
from tests.fake_bucket import BUCKET, FakeBucket

pytest.importorskip("gcsfs")
pytest.importorskip("google.cloud.storage")


@pytest.fixture
def bucket():
  with FakeBucket() as bucket:
    yield bucket


def _train(bucket, folder, *more, script=runs.EXPERIMENT):
  return runs.start(
    *([script] if isinstance(script, str) else script),
    *(*runs.SMALL, "--run-dir", f"gs://{BUCKET}/runs/one", *more),
    cwd=folder,
    devices=1,
    variables=bucket.environment,
  )


def _copied(bucket, folder):
  """The run in the bucket, as files."""
  for name, content in bucket.objects.items():
    if not name.endswith("/"):
      path = folder / name
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes(content)
  return folder / "runs" / "one"


@pytest.mark.slow
def test_a_run_in_a_bucket_is_killed_resumed_and_read(
  bucket, tmp_path, trained
):
  killed = _train(
    bucket, tmp_path, "--checkpoint-minutes", "1e-9",
    script=[runs.KILLED_RUN, "5"],
  )  # fmt: skip
  runs.finish(killed, code=runs.KILLED)
  shown = runs.finish(_train(bucket, tmp_path))
  assert "resuming at step" in shown
  # Nothing of it lies on this machine.
  assert list(tmp_path.iterdir()) == []
  run_dir = _copied(bucket, tmp_path / "copy")
  runs.assert_same_result(run_dir, trained[1])
  assert {path.name for path in run_dir.iterdir()} >= {
    "config.json", "command.txt", "environment.json", "metrics.jsonl",
    "tensorboard", "checkpoints", "summary.json", "report.html",
  }  # fmt: skip
  assert not list(run_dir.rglob("*.tmp*"))
  # And from there: other commands, and Python.
  where = f"gs://{BUCKET}/runs/one"
  for arguments in (
    ["-m", "ekd_jax", "report", where],
    ["-m", "ekd_jax", "evaluate", where],
    ["-c", f"import ekd_jax; ekd_jax.load_student({where!r}, 'student_1')"],
  ):
    runs.python(
      *arguments, cwd=tmp_path, devices=1, variables=bucket.environment
    )


def test_options_are_compared_with_those_in_the_bucket(bucket, tmp_path):
  config = {"depth": 8, "dataset": "digits"}
  bucket.put("runs/one/config.json", json.dumps(config).encode())
  before = dict(bucket.objects)
  process = _train(bucket, tmp_path, "--learning-rate", ".5")
  _, err = process.communicate()
  assert process.returncode == 2
  (line,) = err.splitlines()
  assert "--learning-rate (there 0.1, now 0.5)" in line
  assert bucket.objects == before


def test_a_bucket_that_is_not_there_is_told_in_one_line(bucket, tmp_path):
  process = runs.start(
    runs.EXPERIMENT, *runs.SMALL, "--run-dir", "gs://another/run",
    cwd=tmp_path, devices=1, variables=bucket.environment,
  )  # fmt: skip
  _, err = process.communicate(timeout=120)
  assert process.returncode == 2, err
  (line,) = err.splitlines()
  assert "gs://another/run" in line


def test_data_is_read_from_a_bucket(bucket, tmp_path, monkeypatch):
  """A CIFAR-10 of two records a file, read as the local folder is."""
  code = """
import dataclasses, sys
from ekd_jax.data import cifar, sources
small = dataclasses.replace(
  cifar.LAYOUTS["cifar10"], train_records=2, test_records=2
)
arrays = sources.read("cifar10", small, sys.argv[1], False)
print([array.shape for array in arrays], [int(a.sum()) for a in arrays])
"""
  folder = tmp_path / "data" / "cifar-10-batches-bin"
  folder.mkdir(parents=True)
  names = [*(f"data_batch_{n}.bin" for n in range(1, 6)), "test_batch.bin"]
  for number, name in enumerate(names):
    record = bytes([number]) + bytes([17 * number]) * 3072
    (folder / name).write_bytes(2 * record)
    bucket.put(f"data/cifar-10-batches-bin/{name}", 2 * record)
  local, remote = (
    runs.python(
      "-c", code, where,
      cwd=tmp_path, devices=1, variables=bucket.environment,
    )
    for where in (tmp_path / "data", f"gs://{BUCKET}/data")
  )  # fmt: skip
  assert local == remote
  assert local.startswith("[(10, 32, 32, 3), (10,), (2, 32, 32, 3), (2,)]")


def test_metrics_are_in_the_bucket_before_the_checkpoint_is(bucket, tmp_path):
  """What a kill between the two would lose can be made again."""
  process = _train(
    bucket, tmp_path, "--checkpoint-minutes", "1e-9",
    script=[runs.KILLED_RUN, "6"],
  )  # fmt: skip
  runs.finish(process, code=runs.KILLED)
  run_dir = _copied(bucket, tmp_path / "copy")
  saved = max(
    int(path.name)
    for path in (run_dir / "checkpoints").iterdir()
    if path.name.isdigit()
  )
  steps = [
    line["step"]
    for line in run_directory.read_metrics(run_dir)
    if line["kind"] == "step"
  ]
  assert steps[:saved] == list(range(1, saved + 1))
