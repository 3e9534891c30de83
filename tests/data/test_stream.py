"""Batches by number: what is in them, whoever makes them and from where on."""

import io

import numpy as np
import pytest
from PIL import Image

from ekd_jax.data import stream
from ekd_jax.errors import UserError

SIDE = 6
COUNT = 22
BATCH = 8


class Memory:
  """Images of one colour, that of their number; some are no images."""

  def __init__(self, count=COUNT, broken=()):
    self.count = count
    self.broken = broken

  def __len__(self):
    return self.count

  def read(self, index):
    if index in self.broken:
      return b"nothing", index
    file = io.BytesIO()
    Image.new("RGB", (9, 7), (index, 100, 200)).save(file, "PNG")
    return file.getvalue(), index

  def name(self, index):
    return f"image {index}"


def view(seed=3, crop="random_resized"):
  return stream.View(SIDE, crop, seed)


def training(files=None, rows=slice(None), seed=3, total=6):
  return stream.TrainingBatches(
    files or Memory(),
    view(seed),
    batch_size=BATCH,
    rows=rows,
    total_steps=total,
  )


def assert_same(a, b):
  assert a.keys() == b.keys()
  for name in a:
    np.testing.assert_array_equal(a[name], b[name])


class Noise(Memory):
  """Images of which every part looks different."""

  def read(self, index):
    pixels = np.random.default_rng(index).integers(0, 256, (9, 7, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue(), index


def test_several_views_of_an_image_differ_and_the_first_is_the_only_one():
  def batch(views):
    source = stream.TrainingBatches(
      Noise(),
      view(),
      batch_size=BATCH,
      rows=slice(2, 6),
      total_steps=6,
      views=views,
    )
    return source[1]

  one, three = batch(1), batch(3)
  assert three["image"].shape == (4, 3, SIDE, SIDE, 3)
  np.testing.assert_array_equal(three["image"][:, 0], one["image"])
  np.testing.assert_array_equal(three["label"], one["label"])
  for first, second in ((0, 1), (0, 2), (1, 2)):
    differ = three["image"][:, first] != three["image"][:, second]
    assert differ.reshape(4, -1).any(1).all()


def test_an_epoch_has_every_example_at_most_once_and_the_next_is_another():
  source = training()
  epochs = [
    np.concatenate([source[step]["label"] for step in steps])
    for steps in ((0, 1), (2, 3))
  ]
  for labels in epochs:
    assert len(set(labels.tolist())) == 16
    assert set(labels.tolist()) <= set(range(COUNT))
  assert (epochs[0] != epochs[1]).any()
  assert (training(seed=4)[0]["label"] != epochs[0][:BATCH]).any()


def test_images_are_those_of_their_labels():
  batch = training()[3]
  assert batch["image"].shape == (BATCH, SIDE, SIDE, 3)
  assert batch["image"].dtype == np.uint8
  for image, label in zip(batch["image"], batch["label"], strict=True):
    np.testing.assert_array_equal(
      image, np.broadcast_to(np.array([label, 100, 200]), image.shape)
    )


def test_each_process_makes_its_own_rows_of_the_same_batch():
  whole = training()[3]
  parts = [training(rows=slice(r, r + 4))[3] for r in (0, 4)]
  for name in whole:
    joined = np.concatenate([part[name] for part in parts])
    np.testing.assert_array_equal(joined, whole[name])


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_from_any_step_on_are_those_of_an_unbroken_pass(workers):
  expected = [training()[step] for step in range(6)]
  found = list(stream.batches(training(), 2, workers=workers))
  assert len(found) == 4
  for a, b in zip(found, expected[2:], strict=True):
    assert_same(a, b)


def test_a_pass_over_the_test_set_counts_every_example_once():
  source = stream.TestBatches(
    Memory(), view(), batch_size=BATCH, rows=slice(None)
  )
  found = [source[number] for number in range(len(source))]
  assert len(found) == 3
  labels = np.concatenate([batch["label"] for batch in found])
  counted = np.concatenate([batch["counted"] for batch in found])
  assert counted.sum() == COUNT
  assert labels[counted > 0].tolist() == list(range(COUNT))


def test_a_part_is_numbered_from_its_own_start():
  part = stream.Part(Memory(), range(5, 9))
  assert len(part) == 4
  assert part.read(1)[1] == 6
  assert part.name(1) == "image 6"


# --- broken files -----------------------------------------------------------


def broken_step(source):
  return next(step for step in range(6) if (source[step]["broken"] >= 0).any())


def test_a_broken_file_stops_with_its_name():
  files = Memory(broken=(4,))
  source = training(files)
  batch = source[broken_step(source)]
  with pytest.raises(UserError, match="image 4 cannot be used.*--skip-broken"):
    stream.Broken(skip=False).take(files, batch)


def test_a_broken_file_is_passed_over_and_counted_once():
  files = Memory(broken=(4, 5))
  source = training(files)
  broken = stream.Broken(skip=True)
  for step in range(6):
    batch = broken.take(files, source[step])
    assert batch.keys() == {"image", "label"}
    assert not set(batch["label"].tolist()) & {4, 5}
  assert broken.found <= {"image 4", "image 5"}
  assert broken.found


def test_a_broken_test_image_is_not_counted():
  source = stream.TestBatches(
    Memory(broken=(21,)), view(), batch_size=BATCH, rows=slice(None)
  )
  counted = sum(source[n]["counted"].sum() for n in range(len(source)))
  assert counted == COUNT - 1


def test_nothing_but_broken_files():
  source = training(Memory(broken=tuple(range(COUNT))))
  with pytest.raises(UserError, match="none of the 22 images"):
    source[0]
