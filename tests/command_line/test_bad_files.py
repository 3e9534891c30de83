"""Rubbish on disk: data, run directories, checkpoints. One line for each.

Through the whole command line; what single readers say is tested beside them.
"""

import dataclasses
import io
import json
import os
import pathlib
import pickle
import shutil
import tarfile

import pytest

from ekd_jax import build, cli
from ekd_jax.data import cifar
from tests import runs, tiny
from tests.command_line.called import error, main

LAYOUT = dataclasses.replace(
  cifar.LAYOUTS["cifar10"], train_records=20, test_records=20
)
RECORD = bytes([3]) + bytes(3072)
FILES = {name: 20 * RECORD for name in LAYOUT.file_bytes}
ARCHIVE = f"data/{LAYOUT.archive}"
FOLDER = f"data/{LAYOUT.folder}"


@pytest.fixture(autouse=True)
def small_cifar(monkeypatch):
  monkeypatch.setitem(cifar.LAYOUTS, "cifar10", LAYOUT)


def _packed(files=FILES, special=()):
  packed = io.BytesIO()
  with tarfile.open(fileobj=packed, mode="w:gz") as archive:
    for name, content in files.items():
      member = tarfile.TarInfo(f"{LAYOUT.folder}/{name}")
      member.size = len(content)
      archive.addfile(member, io.BytesIO(content))
    for member in special:
      archive.addfile(member)
  return packed.getvalue()


def _member(name, kind=tarfile.REGTYPE, target=""):
  member = tarfile.TarInfo(name)
  member.type, member.linkname = kind, target
  return member


def _unpacked(changes):
  return {f"{FOLDER}/{name}": c for name, c in (FILES | changes).items() if c}


class _Harmful:
  """Says so if anybody unpickles it."""

  def __reduce__(self):
    return (os.mkdir, ("unpickled",))


GOOD = _packed()
BAD_LABEL = 19 * RECORD + bytes([10]) + bytes(3072)
TEST = LAYOUT.test_file

# What lies there -> what is said.
DATA = {
  "nothing": ({}, "which does not exist"),
  "an empty folder": ({"data/sub/": None}, "has no cifar10"),
  "other files": ({"data/thesis.tex": b"x"}, "has no cifar10"),
  "a web page": ({ARCHIVE: b"<!DOCTYPE html><p>Not found"}, "is not the offic"),
  "an empty archive": ({ARCHIVE: b""}, "is not the official"),
  "half an archive": ({ARCHIVE: GOOD[: len(GOOD) // 2]}, "is not the official"),
  "an archive without its end": ({ARCHIVE: GOOD[:-6]}, "is not the official"),
  "an archive of one file": (
    {ARCHIVE: _packed({TEST: FILES[TEST]})}, "it lacks data_batch_1.bin",
  ),
  "a short file in the archive": (
    {ARCHIVE: _packed(FILES | {TEST: RECORD})}, "3,073 bytes instead of 61,460",
  ),
  "a wrong label in the archive": (
    {ARCHIVE: _packed(FILES | {TEST: BAD_LABEL})}, "record 19 has label 10",
  ),
  "a path out of the archive": (
    {ARCHIVE: _packed(special=[_member("../../out")])}, "points outside",
  ),
  "an absolute path": (
    {ARCHIVE: _packed(special=[_member("/etc/passwd")])}, "points outside",
  ),
  "a symbolic link": (
    {ARCHIVE: _packed(special=[_member("a", tarfile.SYMTYPE, "/etc/passwd")])},
    "is not a plain file",
  ),
  "a hard link": (
    {ARCHIVE: _packed(special=[_member("a", tarfile.LNKTYPE, "/etc/passwd")])},
    "is not a plain file",
  ),
  "a device": (
    {ARCHIVE: _packed(special=[_member("a", tarfile.CHRTYPE)])},
    "is not a plain file",
  ),
  "the archive of pickles": (
    {"data/cifar-10-python.tar.gz": b"x"}, "pickles can run code",
  ),
  "a pickle as the archive": (
    {ARCHIVE: pickle.dumps(_Harmful())}, "is not the official",
  ),
  "a pickle as a file": (
    _unpacked({TEST: pickle.dumps(_Harmful())}), "bytes instead of 61,460",
  ),
  "a file too little": (_unpacked({TEST: None}), "is missing although"),
  "a file too short": (_unpacked({TEST: 19 * RECORD}), "instead of 61,460"),
  "a file too long": (_unpacked({TEST: 21 * RECORD}), "instead of 61,460"),
  "an empty file": (_unpacked({TEST: b"\0"}), "has 1 bytes instead of 61,460"),
  "a wrong label": (_unpacked({TEST: BAD_LABEL}), "allowed are 0 to 9"),
  "TFDS's description alone": (
    {"data/cifar10/3.0.2/dataset_info.json": b"{}"}, "is not readable as a",
  ),
  "TFDS's TFRecord": (
    {"data/cifar10/3.0.2/dataset_info.json": b'{"fileFormat": "tfrecord"}'},
    "was prepared as tfrecord, which takes TensorFlow",
  ),
  "TFDS without its files": (
    {"data/cifar10/3.0.2/dataset_info.json": b'{"fileFormat": "array_record"}'},
    "cannot be read as the cifar10 of TFDS",
  ),
}  # fmt: skip


def _lay(folder, files):
  for name, content in files.items():
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if content is None:
      path.mkdir(exist_ok=True)
    else:
      path.write_bytes(content)


def _train_cifar(more=""):
  main(
    "--dataset cifar10 --depth 8 --batch-size 32 --run-dir run --data-dir "
    f"../data {more}"
  )


@pytest.mark.parametrize(("files", "said"), DATA.values(), ids=DATA)
def test_bad_data_is_told_in_one_line(files, said, folder, capsys):
  _lay(folder, files)
  before = runs.contents(folder)
  line = error(capsys, _train_cifar)
  assert said in line
  assert runs.contents(folder) == before


def test_the_data_that_these_start_from_is_fine(folder, monkeypatch):
  class Started(Exception):
    pass

  def train(*arguments, **options):
    raise Started

  monkeypatch.setattr("ekd_jax.training.loop.train", train)
  for files in ({ARCHIVE: GOOD}, _unpacked({})):
    shutil.rmtree(folder / "data", ignore_errors=True)
    _lay(folder, files)
    with pytest.raises(Started):
      _train_cifar()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_data_is_told_in_one_line(folder, capsys):
  _lay(folder, {ARCHIVE: GOOD})
  (folder / ARCHIVE).chmod(0)
  assert "cannot be read" in error(capsys, _train_cifar)


# Run directories.


@pytest.fixture
def run_dir(folder, monkeypatch, capsys):
  """A finished run of the tiny method."""
  monkeypatch.setattr(build, "method", tiny.method)
  _train()
  capsys.readouterr()
  return folder / "here" / "run"


def _train(more=""):
  main(" ".join(tiny.FLAGS) + " --run-dir run " + more)


def _config(**changes):
  def change(run_dir):
    path = run_dir / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))

  return change


def _write(name, content):
  return lambda run_dir: (run_dir / name).write_bytes(content)


def _empty_all_checkpoints(run_dir):
  for path in (run_dir / "checkpoints").rglob("*"):
    if path.is_file():
      path.write_bytes(b"")


def _checkpoints_of_another_network(run_dir):
  main(
    " ".join(tiny.FLAGS).replace("--ratios .5", "--ratios .5,.75")
    + " --run-dir other"
  )
  shutil.rmtree(run_dir / "checkpoints")
  shutil.move(run_dir.parent / "other" / "checkpoints", run_dir)
  shutil.rmtree(run_dir.parent / "other")


RUNS = {
  "half a config": (_write("config.json", b'{"depth": 8, "da'), "is damaged"),
  "no config": (_write("config.json", b""), "is damaged"),
  "a config of no options": (_write("config.json", b"[]"), "holds no options"),
  "a newer version's": (_config(dropout=0.5), "(dropout): it is of a newer"),
  "other options": (_config(depth=14), "--depth (there 14, now 8)"),
  "options of other types": (_config(depth="deep"), "have other types"),
  "rubbish among the metrics": (
    _write("metrics.jsonl", b"\x00\xff\n{}\n"), "is damaged in line 1",
  ),
  "lines of something else": (
    _write("metrics.jsonl", b'{"level": "info"}\n'), "is damaged in line 1",
  ),
  "damaged checkpoints": (_empty_all_checkpoints, "can be read (step 6: "),
  "another network's checkpoints": (
    _checkpoints_of_another_network, "no checkpoint under",
  ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "said"), RUNS.values(), ids=RUNS)
def test_a_bad_run_directory_is_told_in_one_line(change, said, run_dir, capsys):
  change(run_dir)
  capsys.readouterr()
  before = runs.contents(run_dir)
  with pytest.raises(SystemExit) as caught:
    _train()
  assert caught.value.code == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert said in line
  after = runs.contents(run_dir)
  # That it was started may be on record.
  records = {"command.txt", "environment.json", "config.json"}
  kept = {
    path: content
    for path, content in before.items()
    if str(path) not in records
  }
  assert kept.items() <= after.items()


@pytest.mark.parametrize(
  ("change", "said"),
  [
    (_write("config.json", b"{"), "is damaged"),
    (_config(dropout=0.5), "newer version"),
    (_write("metrics.jsonl", b"\xff\n"), "is damaged in line 1"),
  ],
)
@pytest.mark.parametrize("tool", ["report", "evaluate"])
def test_tools_say_so_too(tool, change, said, run_dir, capsys):
  change(run_dir)
  assert said in error(
    capsys, lambda: cli.tools(["ekd_jax", tool, str(run_dir)])
  )


def test_evaluating_a_damaged_checkpoint_is_told_in_one_line(run_dir, capsys):
  for path in (run_dir / "checkpoints" / "6").rglob("*"):
    if path.is_file():
      path.write_bytes(b"")
  line = error(capsys, lambda: cli.tools(["ekd_jax", "evaluate", str(run_dir)]))
  assert "the checkpoint of step 6 is damaged" in line
  assert "goes on from step 3" in line


# Nothing of what is read is ever executed.


def test_nothing_reads_pickles_or_runs_text():
  package = pathlib.Path(cli.__file__).parent
  sources = {p: p.read_text(encoding="utf-8") for p in package.rglob("*.py")}
  assert len(sources) > 40
  for word in (
    "import pickle", "eval(", "exec(", "shell=True", "os.system",
    "allow_pickle", "yaml",
  ):  # fmt: skip
    found = [
      path.name
      for path, text in sources.items()
      # jax.eval_shape is another thing.
      if any(word in line for line in text.splitlines())
    ]
    assert found == [], word
