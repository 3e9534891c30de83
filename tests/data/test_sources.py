"""Which source is read, what is said when none is there, and downloads."""

import hashlib
import io
import urllib.error
import urllib.request

import numpy as np
import pytest

from ekd_jax import data
from ekd_jax.data import cifar
from ekd_jax.errors import UserError


def _message(name, data_dir, **options):
  with pytest.raises(UserError) as caught:
    data.load(name, data_dir, **options)
  message = str(caught.value)
  assert "\n" not in message
  return message


def _served(monkeypatch, contents):
  """Makes urlopen give `contents`; returns the list of addresses asked."""
  asked = []

  def urlopen(url, timeout):
    asked.append(url)
    return io.BytesIO(contents)

  monkeypatch.setattr(urllib.request, "urlopen", urlopen)
  return asked


@pytest.fixture
def archive(small, name, layouts, tmp_path):
  """The bytes of a small archive that the layout's checksum describes."""
  (tmp_path / "server").mkdir()
  contents = small.pack(tmp_path / "server").read_bytes()
  object.__setattr__(layouts[name], "archive_bytes", len(contents))
  object.__setattr__(
    layouts[name], "archive_sha256", hashlib.sha256(contents).hexdigest()
  )
  return contents


def test_no_directory_given(name):
  for download in (False, True):
    message = _message(name, None, download=download)
    for help_ in ("--data-dir", "--download", "--dataset digits"):
      assert help_ in message


def test_nothing_found_lists_the_places_and_the_ways_out(name, tmp_path):
  message = _message(name, tmp_path)
  layout = cifar.LAYOUTS[name]
  for place in (
    str(tmp_path),
    f"{name}/<version>/dataset_info.json",
    layout.archive,
    f"{layout.folder}/{layout.test_file}",
    "--download",
    "--dataset digits",
  ):
    assert place in message
  assert not any(tmp_path.iterdir())


def test_directory_that_does_not_exist(name, tmp_path):
  assert "does not exist" in _message(name, tmp_path / "nowhere")
  assert not (tmp_path / "nowhere").exists()


def test_a_file_given_as_the_directory(small, name, tmp_path):
  path = small.pack(tmp_path)
  assert f"{path} is a file" in _message(name, path)


def test_pickles_are_pointed_out_and_not_read(name, tmp_path):
  pickles = cifar.LAYOUTS[name].archive.replace("binary", "python")
  (tmp_path / pickles).write_bytes(b"anything")
  assert f"{pickles} is not read" in _message(name, tmp_path)


def test_the_archive_comes_before_the_folder(small, name, tmp_path):
  small.unpack(tmp_path / small.layout.folder)
  small.test_labels = 1 - np.minimum(small.test_labels, 1)
  contents = np.frombuffer(small.files[small.layout.test_file], np.uint8)
  records = contents.reshape(-1, small.layout.record_bytes).copy()
  records[:, len(small.layout.labels) - 1] = small.test_labels
  small.files[small.layout.test_file] = records.tobytes()
  small.pack(tmp_path)
  small.assert_equal(data.load(name, tmp_path))


def test_a_damaged_source_is_not_passed_over(small, name, tmp_path):
  small.unpack(tmp_path / small.layout.folder)
  (tmp_path / small.layout.archive).write_bytes(b"broken")
  assert small.layout.archive in _message(name, tmp_path)
  assert small.layout.archive in _message(name, tmp_path, download=True)


def test_download(small, archive, name, tmp_path, monkeypatch):
  asked = _served(monkeypatch, archive)
  target = tmp_path / "new" / "data"
  small.assert_equal(data.load(name, target, download=True))
  address = f"https://www.cs.toronto.edu/~kriz/{small.layout.archive}"
  assert asked == [address]
  assert [p.name for p in target.iterdir()] == [small.layout.archive]
  # What is there is not fetched again.
  small.assert_equal(data.load(name, target, download=True))
  small.assert_equal(data.load(name, target))
  assert asked == [address]


def test_nothing_is_downloaded_unless_asked(
  archive, name, tmp_path, monkeypatch
):
  asked = _served(monkeypatch, archive)
  _message(name, tmp_path / "data")
  assert asked == []


@pytest.mark.parametrize("damage", ["altered", "cut", "endless"])
def test_download_that_is_not_the_archive(
  archive, name, tmp_path, monkeypatch, damage
):
  contents = {
    "altered": b"\0" + archive[1:],
    "cut": archive[:-100],
    "endless": archive + bytes(10 << 20),
  }[damage]
  _served(monkeypatch, contents)
  message = _message(name, tmp_path / "data", download=True)
  assert hashlib.sha256(archive).hexdigest() in message
  assert f"instead of {len(archive):,}" in message
  if damage == "endless":
    assert f"{len(contents):,}" not in message
  assert not any((tmp_path / "data").iterdir())


@pytest.mark.parametrize(
  "error",
  [
    urllib.error.URLError("no\nroute"),
    urllib.error.HTTPError("https://x", 503, "busy", None, None),
    TimeoutError("slow"),
    ConnectionResetError("gone"),
  ],
)
def test_network_failure(name, tmp_path, monkeypatch, error):
  def urlopen(url, timeout):
    raise error

  monkeypatch.setattr(urllib.request, "urlopen", urlopen)
  message = _message(name, tmp_path, download=True)
  assert "could not be fetched" in message
  assert type(error).__name__ in message
  assert not any(tmp_path.iterdir())


def test_connection_lost_on_the_way(archive, name, tmp_path, monkeypatch):
  class Breaking(io.BytesIO):
    def read(self, size=-1):
      if self.tell():
        raise ConnectionResetError("gone")
      return super().read(100)

  monkeypatch.setattr(
    urllib.request, "urlopen", lambda url, timeout: Breaking(archive)
  )
  message = _message(name, tmp_path / "data", download=True)
  assert "ConnectionResetError" in message
  assert not any((tmp_path / "data").iterdir())


def test_interrupted_download_leaves_nothing(name, tmp_path, monkeypatch):
  def urlopen(url, timeout):
    raise KeyboardInterrupt

  monkeypatch.setattr(urllib.request, "urlopen", urlopen)
  with pytest.raises(KeyboardInterrupt):
    data.load(name, tmp_path, download=True)
  assert not any(tmp_path.iterdir())


def test_directory_that_cannot_be_made(name, tmp_path, monkeypatch):
  def makedirs(*arguments, **options):
    raise PermissionError(13, "Permission denied")

  monkeypatch.setattr("os.makedirs", makedirs)
  message = _message(name, tmp_path / "data", download=True)
  assert "could not be fetched" in message
  assert "Permission denied" in message


def test_directory_that_cannot_be_read(name, tmp_path, monkeypatch):
  def listdir(path):
    raise PermissionError(13, "Permission denied")

  monkeypatch.setattr("os.listdir", listdir)
  message = _message(name, tmp_path)
  assert f"{tmp_path} cannot be read (Permission denied)" in message


def test_a_directory_inside_a_file(name, tmp_path):
  (tmp_path / "file").write_text("")
  message = _message(name, tmp_path / "file" / "data", download=True)
  assert "is a file, or inside one" in message
