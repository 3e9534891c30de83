"""Phases, caches and failures of starts; no test asserts a time."""

import json
import pathlib

import pytest
from rich.console import Console

import command_line
import startup
import workload
from ekd_jax import config as configs
from ekd_jax.config import Config
from ekd_jax.errors import UserError

TINY = configs.resolve(
  Config(depth=8, widths=(1.0, 0.4), dataset="digits", batch_size=4)
)


def test_a_phase_is_a_record():
  starts = [{"imports": 1.0, "total": s} for s in (5.0, 3.0, 9.0)]
  imports, total = startup.record("quick", "cold", starts)
  assert imports["phase"] == "imports"
  assert total == {
    "case": "quick",
    "cache": "cold",
    "phase": "total",
    "seconds_median": 5.0,
    "seconds_min": 3.0,
    "seconds_max": 9.0,
    "repeats": 3,
  }


def test_warm_starts_find_the_cache_of_the_cold_one():
  seen = []

  def start(folder):
    found = pathlib.Path(folder) / "program"
    seen.append((folder, found.exists()))
    found.touch()
    return {"total": len(seen)}

  starts = startup.repeated(start, 2, ["cold", "warm"])
  folders, warm = zip(*seen, strict=True)
  assert warm == (False, True, False, True)
  assert folders[0] == folders[1] != folders[2] == folders[3]
  assert starts == {
    "cold": [{"total": 1}, {"total": 3}],
    "warm": [{"total": 2}, {"total": 4}],
  }
  assert not any(pathlib.Path(folder).exists() for folder in folders)


@pytest.mark.parametrize(
  "case, expected",
  [
    ("resnet20x5", ["resnet20x5"]),
    ("quick", ["quick", "--help", "import losses"]),
    (
      "all",
      ["resnet20x5", "resnet110x4", "quick", "--help", "import losses"],
    ),
  ],
)
def test_cases(case, expected):
  assert list(startup.cases(startup.Options(case=case))) == expected


def test_flags_reach_the_product(monkeypatch):
  seen = []
  monkeypatch.setattr(startup, "first_step", lambda *given: seen.append(given))
  monkeypatch.setattr(startup, "quick_run", lambda *given: seen.append(given))
  options = startup.Options(
    conv="lax", scan="off", remat=True, tune_allocator=False
  )
  found = startup.cases(options)
  for case in ("resnet20x5", "quick"):
    found[case][0]("folder")
  (config, _), (flags, cache) = seen
  assert (config.conv, config.scan, config.remat) == ("lax", "off", True)
  assert not config.tune_allocator
  assert flags == [
    *("--conv", "lax"),
    *("--scan", "off"),
    "--remat",
    "--no-tune-allocator",
  ]
  assert cache == "folder"


def test_a_command_that_fails_is_no_measurement(tmp_path):
  lines = "import sys; print('first', file=sys.stderr); sys.exit('last')"
  with pytest.raises(UserError, match="ended with exit code 1: last$"):
    startup.command(["-c", lines], str(tmp_path))


def test_mistakes_are_one_line(capsys, tmp_path):
  with pytest.raises(SystemExit) as caught:
    command_line.main(startup.Options, startup.run, ["--repeats", "0"])
  assert caught.value.code == 2
  assert capsys.readouterr().err == "error: --repeats is 0: at least 1\n"


@pytest.mark.slow
def test_phases_add_up(monkeypatch, tmp_path):
  monkeypatch.setattr(workload, "CASES", {"resnet20x5": TINY})
  records = tmp_path / "records.json"
  options = startup.Options(case="resnet20x5", repeats=1, json=str(records))
  startup.run(options, Console())
  for cache in ("cold", "warm"):
    seconds = {
      r["phase"]: r["seconds_median"]
      for r in json.loads(records.read_text())
      if r["cache"] == cache
    }
    total = seconds.pop("total")
    assert tuple(seconds) == startup.PHASES
    assert min(seconds.values()) > 0
    assert sum(seconds.values()) == pytest.approx(total)
