"""Files of runs that never trained, for reports to read."""

import json
import math
import random

from ekd_jax import config
from ekd_jax.report import runs

WIDTHS = (1.0, 0.8, 0.6, 0.4, 0.2)
TOP1 = (72.8, 70.1, 67.7, 65.1, 46.8)
SOLO = (72.6, 69.5, 67.1, 64.6, 42.3)


def write_run(
  path,
  *,
  top1=TOP1,
  solo=SOLO,
  ensemble=74.1,
  epochs=3,
  epochs_asked=None,
  validation=False,
  terms=("label", "feature", "distill"),
  **options,
):
  """A run directory; unfinished if it asks for more epochs than it has."""
  path.mkdir(parents=True)
  epochs_asked = epochs_asked or epochs
  options = {
    "widths": WIDTHS[: len(top1)],
    "epochs": epochs_asked,
    "with_solo": solo is not None,
    "run_dir": str(path),
    **options,
  }
  (path / "config.json").write_text(
    json.dumps(config.to_json(config.Config(**options)))
  )
  (path / "command.txt").write_text("python train.py --widths 1,.8\n")
  (path / "environment.json").write_text(
    json.dumps({"starts": [{"started": "noon", "versions": {"jax": "0.10"}}]})
  )
  noise = random.Random(options.get("seed", 0))
  lines = []
  for epoch in range(1, epochs + 1):
    done = epoch / epochs_asked
    place = {"epoch": epoch, "step": 390 * epoch}
    drop = sum(done > at for at in (0.5, 0.75))
    logged = {"loss": 8 * math.exp(-2 * done), "learning_rate": 0.1**drop / 10}
    reached = 0.4 + 0.6 * done
    tested = {"top1/ensemble": ensemble * reached}
    for index, value in enumerate(top1):
      name = f"student_{index}"
      wobble = noise.gauss(0, 2) * (1 - done)
      tested[f"top1/{name}"] = value * reached + wobble
      tested[f"agreement/{name}"] = (90 - 8 * index) * reached + wobble
      for term in terms:
        value = (3 + index / 3) * math.exp(-2 * done) + noise.random() / 10
        if term != "feature":
          logged[f"{term}/{name}"] = value
        elif index:
          for block in range(3):
            logged[f"feature/{name}/block_{block}"] = value * (block + 1) / 4
    lines.append({"kind": "epoch", **place, **logged})
    lines.append({"kind": "test", **place, **tested})
    if validation:
      lines.append({"kind": "validation", **place, **tested})
  write_metrics(path, lines)
  if solo is not None:
    write_run(
      path / "solo",
      top1=solo,
      solo=None,
      epochs=epochs,
      epochs_asked=epochs_asked,
      terms=("label",),
      method="solo",
    )
  return path


def write_metrics(path, lines):
  (path / "metrics.jsonl").write_text(
    "".join(json.dumps(line) + "\n" for line in lines)
  )


def write_seeds(path, ensembles=(74.1, 74.7)):
  """Two seeds whose full networks differ by one point."""
  seeds = tuple(range(len(ensembles)))
  for seed, ensemble in zip(seeds, ensembles, strict=True):
    top1 = (TOP1[0] + seed, *TOP1[1:])
    write_run(
      path / f"seed_{seed}", seed=seed, top1=top1, ensemble=ensemble, epochs=2
    )
  options = config.Config(widths=WIDTHS, epochs=2, seeds=seeds, with_solo=True)
  (path / "config.json").write_text(json.dumps(config.to_json(options)))
  return path


def edit_metrics(path, edit):
  """Applies `edit` to each line of a run's metrics."""
  text = (path / "metrics.jsonl").read_text()
  write_metrics(path, [edit(json.loads(line)) for line in text.splitlines()])


def summary(members, ensemble=None, **more):
  fields = (
    "ratio_asked", "ratio", "width", "params", "macs", "top1", "top5",
    "best_top1", "best_epoch", "solo_top1", "relative_gain", "agreement",
  )  # fmt: skip
  return {
    "method": "ekd",
    "dataset": "cifar100",
    "network": "resnet110",
    "epochs": 3,
    "seed": 0,
    "members": [
      {"name": f"student_{i}", **dict.fromkeys(fields), **member}
      for i, member in enumerate(members)
    ],
    "ensemble": {"top1": ensemble, "top5": None, "best_top1": None},
    **more,
  }


def a_run(members, ensemble=None, *, epochs=3, records=(), solo=None, **more):
  """A run as `runs.load` gives it, finished unless `epochs` says more."""
  done = [{"kind": "epoch", "epoch": 3, "step": 9}]
  return runs.Run(
    path=None,
    config={"epochs": epochs, **more},
    summary=summary(members, ensemble),
    records=[*done, *records],
    solo=solo,
    seeds=[],
  )
