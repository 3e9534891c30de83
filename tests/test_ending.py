"""What is told beside the one line of an error, and what is not."""

import sys

import pytest

from ekd_jax import ending


@pytest.mark.parametrize(
  ("words", "told"),
  [("Event loop is closed", False), ("something else", True)],
)
def test_only_the_echo_of_a_failed_save_is_not_told(
  words, told, monkeypatch, capsys
):
  monkeypatch.setattr(sys, "unraisablehook", ending._unraisable)

  class Fails:
    def __del__(self):
      raise RuntimeError(words)

  failing = Fails()
  del failing
  assert (words in capsys.readouterr().err) == told
