"""The official binary files: good ones, and every way of being bad."""

import gzip
import tarfile

import numpy as np
import pytest

from ekd_jax import data
from ekd_jax.errors import UserError
from tests.data.conftest import add


def _message(name, data_dir, **options):
  with pytest.raises(UserError) as caught:
    data.load(name, data_dir, **options)
  message = str(caught.value)
  assert "\n" not in message
  return message


def _archive_of(small, data_dir, *members):
  """An archive with odd members first, then the good files."""
  path = data_dir / small.layout.archive
  with tarfile.open(path, "w:gz", compresslevel=1) as archive:
    for member in members:
      archive.addfile(member)
    for file, contents in small.files.items():
      add(archive, f"{small.layout.folder}/{file}", contents)
  return path


def test_unpacked_folder(small, name, tmp_path):
  small.unpack(tmp_path / small.layout.folder)
  dataset = data.load(name, tmp_path)
  small.assert_equal(dataset)
  assert dataset.info == data.info(name)
  assert dataset.train_images.flags.c_contiguous
  assert dataset.validation_images.shape == (0, 32, 32, 3)


def test_files_in_the_directory_itself(small, name, tmp_path):
  small.unpack(tmp_path)
  small.assert_equal(data.load(name, str(tmp_path)))


def test_the_folder_given_as_the_directory(small, name, tmp_path):
  folder = small.unpack(tmp_path / small.layout.folder)
  small.assert_equal(data.load(name, folder))


@pytest.mark.parametrize("prefix", [None, ".", "./{folder}"])
def test_archive(small, name, tmp_path, prefix):
  if prefix is not None:
    prefix = prefix.format(folder=small.layout.folder)
  small.pack(tmp_path, prefix)
  small.assert_equal(data.load(name, tmp_path))
  assert [p.name for p in tmp_path.iterdir()] == [small.layout.archive]


def test_home_directory_is_expanded(small, name, tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  small.unpack(tmp_path / "cifar")
  small.assert_equal(data.load(name, "~/cifar"))


@pytest.mark.parametrize("change", [-1, 1])
def test_unpacked_file_of_the_wrong_size(small, name, tmp_path, change):
  folder = small.unpack(tmp_path / small.layout.folder)
  file = folder / small.layout.test_file
  contents = file.read_bytes()
  size = len(contents)
  file.write_bytes((contents + b"\0")[: size + change])
  message = _message(name, tmp_path)
  assert str(file) in message
  assert f"{size + change:,} bytes instead of {size:,}" in message


def test_unpacked_file_missing(small, name, tmp_path):
  folder = small.unpack(tmp_path / small.layout.folder)
  (folder / small.layout.test_file).unlink()
  message = _message(name, tmp_path)
  assert f"{folder / small.layout.test_file} is missing" in message


def test_a_directory_in_place_of_a_file(small, name, tmp_path):
  small.unpack(tmp_path)
  (tmp_path / small.layout.test_file).unlink()
  (tmp_path / small.layout.test_file).mkdir()
  assert small.layout.test_file in _message(name, tmp_path)
  (tmp_path / small.layout.archive).mkdir()
  assert "cannot be read" in _message(name, tmp_path)


@pytest.mark.parametrize("packed", [False, True])
def test_label_out_of_range(small, name, tmp_path, packed):
  for column, (label, limit) in enumerate(small.layout.labels):
    broken = dict(small.files)
    contents = bytearray(broken[small.layout.test_file])
    contents[2 * small.layout.record_bytes + column] = limit
    broken[small.layout.test_file] = bytes(contents)
    good, small.files = small.files, broken
    if packed:
      small.pack(tmp_path)
    else:
      small.unpack(tmp_path)
    small.files = good
    message = _message(name, tmp_path)
    assert f"record 2 has {label} {limit}" in message
    assert f"0 to {limit - 1}" in message
    assert small.layout.test_file in message


def test_archive_member_of_the_wrong_size(small, name, tmp_path):
  size = len(small.files[small.layout.test_file])
  small.files[small.layout.test_file] += b"\0"
  small.pack(tmp_path)
  message = _message(name, tmp_path)
  assert f"{size + 1:,} bytes instead of {size:,}" in message


def test_archive_without_a_file(small, name, tmp_path):
  del small.files[small.layout.test_file]
  small.pack(tmp_path)
  assert f"lacks {small.layout.test_file}" in _message(name, tmp_path)


def test_archive_with_a_file_twice(small, name, tmp_path):
  path = tmp_path / small.layout.archive
  with tarfile.open(path, "w:gz") as archive:
    for file, contents in [*small.files.items()] * 2:
      add(archive, file, contents)
  assert "twice" in _message(name, tmp_path)


@pytest.mark.parametrize(
  "escape",
  [
    "../{file}",
    "{folder}/../../{file}",
    "/tmp/{file}",
    "..\\{file}",
    "C:\\{file}",
  ],
)
def test_archive_member_that_points_outside(small, name, tmp_path, escape):
  escape = escape.format(
    file=small.layout.test_file, folder=small.layout.folder
  )
  _archive_of(small, tmp_path, tarfile.TarInfo(escape))
  assert f"{escape!r} points outside" in _message(name, tmp_path)


@pytest.mark.parametrize(
  "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE]
)
def test_archive_member_that_is_no_plain_file(small, name, tmp_path, kind):
  member = tarfile.TarInfo(f"{small.layout.folder}/{small.layout.test_file}")
  member.type = kind
  member.linkname = "/etc/hostname"
  _archive_of(small, tmp_path, member)
  assert "is not a plain file" in _message(name, tmp_path)


def test_truncated_archive_tells_how_much_there_was(small, name, tmp_path):
  path = small.pack(tmp_path)
  whole = path.read_bytes()
  path.write_bytes(whole[: len(whole) // 2])
  message = _message(name, tmp_path)
  assert f"{path} ({len(whole) // 2:,} bytes)" in message
  size = len(small.files[small.layout.train_files[0]])
  assert "breaks off after" in message
  assert f"of {size:,} bytes" in message


@pytest.mark.parametrize("kept", [0, 5, 200])
def test_hardly_any_archive(small, name, tmp_path, kept):
  path = small.pack(tmp_path)
  path.write_bytes(path.read_bytes()[:kept])
  assert f"{path} ({kept:,} bytes)" in _message(name, tmp_path)


def test_archive_without_its_last_bytes(small, name, tmp_path):
  path = small.pack(tmp_path)
  path.write_bytes(path.read_bytes()[:-4])
  assert "damaged" in _message(name, tmp_path)


def test_archive_whose_checksum_is_wrong(small, name, tmp_path):
  path = small.pack(tmp_path)
  contents = bytearray(path.read_bytes())
  contents[-6] ^= 1
  path.write_bytes(contents)
  assert "CRC check failed" in _message(name, tmp_path)


def test_a_web_page_saved_as_the_archive(small, name, tmp_path):
  (tmp_path / small.layout.archive).write_text("<html>not found</html>")
  assert "Not a gzipped file" in _message(name, tmp_path)


def test_gzip_of_something_else(small, name, tmp_path):
  path = tmp_path / small.layout.archive
  path.write_bytes(gzip.compress(b"hello" * 1000))
  assert "damaged" in _message(name, tmp_path)


def test_random_damage_never_escapes_as_another_error(small, name, tmp_path):
  path = small.pack(tmp_path)
  whole = path.read_bytes()
  rng = np.random.default_rng(0)
  for _ in range(60):
    contents = bytearray(whole)
    contents[rng.integers(len(contents))] ^= 1 << rng.integers(8)
    path.write_bytes(contents[: rng.integers(len(contents)) + 1])
    _message(name, tmp_path)
