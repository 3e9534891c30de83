"""The step's batch, against the same batch put together by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ekd_jax import data
from ekd_jax.data import augment
from ekd_jax.methods import AXIS_NAME, Method
from ekd_jax.training import parallel, step
from tests.reference.augment import crop_and_flip, normalize

EXAMPLES, BATCH = 22, 8
STEPS = EXAMPLES // BATCH
SEED = 5
INFO = dataclasses.replace(
  data.info("cifar10"),
  image_shape=(5, 6, 3),
  crop_padding=2,
)

_random = np.random.default_rng(0)
IMAGES = _random.integers(0, 256, (EXAMPLES, 5, 6, 3), np.uint8)
# A label is its example's own number, so labels say which examples were seen.
LABELS = np.arange(EXAMPLES, dtype=np.int32)


def _spy(views=1):
  """A method whose new state is what it was given."""

  def train_step(state, batch, rng):
    del state
    seen = {"batch": batch, "rng": jax.random.key_data(rng)}
    return seen, {"rows": jax.lax.psum(len(batch["label"]), AXIS_NAME)}

  return Method(None, train_step, None, None, views)


def _order(seed, epoch):
  """The documented order: permutation(fold_in(root, epoch))."""
  root = jax.random.wrap_key_data(step.root_keys(seed)["order"])
  return np.asarray(
    jax.random.permutation(jax.random.fold_in(root, epoch), EXAMPLES), np.int32
  )


def _seen(number, *, seed=SEED, devices=1, order=None, views=1, info=INFO):
  """What step `number` gives the method, all devices' rows put together."""
  devices = jax.devices()[:devices]
  run = parallel.per_device(
    step.make_train_step(
      _spy(views), info, batch_size=BATCH, steps_per_epoch=STEPS
    ),
    devices,
  )
  state = {
    "method": np.zeros(()),
    "keys": step.root_keys(seed),
    "step": np.int32(number),
  }
  if order is None:
    order = _order(seed, number // STEPS)
  state, metrics = run(
    parallel.replicate(state, devices),
    parallel.replicate({"image": IMAGES, "label": LABELS}, devices),
    parallel.replicate(order, devices),
  )
  host = parallel.unreplicate(state)
  assert host["step"] == number + 1
  jax.tree.map(
    np.testing.assert_array_equal,
    host["keys"],
    jax.tree.map(np.asarray, step.root_keys(seed)),
  )
  assert parallel.unreplicate(metrics)["rows"] == BATCH
  batch = jax.tree.map(
    lambda x: np.asarray(x).reshape(BATCH, *x.shape[2:]),
    state["method"]["batch"],
  )
  return batch, np.asarray(state["method"]["rng"])


@pytest.mark.parametrize("devices", [1, 2, 4])
@pytest.mark.parametrize("number", [0, 1, 3])
def test_a_batch_is_what_it_is_by_hand(number, devices):
  batch, _ = _seen(number, devices=devices)
  position = number % STEPS * BATCH
  rows = _order(SEED, number // STEPS)[position : position + BATCH]
  np.testing.assert_array_equal(batch["label"], LABELS[rows])

  root = jax.random.wrap_key_data(step.root_keys(SEED)["augment"])
  choices = augment.draw(
    jax.random.fold_in(root, number), BATCH, padding=2, flip=True
  )
  images = [
    crop_and_flip(IMAGES[row], tuple(offset), bool(flip), padding=2)
    for row, offset, flip in zip(
      rows, np.asarray(choices["offset"]), choices["flip"], strict=True
    )
  ]
  wanted = normalize(np.stack(images), INFO.mean, INFO.std)
  assert batch["image"].dtype == np.float32
  np.testing.assert_allclose(batch["image"], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("devices", [2, 4])
def test_the_global_batch_is_the_same_on_any_number_of_devices(devices):
  for number in (0, 4):
    alone, _ = _seen(number)
    shared, _ = _seen(number, devices=devices)
    np.testing.assert_array_equal(shared["label"], alone["label"])
    np.testing.assert_array_equal(shared["image"], alone["image"])


def test_every_view_is_augmented_by_itself():
  """View v of an image is what its key, folded with v, makes of it."""
  batch, _ = _seen(1, views=3)
  assert batch["image"].shape == (BATCH, 3, 5, 6, 3)
  rows = _order(SEED, 0)[BATCH : 2 * BATCH]
  np.testing.assert_array_equal(batch["label"], LABELS[rows])
  root = jax.random.wrap_key_data(step.root_keys(SEED)["augment"])
  for view in range(3):
    choices = augment.draw(
      jax.random.fold_in(jax.random.fold_in(root, 1), view),
      BATCH,
      padding=2,
      flip=True,
    )
    images = [
      crop_and_flip(IMAGES[row], tuple(offset), bool(flip), padding=2)
      for row, offset, flip in zip(
        rows, np.asarray(choices["offset"]), choices["flip"], strict=True
      )
    ]
    wanted = normalize(np.stack(images), INFO.mean, INFO.std)
    np.testing.assert_allclose(
      batch["image"][:, view], wanted, rtol=1e-5, atol=1e-5
    )
  # Not all views of an image are the same.
  assert (batch["image"][:, 0] != batch["image"][:, 1]).any((1, 2, 3)).sum() > 4
  shared, _ = _seen(1, views=3, devices=4)
  np.testing.assert_array_equal(shared["image"], batch["image"])


def test_the_margin_is_reflected_if_the_data_set_says_so():
  mirrored, _ = _seen(1, info=dataclasses.replace(INFO, reflect=True))
  black, _ = _seen(1)
  root = jax.random.wrap_key_data(step.root_keys(SEED)["augment"])
  choices = augment.draw(
    jax.random.fold_in(root, 1), BATCH, padding=2, flip=True
  )
  margins = 0
  for index, row in enumerate(_order(SEED, 0)[BATCH : 2 * BATCH]):
    padded = np.pad(IMAGES[row], ((2, 2), (2, 2), (0, 0)), mode="reflect")
    top, left = np.asarray(choices["offset"][index])
    wanted = padded[top : top + 5, left : left + 6]
    if choices["flip"][index]:
      wanted = wanted[:, ::-1]
    np.testing.assert_allclose(
      mirrored["image"][index],
      normalize(wanted, INFO.mean, INFO.std),
      rtol=1e-5,
      atol=1e-5,
    )
    margins += (mirrored["image"][index] != black["image"][index]).any()
  assert margins > BATCH / 2


def test_all_devices_get_the_same_key_and_every_step_another():
  keys = []
  for number in range(3):
    _, key = _seen(number, devices=4)
    assert len(key) == 4
    assert (key == key[0]).all()
    keys.append(tuple(key[0]))
  assert len(set(keys)) == 3


@pytest.mark.parametrize("epoch", [0, 1, 7])
def test_an_epoch_visits_whole_batches_of_examples_once(epoch):
  seen = np.concatenate(
    [_seen(epoch * STEPS + i, devices=4)[0]["label"] for i in range(STEPS)]
  )
  assert len(seen) == STEPS * BATCH == 16
  assert len(set(seen)) == 16
  np.testing.assert_array_equal(seen, LABELS[_order(SEED, epoch)[:16]])


def test_other_examples_are_left_over_in_other_epochs():
  left = [set(_order(SEED, epoch)[STEPS * BATCH :]) for epoch in range(4)]
  assert len(set(map(frozenset, left))) == 4


def test_augmentation_depends_on_the_step_and_on_the_seed():
  same_rows = np.tile(np.arange(BATCH, dtype=np.int32), 3)[:EXAMPLES]
  images = {
    (number, seed): _seen(number, seed=seed, order=same_rows)[0]["image"]
    for number, seed in [(0, 1), (1, 1), (2, 1), (0, 2)]
  }
  again, _ = _seen(0, seed=1, order=same_rows)
  np.testing.assert_array_equal(images[0, 1], again["image"])
  assert len({image.tobytes() for image in images.values()}) == 4


def test_the_roots_of_a_seed_differ_from_each_other_and_from_other_seeds():
  roots = [
    tuple(np.asarray(key).tolist())
    for seed in (0, 1, 2**32 - 1)
    for key in step.root_keys(seed).values()
  ]
  assert len(roots) == 12
  assert len(set(roots)) == 12


def test_step_zero_is_drawn_from_the_init_root():
  def init(rng, batch):
    return {
      "drawn": jax.random.uniform(rng, (3,)),
      "image": jnp.zeros(batch["image"].shape),
    }

  state = step.init_state(Method(init, None, None, None), INFO, SEED)
  assert set(state) == {"method", "keys", "step"}
  assert state["step"] == 0
  assert state["step"].dtype == jnp.int32
  assert state["method"]["image"].shape[1:] == INFO.image_shape
  root = jax.random.wrap_key_data(step.root_keys(SEED)["init"])
  np.testing.assert_array_equal(
    state["method"]["drawn"], jax.random.uniform(root, (3,))
  )
