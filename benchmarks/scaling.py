"""How the seconds of a step grow with the work in it.

    python benchmarks/scaling.py

varies one thing at a time, from a ResNet-20 of two members (width 1 and 0.5):

    students   1 to 8 members of full width
    spread     1 to 8 members, widths evenly from 1 to 0.2 (five: the paper's)
    depth      8 to 110 layers
    width      three members, two of which get thinner, from 1 to 0.2
    devices    1, 2 and 4 devices that share the batch (and these cores)

and fits, by ordinary least squares,

    seconds = fixed + seconds_per_gmac * GMAC

to each but the last, where the work stays the same, and to all together. GMAC
are 10^9 multiply-accumulates of convolutions and dense layers in a step: three
times those of a forward pass, for the two gradients; the stem that all members
share is counted once, adapters are not. All programs of a sweep take turns,
A B C ... A B C ..., see timing.py; what counts is the median of the rounds.

    python benchmarks/scaling.py --platform gpu --peak-tflops 495,989

does it on a GPU, in float32 and in bfloat16, and adds model FLOPs utilisation:
2 FLOPs per MAC, against the peaks that the two numbers give (here those of an
H100, where XLA's float32 convolutions are rounded to TF32).
"""

import contextlib
import dataclasses
import os
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

import command_line
import timing
import workload
from ekd_jax import config as configs
from ekd_jax import data
from ekd_jax.config import Config, Numbers
from ekd_jax.errors import UserError

STUDENTS = (1, 2, 4, 6, 8)
DEPTHS = (8, 20, 32, 56, 110)
WIDTHS = (1.0, 0.8, 0.6, 0.4, 0.2)
DEVICES = (1, 2, 4)

PRECISIONS = {"cpu": ("float32",), "gpu": ("float32", "bfloat16")}

# Forward pass, gradient of the weights, gradient of the input.
PASSES = 3

ALL = "all"


@dataclasses.dataclass(frozen=True)
class Options(workload.TrainingFlags):
  """Times the training step of networks of many sizes, and fits a line."""

  # What is varied: a comma-separated list of students, spread, depth, width
  # and devices (which is for the CPU).
  vary: Annotated[str, tyro.conf.arg(metavar="X,X,...")] = ALL

  # Where to run; gpu also does bfloat16.
  platform: Literal["cpu", "gpu"] = "cpu"

  # Peak 10^12 FLOPs per second: on a CPU of float32, on a GPU of float32 and
  # of bfloat16; gives model FLOPs utilisation. Needed on a GPU.
  peak_tflops: Numbers = None

  # Images per step.
  batch_size: int = 64

  # Layers, where depth is not varied.
  depth: int = 20

  # How often every program runs.
  rounds: int = 3

  # Training steps of each run.
  steps: int = 2

  # Where the records are written.
  json: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None


class Point(NamedTuple):
  """One program of a sweep.

  Attributes:
    value: of what is varied.
    config: what is trained.
    devices: how many share the batch.
  """

  value: float
  config: Config
  devices: int = 1


class Fit(NamedTuple):
  """A line through (GMAC, seconds).

  Attributes:
    fixed: seconds without any work.
    slope: seconds per GMAC.
    r_squared: share of the variance that the line explains.
    residual: the largest distance of a point, seconds, with its sign: above
      the line is positive.
    where: the index of that point.
  """

  fixed: float
  slope: float
  r_squared: float
  residual: float
  where: int


def run(options: Options, console: Console) -> None:
  """Measures what the options ask for.

  Raises:
    UserError: an option that cannot be used, or there is no GPU.
  """
  command_line.require_at_least_one(options, "rounds", "steps", "batch_size")
  peaks = _peaks(options)
  chosen = _chosen(options)
  timing.write_json(options.json, [])
  if options.platform == "gpu":
    _require_gpu()
  measured, fits = [], []
  for precision in PRECISIONS[options.platform]:
    for vary, points in chosen.items():
      command_line.say(console, f"{vary}, {precision}: preparing")
      points = [
        p._replace(config=dataclasses.replace(p.config, precision=precision))
        for p in points
      ]
      turns = measure(points, options)
      measured += [
        record(vary, point, seconds, options.platform, peaks.get(precision))
        for point, seconds in zip(points, zip(*turns, strict=True), strict=True)
      ]
      timing.write_json(options.json, measured)
    fits += fit_records([r for r in measured if r["precision"] == precision])
    timing.write_json(options.json, measured + fits)
  console.print(table(measured))
  console.print(fits_table(fits))


def sweeps(options: Options) -> dict[str, list[Point]]:
  """{what is varied: its points}, of the size that the options ask for.

  Raises:
    UserError: there is no network of that size.
  """
  base = configs.resolve(
    Config(
      depth=options.depth,
      widths=(1.0, 0.5),
      batch_size=options.batch_size,
      **options.settings(),
    )
  )

  def config(**changes: Any) -> Config:
    return dataclasses.replace(base, **changes)

  def spread(count: int) -> tuple[float, ...]:
    return tuple(np.linspace(1.0, 0.2, count).round(3).tolist())

  found = {
    "students": [Point(n, config(widths=(1.0,) * n)) for n in STUDENTS],
    "spread": [Point(n, config(widths=spread(n))) for n in STUDENTS],
    "depth": [Point(n, config(depth=n)) for n in DEPTHS],
    "width": [Point(w, config(widths=(1.0, w, w))) for w in WIDTHS],
  }
  if options.platform == "cpu":
    found["devices"] = [Point(n, config(), n) for n in DEVICES]
  return found


def gmac(config: Config) -> float:
  """10^9 multiply-accumulates in a step; see the top of this file."""
  from ekd_jax import build
  from ekd_jax.models import resnet

  height, breadth, image_channels = data.info(config.dataset).image_shape
  stem = height * breadth * 9 * image_channels * resnet.STEM_CHANNELS
  members = build.members(config)
  macs = sum(member.macs for member in members) - (len(members) - 1) * stem
  return PASSES * config.batch_size * macs / 1e9


def measure(points: Sequence[Point], options: Options) -> list[list[float]]:
  """Seconds per step, [round][point]."""
  with contextlib.ExitStack() as workers:
    programs = [
      workers.enter_context(
        timing.worker(timing.timed(partial(prepared, point, options.platform)))
      )
      for point in points
    ]
    return timing.rounds(programs, count=options.rounds, steps=options.steps)


def prepared(point: Point, platform: str) -> workload.Run:
  """`run(steps)` of one program."""
  if platform == "gpu":
    # Several processes share its memory.
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    # JAX's own choice is the GPU; "gpu" would ask for one of every make.
    workload.prepare_product(point.config, platform=None)
  else:
    flag = f"--xla_force_host_platform_device_count={point.devices}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}"
    workload.prepare_product(point.config)
  import product_step

  return product_step.prepare(point.config, device_count=point.devices)


def fit(work: Sequence[float], seconds: Sequence[float]) -> Fit:
  """Ordinary least squares: seconds = fixed + slope * work.

  Args:
    work: GMAC of three points or more, not all the same.
    seconds: of each.

  Returns:
    The `Fit`.
  """
  work, seconds = np.asarray(work), np.asarray(seconds)
  columns = np.stack([np.ones_like(work), work], 1)
  (fixed, slope), *_ = np.linalg.lstsq(columns, seconds)
  residuals = seconds - columns @ (fixed, slope)
  spread = np.square(seconds - seconds.mean()).sum()
  where = int(np.abs(residuals).argmax())
  return Fit(
    float(fixed),
    float(slope),
    float(1 - np.square(residuals).sum() / spread),
    float(residuals[where]),
    where,
  )


def record(
  vary: str,
  point: Point,
  seconds: Sequence[float],
  platform: str,
  peak_tflops: float | None,
) -> dict[str, Any]:
  """A point as one flat JSON object.

  Args:
    vary: what is varied.
    point: which point.
    seconds: per step, one for each round.
    platform: where it ran.
    peak_tflops: of the platform at the point's precision, if known.

  Returns:
    Medians over the rounds; "utilisation" in [0, 1], or None.
  """
  config, work = point.config, gmac(point.config)
  median = statistics.median(seconds)
  utilisation = None
  if peak_tflops is not None:
    utilisation = 2 * work / median / (1e3 * peak_tflops)
  return {
    "kind": "step",
    "vary": vary,
    "value": point.value,
    "platform": platform,
    "precision": config.precision,
    "devices": point.devices,
    "members": len(config.widths),
    "depth": config.depth,
    "batch_size": config.batch_size,
    "gmac": work,
    "seconds": median,
    "seconds_min": min(seconds),
    "seconds_max": max(seconds),
    "rounds": len(seconds),
    "images_per_second": config.batch_size / median,
    "utilisation": utilisation,
  }


def fit_records(measured: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
  """The lines through each sweep and through all, as flat JSON objects.

  Args:
    measured: records of points, all of one precision.
  """
  points = [r for r in measured if r["vary"] != "devices"]
  groups = {vary: [] for vary in dict.fromkeys(r["vary"] for r in points)}
  for r in points:
    groups[r["vary"]].append(r)
  if len(groups) > 1:
    groups[ALL] = points
  records = []
  for vary, group in groups.items():
    line = fit([r["gmac"] for r in group], [r["seconds"] for r in group])
    worst = group[line.where]
    records.append(
      {
        "kind": "fit",
        "vary": vary,
        "platform": worst["platform"],
        "precision": worst["precision"],
        "points": len(group),
        "fixed_seconds": line.fixed,
        "seconds_per_gmac": line.slope,
        "r_squared": line.r_squared,
        "largest_residual_seconds": line.residual,
        "largest_residual_share": line.residual / worst["seconds"],
        "largest_residual_at": f"{worst['vary']} {worst['value']:g}",
      }
    )
  return records


def table(records: Sequence[Mapping[str, Any]]) -> Table:
  """One row per point."""
  has_peak = any(r["utilisation"] is not None for r in records)
  shown = timing.table(
    "seconds per step, medians of the rounds",
    [
      *("varied", "precision", "value", "GMAC"),
      *("seconds", "min", "max", "images/s", "GMAC/s"),
      *(["FLOPs utilisation %"] if has_peak else []),
    ],
    words=2,
  )
  for r in records:
    shown.add_row(
      *(r["vary"], r["precision"], f"{r['value']:g}", f"{r['gmac']:.2f}"),
      *(f"{r[f'seconds{which}']:.4f}" for which in ("", "_min", "_max")),
      *(f"{r['images_per_second']:.0f}", f"{r['gmac'] / r['seconds']:.1f}"),
      *([f"{100 * r['utilisation']:.1f}"] if has_peak else []),
    )
  return shown


def fits_table(records: Sequence[Mapping[str, Any]]) -> Table:
  """One row per line."""
  shown = timing.table(
    "seconds = fixed + slope * GMAC, by least squares",
    [
      *("varied", "precision", "farthest point", "points", "fixed s"),
      *("slope s/GMAC", "R^2", "its residual s", "% of it"),
    ],
  )
  for r in records:
    shown.add_row(
      *(r["vary"], r["precision"], r["largest_residual_at"], str(r["points"])),
      *(f"{r['fixed_seconds']:.4f}", f"{r['seconds_per_gmac']:.5f}"),
      *(f"{r['r_squared']:.4f}", f"{r['largest_residual_seconds']:+.4f}"),
      f"{100 * r['largest_residual_share']:+.1f}",
    )
  return shown


def _peaks(options: Options) -> dict[str, float]:
  precisions, given = PRECISIONS[options.platform], options.peak_tflops
  if given is None:
    if options.platform == "gpu":
      raise UserError(
        "--platform gpu needs --peak-tflops FLOAT32,BFLOAT16: what the GPU can "
        "do at most, from its data sheet, in 10^12 FLOPs per second"
      )
    return {}
  if len(given) != len(precisions) or not all(peak > 0 for peak in given):
    raise UserError(
      f"--peak-tflops is {','.join(f'{peak:g}' for peak in given)}: on a "
      f"{options.platform} give {len(precisions)} above 0, of "
      f"{' and '.join(precisions)}"
    )
  return dict(zip(precisions, given, strict=True))


def _chosen(options: Options) -> dict[str, list[Point]]:
  found = sweeps(options)
  names = list(found) if options.vary == ALL else options.vary.split(",")
  for name in names:
    if name not in found:
      raise UserError(
        f"--vary {name} is not possible on a {options.platform}: choose of "
        f"{','.join(found)}"
      )
  chosen = {name: found[name] for name in names}
  points = [point for sweep in chosen.values() for point in sweep]
  devices = max(point.devices for point in points)
  if options.batch_size % devices:
    raise UserError(
      f"--batch-size is {options.batch_size}: a multiple of {devices}, which "
      "is how many devices share it"
    )
  return chosen


def _require_gpu() -> None:
  found = timing.in_worker(_default_backend)
  if found != "gpu":
    raise UserError(
      f"--platform gpu: there is none that JAX finds, only {found}"
    )


def _default_backend() -> str:
  import jax

  return jax.default_backend()


if __name__ == "__main__":
  command_line.main(Options, run)
