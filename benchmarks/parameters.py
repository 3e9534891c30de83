"""Parameters and MACs of every network, at the widths of the paper.

    python benchmarks/parameters.py

Stem and branch, by the arithmetic that plans use; each row is one network of
the paper's tables with the classes it has there.
"""

import dataclasses
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

import command_line
import timing
from ekd_jax.models import CifarResNet, bottleneck_resnet, imagenet_resnet
from ekd_jax.models.bottleneck_resnet import BottleneckResNet
from ekd_jax.models.densenet import DenseNet
from ekd_jax.models.efficientnet import VARIANTS, EfficientNet
from ekd_jax.models.googlenet import GoogLeNet
from ekd_jax.models.imagenet_resnet import ImageNetResNet
from ekd_jax.models.network import Family
from ekd_jax.models.plain_densenet import PlainDenseNet
from ekd_jax.models.vgg import VGG16
from ekd_jax.models.wide_resnet import WideResNet

WIDTHS = (1.0, 0.8, 0.6, 0.4, 0.2)


@dataclasses.dataclass(frozen=True)
class Options:
  """Prints what every network costs."""

  # Where the records are written.
  json: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None


def run(options: Options, console: Console) -> None:
  """Prints the table."""
  rows = [record(family, classes) for family, classes in families()]
  timing.write_json(options.json, rows)
  console.print(table(rows))


def families() -> list[tuple[Family, int]]:
  """Every network that can be named, and how many classes it has here."""
  found = [(CifarResNet(depth, 10), 10) for depth in (20, 32, 44, 110)]
  found += [(CifarResNet(depth, 100), 100) for depth in (56, 110)]
  found += [
    (DenseNet(growth, depth, 10), 10)
    for growth, depth in ((12, 100), (24, 250), (40, 190))
  ]
  found += [
    (family, 100)
    for family in (
      DenseNet(12, 40, 100, final_norm=False),
      PlainDenseNet(12, 40, 100),
      *(WideResNet(name, 100) for name in ("16-2", "40-2", "28-10")),
      *(BottleneckResNet(name, 100) for name in bottleneck_resnet.VARIANTS),
      VGG16(100),
      GoogLeNet(100),
    )
  ]
  for name, variant in imagenet_resnet.VARIANTS.items():
    small = name.startswith(("resnext", "wide"))
    classes, side = (10, 32) if small else (1000, 224)
    shape = (side, side, 3)
    found.append((ImageNetResNet(variant, classes, shape), classes))
  return found + [(EfficientNet(name, 10), 10) for name in VARIANTS]


def record(family: Family, classes: int) -> dict[str, object]:
  """One network's numbers."""
  costs = [family.cost(width) for width in WIDTHS]
  return {
    "network": family.name,
    "classes": classes,
    "side": family.image_shape[0],
    "params": [cost.params for cost in costs],
    "macs": [cost.macs for cost in costs],
    "percent": [round(100 * c.params / costs[0].params, 2) for c in costs],
  }


def table(rows: list[dict[str, object]]) -> Table:
  """The records, parameters above MACs (in millions)."""
  shown = Table(title="parameters, and millions of MACs for one image")
  for heading in ("network", "classes", "side"):
    shown.add_column(heading, justify="right")
  for width in WIDTHS:
    shown.add_column(f"width {width:g}", justify="right")
  for row in rows:
    shown.add_row(
      *(str(row[name]) for name in ("network", "classes", "side")),
      *(
        f"{params}\n{macs / 1e6:.1f}"
        for params, macs in zip(row["params"], row["macs"], strict=True)
      ),
    )
  return shown


if __name__ == "__main__":
  command_line.main(Options, run)
