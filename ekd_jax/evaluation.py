"""Accuracy on a whole split, every example counted exactly once.

The last batch is padded to the full size and its padding masked, so there is
one compiled shape and no example is dropped or counted twice, whatever the
batch size and the number of devices.
"""

import collections
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ekd_jax.config import Config
from ekd_jax.data import Dataset, DatasetInfo, LargeDataset, augment
from ekd_jax.methods.interface import AXIS_NAME, Method
from ekd_jax.training import parallel

# Evaluation state -> {"top1/student_0": percent, ...}
Evaluate = Callable[[Any], dict[str, float]]


def is_due(config: Config, epoch: int) -> bool:
  """Whether the epoch, counted from 1, ends with an evaluation."""
  last = epoch == config.epochs
  return epoch > 0 and (last or epoch % config.evaluate_every == 0)


def splits(dataset: Dataset | LargeDataset) -> dict[str, Any]:
  """What is evaluated: {"test" and, if there are any, "validation": examples}.

  Args:
    dataset: of which each split is a pair of images [N, H, W, C] uint8 and
      labels [N], or, of a streamed one, `stream.Files`.
  """
  if isinstance(dataset, LargeDataset):
    files = {"test": dataset.test, "validation": dataset.validation}
    return {kind: part for kind, part in files.items() if len(part)}
  splits = {"test": (dataset.test_images, dataset.test_labels)}
  if len(dataset.validation_images):
    splits["validation"] = (
      dataset.validation_images,
      dataset.validation_labels,
    )
  return splits


def make_evaluate(
  method: Method,
  info: DatasetInfo,
  images: np.ndarray,
  labels: np.ndarray,
  *,
  batch_size: int,
  devices: parallel.Devices,
) -> Evaluate:
  """Puts a split on the devices and returns the function that scores it.

  Args:
    method: whose `predict` is scored.
    info: how images are normalised.
    images: [N, H, W, C] uint8, N >= 1.
    labels: [N] integers.
    batch_size: images per step over all devices; rounded up to a multiple of
      the number of devices.
    devices: where it runs.

  Returns:
    Replicated method state -> a flat dict: for every output of `predict`
    "top1/NAME" and "top5/NAME" in percent (top5 of at most all classes),
    "loss/NAME", the mean cross entropy, and, for members, "agreement/NAME",
    the percentage of examples on which the member's first choice is the
    ensemble's; and "examples", how many were counted.
  """
  local = -(-min(batch_size, len(images)) // len(devices))
  batches = -(-len(images) // (local * len(devices)))
  padding = batches * local * len(devices) - len(images)

  def padded(array: np.ndarray) -> np.ndarray:
    return np.pad(array, [(0, padding)] + [(0, 0)] * (array.ndim - 1))

  examples = parallel.shard(
    {
      "image": padded(images),
      "label": padded(np.asarray(labels, np.int32)),
      "counted": padded(np.ones(len(images), np.float32)),
    },
    devices,
  )

  def sums_of_batch(
    state: Any, examples: dict[str, jax.Array], index: jax.Array
  ) -> dict[str, jax.Array]:
    batch = jax.tree.map(
      lambda x: jax.lax.dynamic_slice_in_dim(x, index * local, local), examples
    )
    return _sums(method, info, state, batch)

  step = parallel.per_device(sums_of_batch, devices)
  indices = [parallel.replicate(np.int32(i), devices) for i in range(batches)]

  return lambda state: _scores(
    step(state, examples, index) for index in indices
  )


def make_stream_evaluate(
  method: Method,
  info: DatasetInfo,
  batches: Callable[[], Iterable[dict[str, np.ndarray]]],
  *,
  devices: parallel.Devices,
) -> Evaluate:
  """Returns the function that scores a split which workers read.

  Args:
    method: whose `predict` is scored.
    info: how images are normalised.
    batches: starts a pass over the split: this process's rows of each batch,
      {"image" uint8, "label", "counted"}, as `stream.TestBatches` makes them.
    devices: where it runs.

  Returns:
    As `make_evaluate`.
  """
  step = parallel.per_device(
    lambda state, batch: _sums(method, info, state, batch), devices
  )
  return lambda state: _scores(
    step(state, parallel.shard_own(batch, devices)) for batch in batches()
  )


def _sums(
  method: Method, info: DatasetInfo, state: Any, batch: dict[str, jax.Array]
) -> dict[str, jax.Array]:
  """What is counted in a batch, summed over it and over the devices."""
  top_k = min(5, info.num_classes)
  label, counted = batch["label"], batch["counted"]
  images = augment.enlarge(batch["image"], info.side)
  outputs = method.predict(
    state, augment.normalize(images, mean=info.mean, std=info.std)
  )
  teacher_choice = jnp.argmax(outputs["ensemble"], -1)
  sums = {"examples": counted.sum()}
  for name, logits in outputs.items():
    _, choices = jax.lax.top_k(logits, top_k)
    hits = choices == label[:, None]
    cross_entropy = optax.losses.softmax_cross_entropy_with_integer_labels(
      logits, label
    )
    sums[f"top1/{name}"] = (hits[:, 0] * counted).sum()
    sums[f"top5/{name}"] = (hits.any(-1) * counted).sum()
    sums[f"loss/{name}"] = (cross_entropy * counted).sum()
    if name != "ensemble":
      agrees = jnp.argmax(logits, -1) == teacher_choice
      sums[f"agreement/{name}"] = (agrees * counted).sum()
  return jax.lax.psum(sums, AXIS_NAME)


def _scores(dispatched: Iterable[dict[str, jax.Array]]) -> dict[str, float]:
  # Sums of float32 counts are exact within a batch, and float64 after it.
  totals: collections.Counter[str] = collections.Counter()
  for sums in parallel.when_due(dispatched):
    totals.update(_on_host(sums))
  counted = totals.pop("examples")
  scores = {
    name: (1.0 if name.startswith("loss/") else 100.0) * total / counted
    for name, total in totals.items()
  }
  return {"examples": counted, **scores}


def _on_host(sums: dict[str, jax.Array]) -> dict[str, float]:
  return {k: float(v) for k, v in parallel.unreplicate(sums).items()}
