"""Where examples come from, how they are augmented, and in which order.

A CIFAR-size set is 180 MB of uint8: it fits on every device whole. So for
these there is no loader, no worker and no queue. `load` gives plain NumPy
arrays, the trainer puts them on the device once, and the compiled step picks
its rows (`order`), crops, flips and normalises them (`augment`). Image folders
and ImageNet are read by worker processes (`large`, `stream`). Either way the
position in the data is the step number and nothing else, which is what makes a
resumed run continue exactly where it stopped.

    info("cifar100")                      facts that need no data
    load("cifar100", "/data")             arrays
    restrict(dataset, train_examples=..., validation_examples=...)
    augment.draw, augment.apply, augment.normalize
    order.epoch_order
"""

import importlib
from typing import Any

from ekd_jax.data import large, stream
from ekd_jax.data.dataset import (
  Dataset,
  DatasetInfo,
  count_training_examples,
  info,
  load,
  restrict,
)
from ekd_jax.data.large import LargeDataset

__all__ = [
  "Dataset",
  "DatasetInfo",
  "LargeDataset",
  "augment",
  "count_training_examples",
  "epoch_order",
  "info",
  "large",
  "load",
  "order",
  "restrict",
  "stream",
]


def __getattr__(name: str) -> Any:
  # Reading files needs NumPy alone; importing JAX costs about a second, so
  # the two modules that compute with it are imported when first named.
  if name in ("augment", "order"):
    return importlib.import_module(f"ekd_jax.data.{name}")
  if name == "epoch_order":
    return importlib.import_module("ekd_jax.data.order").epoch_order
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
