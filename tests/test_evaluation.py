"""Every example counts once, whatever the batch and the devices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ekd_jax import data
from ekd_jax.evaluation import make_evaluate
from ekd_jax.methods import Method
from ekd_jax.training import parallel

PIXELS = 4


def _info(classes):
  # Pixels reach `predict` as x / 255.
  return dataclasses.replace(
    data.info("digits"),
    image_shape=(2, 2, 1),
    num_classes=classes,
    mean=(0.0,),
    std=(1.0,),
  )


def _evaluate(
  predict, images, labels, *, classes=10, batch_size=384, devices=4
):
  """State -> scores."""
  devices = jax.devices()[:devices]
  score = make_evaluate(
    Method(None, None, predict, None),
    _info(classes),
    images,
    labels,
    batch_size=batch_size,
    devices=devices,
  )
  return lambda state: score(parallel.replicate(state, devices))


def _random(examples, classes, seed=0):
  """Images, labels and the state of two linear members."""
  random = np.random.default_rng(seed)
  images = random.integers(1, 256, (examples, 2, 2, 1), np.uint8)
  labels = random.integers(0, classes, examples).astype(np.int32)
  state = {
    f"student_{i}": random.normal(size=(PIXELS, classes)).astype(np.float32)
    for i in range(2)
  }
  # Padding is black, labelled 0 and, by this, classified as 0: counted, it
  # would be a hit.
  state["bias"] = np.eye(1, classes, dtype=np.float32)[0] * 0.1
  return images, labels, state


def _linear(state, images):
  pixels = images.reshape(len(images), PIXELS)
  members = {
    name: pixels @ state[name] + state["bias"]
    for name in ("student_0", "student_1")
  }
  return {"ensemble": sum(members.values()) / 2, **members}


def _by_hand(images, labels, state):
  """The scores in float64 NumPy, example by example."""
  pixels = images.reshape(len(images), PIXELS) / 255
  logits = {
    name: pixels @ np.float64(state[name]) + state["bias"]
    for name in ("student_0", "student_1")
  }
  logits["ensemble"] = (logits["student_0"] + logits["student_1"]) / 2
  rows = np.arange(len(labels))
  scores = {"examples": len(labels)}
  for name, values in logits.items():
    # How many classes come before the right one.
    rank = (values > values[rows, labels][:, None]).sum(1)
    scores[f"top1/{name}"] = 100 * (rank < 1).mean()
    scores[f"top5/{name}"] = 100 * (rank < 5).mean()
    shares = np.exp(values) / np.exp(values).sum(1, keepdims=True)
    scores[f"loss/{name}"] = -np.log(shares[rows, labels]).mean()
    if name != "ensemble":
      same = values.argmax(1) == logits["ensemble"].argmax(1)
      scores[f"agreement/{name}"] = 100 * same.mean()
  return scores


def _assert_scores(got, wanted):
  assert got.keys() == wanted.keys()
  for name, value in wanted.items():
    # Counts are exact; losses are float32 sums.
    tolerance = 1e-5 if name.startswith("loss/") else 1e-12
    assert got[name] == pytest.approx(value, rel=tolerance), name


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_ten_thousand_images_are_counted_once_with_batch_384(devices):
  images, labels, state = _random(10_000, 10)
  score = _evaluate(_linear, images, labels, devices=devices)
  scores = score(state)
  assert scores["examples"] == 10_000
  _assert_scores(scores, _by_hand(images, labels, state))


@pytest.mark.parametrize(
  ("examples", "batch_size"),
  [(1, 384), (7, 384), (360, 100), (361, 90), (384, 384), (385, 384), (50, 1)],
)
def test_counts_that_are_no_multiple_of_the_batch(examples, batch_size):
  images, labels, state = _random(examples, 10, seed=examples)
  score = _evaluate(_linear, images, labels, batch_size=batch_size)
  _assert_scores(score(state), _by_hand(images, labels, state))


def test_each_single_image_is_counted_exactly_once():
  count = 10_000
  numbers = np.arange(count)
  # An image is its own number, in digits of base 256.
  digits = [numbers % 256, numbers // 256, 0 * numbers, 0 * numbers]
  images = np.stack(digits, 1).astype(np.uint8).reshape(count, 2, 2, 1)

  def predict(bit, images):
    """Right (class 1) where the image's number has this bit."""
    pixels = jnp.round(images.reshape(len(images), PIXELS) * 255).astype(int)
    number = pixels[:, 0] + 256 * pixels[:, 1]
    is_set = (number >> bit) & 1
    return {"ensemble": jax.nn.one_hot(is_set, 10)}

  score = _evaluate(predict, images, np.ones(count, np.int32))
  for bit in range(14):
    with_bit = int((numbers >> bit & 1).sum())
    right = score(np.int32(bit))["top1/ensemble"] * count / 100
    assert right == pytest.approx(with_bit, abs=1e-6)


def test_fewer_than_five_classes():
  images, labels, state = _random(100, 3)
  scores = _evaluate(_linear, images, labels, classes=3)(state)
  _assert_scores(scores, _by_hand(images, labels, state))
  assert scores["top5/ensemble"] == 100.0


def test_labels_of_any_integer_type():
  images, labels, state = _random(100, 10)
  scores = _evaluate(_linear, images, labels.astype(np.uint8))(state)
  _assert_scores(scores, _by_hand(images, labels, state))


def test_another_state_is_scored_without_compiling_again(compilations):
  images, labels, state = _random(1000, 10)
  score = _evaluate(_linear, images, labels)
  score(state)
  before = len(compilations)
  other = state | {"student_0": -state["student_0"]}
  _assert_scores(score(other), _by_hand(images, labels, other))
  assert len(compilations) == before
