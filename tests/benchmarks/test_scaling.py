"""Fits, counts and points; no test asserts a time."""

import json

import numpy as np
import pytest

import command_line
import scaling
import timing
from ekd_jax.config import Config

ON_A_GPU = ("--platform", "gpu", "--peak-tflops", "50,500")


def test_the_fit_finds_the_line():
  work = np.array([1.0, 2.0, 5.0, 9.0])
  found = scaling.fit(work, 0.25 + 0.5 * work)
  assert (found.fixed, found.slope) == pytest.approx((0.25, 0.5))
  assert found.r_squared == pytest.approx(1)
  assert found.residual == pytest.approx(0, abs=1e-9)


def test_the_fit_finds_the_farthest_point():
  # The least-squares line through these is seconds = 1.5: by symmetry.
  found = scaling.fit([0.0, 1.0, 2.0, 3.0], [2.0, 1.0, 1.0, 2.0])
  assert (found.fixed, found.slope) == pytest.approx((1.5, 0), abs=1e-9)
  assert found.r_squared == pytest.approx(0)
  assert abs(found.residual) == pytest.approx(0.5)
  # One point above an otherwise straight line.
  found = scaling.fit([0.0, 1.0, 2.0, 3.0, 4.0], [0.0, 1.0, 5.0, 3.0, 4.0])
  assert found.where == 2
  assert found.residual == pytest.approx(2.4)


def test_macs_of_a_step():
  # ResNet-8 on 8x8 images of one channel: stem; three stages of one block,
  # the last two with a projection; head to 10 classes. One image, forward.
  stem = 64 * 9 * 1 * 16
  stages = 64 * 9 * (16 * 16 + 16 * 16)
  stages += 16 * (9 * (16 * 32 + 32 * 32) + 16 * 32)
  stages += 4 * (9 * (32 * 64 + 64 * 64) + 32 * 64)
  branch = stages + 64 * 10
  for members in (1, 3):
    config = Config(
      depth=8, dataset="digits", widths=(1.0,) * members, batch_size=2
    )
    expected = 3 * 2 * (stem + members * branch) / 1e9
    assert scaling.gmac(config) == pytest.approx(expected)


def test_one_thing_is_varied_at_a_time():
  found = scaling.sweeps(scaling.Options(depth=14, batch_size=8))
  widths = {vary: points[-1].config.widths for vary, points in found.items()}
  assert widths["students"] == (1.0,) * 8
  assert widths["spread"][0] == 1.0 and widths["spread"][-1] == 0.2
  assert widths["width"] == (1.0, 0.2, 0.2)
  for vary, points in found.items():
    for point in points:
      assert point.config.batch_size == 8
      assert point.config.depth == (point.value if vary == "depth" else 14)
      assert point.devices == (point.value if vary == "devices" else 1)
      if vary in ("students", "spread"):
        assert len(point.config.widths) == point.value


def test_a_point_is_a_record(monkeypatch):
  monkeypatch.setattr(scaling, "gmac", lambda config: 30.0)
  point = scaling.Point(2, Config(batch_size=64, widths=(1.0, 0.5)))
  found = scaling.record("students", point, [0.5, 0.25, 4.0], "gpu", 0.6)
  assert found["seconds"] == 0.5
  assert found["images_per_second"] == 128
  # 60 GFLOP in half a second are 120 of 600 GFLOP/s.
  assert found["utilisation"] == pytest.approx(0.2)
  without = scaling.record("students", point, [0.5], "cpu", None)
  assert without["utilisation"] is None


@pytest.mark.parametrize(
  "arguments, precisions", [((), 1), ((*ON_A_GPU, "--vary", "all"), 2)]
)
def test_whole_runs(monkeypatch, capsys, tmp_path, arguments, precisions):
  monkeypatch.setattr(timing, "in_worker", lambda function: "gpu")
  monkeypatch.setattr(
    scaling,
    "measure",
    lambda points, options: (
      2 * [[0.1 + 0.01 * scaling.gmac(point.config) for point in points]]
    ),
  )
  path = tmp_path / "records.json"
  _main(*arguments, "--json", str(path))
  records = json.loads(path.read_text())
  fits = [r for r in records if r["kind"] == "fit"]
  sweeps = ["students", "spread", "depth", "width", "all"]
  assert [r["vary"] for r in fits] == sweeps * precisions
  for r in fits:
    assert r["fixed_seconds"] == pytest.approx(0.1)
    assert r["seconds_per_gmac"] == pytest.approx(0.01)
  points = [r for r in records if r["kind"] == "step"]
  assert len({r["precision"] for r in points}) == precisions
  assert any(r["vary"] == "devices" for r in points) == (not arguments)
  assert ("utilisation" in capsys.readouterr().out) == bool(arguments)


@pytest.mark.parametrize(
  "arguments, message",
  [
    (["--rounds", "0"], "--rounds is 0: at least 1"),
    (
      ["--vary", "depth,speed"],
      "--vary speed is not possible on a cpu: choose of students,spread,depth,"
      "width,devices",
    ),
    (
      [*ON_A_GPU, "--vary", "devices"],
      "--vary devices is not possible on a gpu: choose of students,spread,"
      "depth,width",
    ),
    (["--batch-size", "0"], "--batch-size is 0: at least 1"),
    (
      ["--batch-size", "6"],
      "--batch-size is 6: a multiple of 4, which is how many devices share it",
    ),
    (
      ["--depth", "21"],
      "--depth is 21: must be 6n + 2 and at most 10000: 8, 14, 20, 32, 44, 56, "
      "110, 1202, ...",
    ),
    (
      ["--platform", "gpu"],
      "--platform gpu needs --peak-tflops FLOAT32,BFLOAT16: what the GPU can "
      "do at most, from its data sheet, in 10^12 FLOPs per second",
    ),
    (
      ["--platform", "gpu", "--peak-tflops", "50"],
      "--peak-tflops is 50: on a gpu give 2 above 0, of float32 and bfloat16",
    ),
    (
      ["--peak-tflops", "0"],
      "--peak-tflops is 0: on a cpu give 1 above 0, of float32",
    ),
    (ON_A_GPU, "--platform gpu: there is none that JAX finds, only cpu"),
  ],
)
def test_mistakes_are_one_line(monkeypatch, capsys, arguments, message):
  monkeypatch.setattr(timing, "in_worker", lambda function: "cpu")
  with pytest.raises(SystemExit) as caught:
    _main(*arguments)
  assert caught.value.code == 2
  assert capsys.readouterr().err == f"error: {message}\n"


def _main(*arguments):
  command_line.main(scaling.Options, scaling.run, arguments)
