"""Every test starts in an empty directory."""

import pytest


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
  """An empty working directory, with a file and a foreign folder beside it."""
  (tmp_path / "foreign").mkdir()
  (tmp_path / "foreign" / "thesis.tex").write_text("years of work")
  (tmp_path / "file").write_text("")
  (tmp_path / "here").mkdir()
  monkeypatch.chdir(tmp_path / "here")
  return tmp_path
