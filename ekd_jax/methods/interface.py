"""What a training method is: four pure functions over one state pytree.

The loop, checkpoints, evaluation, report and export know this file and
nothing more about a method. `train_step` is written for one device of
several: it sees its share of the global batch and averages what must be
global over the device axis `AXIS_NAME`, so that the same global batch gives
the same step on any number of devices.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax

# The device axis every train step runs under.
AXIS_NAME = "batch"

# A pytree of arrays; what is in it is its method's affair.
State = Any


class Student(NamedTuple):
  """A network that can be shipped alone.

  Attributes:
    module: an ordinary Linen module; `module.apply(variables, images)`
      evaluates it.
    variables: its "params" and "batch_stats".
  """

  module: nn.Module
  variables: Mapping[str, Any]


class Method(NamedTuple):
  """A training method.

  A batch is {"image": [n, H, W, C] normalised float images, "label": [n]
  integers}, n the examples of one device. A method of several views is given
  images [n, views, H, W, C].

  Attributes:
    init: (rng, batch) -> state, a pytree of everything that training changes.
      Only the batch's shapes matter.
    train_step: (state, batch, rng) -> (state, metrics). Pure, for one device
      under the axis `AXIS_NAME`; the state and the metrics come out equal on
      all devices. Metrics are a flat dict of scalars: "loss", the quantity
      that is minimised, and any number of "what/which".
    predict: (state, images) -> {name: output}, in evaluation mode: logits
      [n, K] of "ensemble", which is what teaches the members, of every member,
      "student_0" first, and of whatever else is worth a score. Images are
      [n, H, W, C].
    students: state -> {name: Student}, what can be shipped alone: the members.
    views: how many times, each differently, an image is augmented for a step.
  """

  init: Callable[[jax.Array, Mapping[str, jax.Array]], State]
  train_step: Callable[
    [State, Mapping[str, jax.Array], jax.Array],
    tuple[State, dict[str, jax.Array]],
  ]
  predict: Callable[[State, jax.Array], dict[str, jax.Array]]
  students: Callable[[State], dict[str, Student]]
  views: int = 1
