"""What a run says of where it ran."""

import re
import subprocess

from ekd_jax import environment


def _git(folder, *arguments):
  subprocess.run(
    [
      *("git", "-C", str(folder), "-c", "user.name=x", "-c", "user.email=x@x"),
      *arguments,
    ],
    check=True,
    capture_output=True,
  )


def test_the_commit_says_whether_the_files_are_as_committed(
  tmp_path, monkeypatch
):
  package = tmp_path / "ekd_jax"
  package.mkdir()
  module = package / "environment.py"
  module.write_text("one")
  monkeypatch.setattr(environment, "__file__", str(module))
  assert environment.git_commit() is None
  _git(tmp_path, "init", "-q")
  _git(tmp_path, "add", "-A")
  _git(tmp_path, "commit", "-qm", "one")
  commit = environment.git_commit()
  assert re.fullmatch("[0-9a-f]{40}", commit)
  (tmp_path / "new").write_text("not tracked")
  assert environment.git_commit() == commit
  module.write_text("two")
  assert environment.git_commit() == f"{commit}-dirty"


def test_variables_that_change_numbers_are_on_record(monkeypatch):
  monkeypatch.setenv("XLA_SOMETHING", "on")
  monkeypatch.setenv("SECRET", "x")
  variables = environment.describe()["variables"]
  assert variables["XLA_SOMETHING"] == "on"
  assert "SECRET" not in variables
