"""docs/methods.md names what there is, and shows what its script draws."""

import dataclasses
import re
import runpy
import xml.etree.ElementTree as ElementTree

import pytest

from ekd_jax import config, losses
from ekd_jax.comparison import Comparison
from tests import runs

DOCS = runs.ROOT / "docs"
PAGE = (DOCS / "methods.md").read_text()
PICTURES = ("ekd", "dml", "ffl", "pcl", "ffsd")


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_are_those_of_the_script(name):
  picture = (DOCS / "methods" / f"{name}.svg").read_text()
  draw = runpy.run_path(str(DOCS / "methods_figures.py"))[name]
  assert picture == draw()
  assert ElementTree.fromstring(picture).tag.endswith("svg")
  assert f"(methods/{name}.svg)" in PAGE


def test_every_option_that_is_named_exists():
  fields = dataclasses.fields(Comparison)
  flags = {config.flag(field.name) for field in fields}
  named = set(re.findall(r"--[a-z][a-z-]+", PAGE))
  assert named
  assert named <= flags


def test_every_loss_that_is_named_exists():
  named = set(
    re.findall(r"`(?:losses\.)?(\w+_(?:loss|features|logits))`", PAGE)
  )
  assert named
  assert named <= set(losses.__all__)
