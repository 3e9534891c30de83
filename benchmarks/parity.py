"""One training on other devices: how far do the numbers move?

    python benchmarks/parity.py

Ten steps of the same global batch, each training with the product's own
command line: on 1, 2, 4 and 8 CPU devices, and on two processes with two
devices each, which talk over gloo. Compared with one device: the loss of every
step, and every parameter after the last.

Rounding differs: sums over a batch are made in another order. Once in some
millions of activations that puts the input of a ReLU on the other side of
zero, and from there on two trainings drift apart, as two that differ in
nothing else do; the sooner, the larger the steps. So the batches are small,
the learning rate is a tenth of the usual one, several seeds are trained, and
the median over them is what must be small.
"""

import dataclasses
import json
import os
import pathlib
import shlex
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

import numpy as np
import tyro
from rich.console import Console

import command_line
import timing
import trainings
from ekd_jax import run_directory

STEPS = 10
FLAGS = shlex.split(
  "--dataset digits --depth 8 --ratios .5,.75 --epochs 1 --batch-size 16 "
  f"--train-examples {16 * STEPS} --log-every 1 --learning-rate .01"
)
TOLERANCE = 1e-5
EXIT_DIFFERENT = 1


@dataclasses.dataclass(frozen=True)
class Options:
  """Trains on several numbers of devices and processes and compares."""

  # How many seeds each is trained with; odd, so that the median is one.
  seeds: int = 3

  # Where the records are written.
  json: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None


class Place(NamedTuple):
  """Where to train: processes, and devices of each."""

  processes: int
  devices: int


ALONE = Place(1, 1)
PLACES = (Place(1, 2), Place(1, 4), Place(1, 8), Place(2, 2))
METHODS = ("ekd", "solo")


class Result(NamedTuple):
  """What a training gave.

  Attributes:
    losses: of every step.
    params: {name: array} after the last.
    examples: how many test images were counted.
  """

  losses: list[float]
  params: dict[str, np.ndarray]
  examples: float


def run(options: Options, console: Console) -> None:
  """Trains, compares, prints the table; exits if anything is too far."""
  command_line.require_at_least_one(options, "seeds")
  records = []
  with tempfile.TemporaryDirectory(prefix="ekd_jax_parity_") as folder:
    for method in METHODS:
      found: dict[Place, list[tuple[float, float]]] = {p: [] for p in PLACES}
      for seed in range(options.seeds):
        command_line.say(console, f"{method}, seed {seed}")
        expected = _train(pathlib.Path(folder), method, seed, ALONE)
        for place in PLACES:
          result = _train(pathlib.Path(folder), method, seed, place)
          found[place].append(differences(result, expected))
      records += [
        _record(method, place, pairs) for place, pairs in found.items()
      ]
  console.print(table(records))
  if options.json:
    pathlib.Path(options.json).write_text(json.dumps(records, indent=2) + "\n")
  far = [
    f"{r['method']} on {r['processes']} x {r['devices']}"
    for r in records
    if not max(r["loss_median"], r["params_median"]) <= TOLERANCE
  ]
  if far:
    print(
      f"error: more than {TOLERANCE} from one device: {', '.join(far)}",
      file=sys.stderr,
    )
    sys.exit(EXIT_DIFFERENT)


def _train(
  folder: pathlib.Path, method: str, seed: int, place: Place
) -> Result:
  name = f"{method}_{seed}_{place.processes}x{place.devices}"
  flags = [*FLAGS, "--method", method, "--seed", str(seed)]
  start(flags, place, folder / name)
  return read(folder / name)


def start(flags: Sequence[str], place: Place, run_dir: pathlib.Path) -> None:
  """Trains with the command line, in as many processes as asked for."""
  environment = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": f"--xla_force_host_platform_device_count={place.devices}",
  }
  together = [
    shlex.split(
      f"--distributed --coordinator-address localhost:{port} "
      f"--num-processes {place.processes} --process-id {number}"
    )
    for port in [free_port()]
    for number in range(place.processes)
  ]
  processes = [
    subprocess.Popen(
      [
        *(sys.executable, str(trainings.EXPERIMENT), *flags),
        *("--run-dir", str(run_dir)),
        *(joining if place.processes > 1 else ()),
      ],
      env=environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for joining in together
  ]
  said = [process.communicate()[0] for process in processes]
  for process, words in zip(processes, said, strict=True):
    if process.returncode:
      raise RuntimeError(
        f"a training ended with exit code {process.returncode}:\n{words}"
      )


def free_port() -> int:
  """A port that nothing listens on just now."""
  with socket.socket() as listener:
    listener.bind(("localhost", 0))
    return listener.getsockname()[1]


def read(run_dir: pathlib.Path) -> Result:
  """What a finished training gave."""
  metrics = run_directory.read_metrics(run_dir)
  params = {
    name: array.astype(np.float64)
    for name, array in trainings.final_arrays(run_dir).items()
    if name.startswith("method/params/")
  }
  (examples,) = [m["examples"] for m in metrics if m["kind"] == "test"]
  losses = [m["loss"] for m in metrics if m["kind"] == "step"]
  return Result(losses, params, examples)


def differences(result: Result, expected: Result) -> tuple[float, float]:
  """The largest relative differences of losses and of parameters.

  Of a parameter: the norm of the difference over its own norm.
  """
  if (len(result.losses), result.examples) != (
    len(expected.losses),
    expected.examples,
  ):
    raise RuntimeError("the two trainings did not do the same work")
  losses = max(
    abs(a - b) / abs(b)
    for a, b in zip(result.losses, expected.losses, strict=True)
  )
  params = max(
    np.linalg.norm(result.params[name] - value) / np.linalg.norm(value)
    for name, value in expected.params.items()
  )
  return losses, float(params)


def _record(
  method: str, place: Place, pairs: Sequence[tuple[float, float]]
) -> dict[str, Any]:
  losses, params = zip(*pairs, strict=True)
  return {
    "method": method,
    "processes": place.processes,
    "devices": place.devices,
    "loss_median": statistics.median(losses),
    "loss_max": max(losses),
    "params_median": statistics.median(params),
    "params_max": max(params),
    "seeds": len(pairs),
  }


def table(records: Sequence[dict[str, Any]]) -> Any:
  """One row for each method and place."""
  shown = timing.table(
    f"largest relative difference from 1 device, {STEPS} steps",
    [
      *("method", "processes", "devices of each"),
      *("loss: median", "max", "parameters: median", "max", "seeds"),
    ],
  )
  for r in records:
    shown.add_row(
      *(r["method"], str(r["processes"]), str(r["devices"])),
      *(
        f"{r[f'{what}_{which}']:.1e}"
        for what in ("loss", "params")
        for which in ("median", "max")
      ),
      str(r["seeds"]),
    )
  return shown


if __name__ == "__main__":
  command_line.main(Options, run)
