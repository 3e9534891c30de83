import dataclasses
import subprocess
import sys

import numpy as np
import pytest

from ekd_jax import data
from ekd_jax.errors import UserError


def test_facts_of_the_cifars(name):
  facts = data.info(name)
  assert facts.name == name
  assert facts.image_shape == (32, 32, 3)
  assert (facts.train_examples, facts.test_examples) == (50_000, 10_000)
  assert facts.num_classes == int(name.removeprefix("cifar"))
  assert len(facts.mean) == len(facts.std) == 3
  assert (facts.crop_padding, facts.flip) == (4, True)


def test_facts_agree_with_the_file_formats(name):
  layout, facts = data.dataset.cifar.LAYOUTS[name], data.info(name)
  assert layout.labels[-1][1] == facts.num_classes
  assert layout.test_records == facts.test_examples
  records = layout.train_records * len(layout.train_files)
  assert records == facts.train_examples
  assert sum(layout.file_bytes.values()) == 60_000 * layout.record_bytes


def test_an_unknown_name_lists_the_known_ones():
  with pytest.raises(UserError, match="mnist.*cifar100, cifar10, svhn"):
    data.info("mnist")
  with pytest.raises(UserError, match="cifar100, cifar10, svhn"):
    data.load("mnist")


def test_what_is_streamed_is_not_read_into_memory():
  with pytest.raises(ValueError, match="imagenet is streamed"):
    data.load("imagenet")


def test_digits_are_complete():
  dataset = data.load("digits")
  facts = dataset.info
  assert facts == data.info("digits")
  assert dataset.train_images.shape == (1437, 8, 8, 1)
  assert dataset.test_images.shape == (360, 8, 8, 1)
  assert dataset.validation_images.shape == (0, 8, 8, 1)
  assert dataset.validation_labels.shape == (0,)
  assert (facts.train_examples, facts.test_examples) == (1437, 360)
  for images in (dataset.train_images, dataset.test_images):
    assert images.dtype == np.uint8
    assert (images.min(), images.max()) == (0, 255)
    assert len(np.unique(images)) == 17
  for labels, fewest in (
    (dataset.train_labels, 141),
    (dataset.test_labels, 33),
  ):
    assert labels.dtype == np.int32
    assert np.bincount(labels).min() == fewest
    assert np.bincount(labels).size == 10


def test_the_statistics_of_digits_are_those_of_its_training_part():
  dataset = data.load("digits")
  pixels = dataset.train_images / 255
  assert pixels.mean() == pytest.approx(dataset.info.mean[0], abs=5e-5)
  assert pixels.std() == pytest.approx(dataset.info.std[0], abs=5e-5)


def test_digits_need_no_directory_and_ignore_one(tmp_path):
  given = data.load("digits", tmp_path / "nowhere")
  np.testing.assert_array_equal(
    given.train_images, data.load("digits").train_images
  )


def test_validation_is_the_end_and_training_the_start():
  whole = data.load("digits")
  part = data.restrict(whole, train_examples=100, validation_examples=37)
  np.testing.assert_array_equal(part.train_images, whole.train_images[:100])
  np.testing.assert_array_equal(part.train_labels, whole.train_labels[:100])
  np.testing.assert_array_equal(
    part.validation_images, whole.train_images[1400:]
  )
  np.testing.assert_array_equal(
    part.validation_labels, whole.train_labels[1400:]
  )
  assert part.test_images is whole.test_images
  assert np.shares_memory(part.train_images, whole.train_images)


def test_restrict_without_limits_changes_nothing():
  whole = data.load("digits")
  same = data.restrict(whole)
  assert len(same.train_labels) == 1437
  assert len(same.validation_labels) == 0


def test_everything_not_held_out_is_trained_on():
  part = data.restrict(data.load("digits"), validation_examples=437)
  assert len(part.train_labels) == 1000
  assert len(part.validation_labels) == 437
  edge = data.restrict(part, train_examples=1000)
  assert len(edge.train_labels) == 1000
  assert len(edge.validation_labels) == 437


@pytest.mark.parametrize(
  ("limits", "message"),
  [
    ({"train_examples": 0}, "--train-examples 0 .*give 1 to 1437"),
    ({"train_examples": 1438}, "--train-examples 1438 .*1 to 1437"),
    ({"validation_examples": -1}, "--validation-examples -1 .*0 to 1436"),
    ({"validation_examples": 1437}, "1437 .*0 to 1436"),
    (
      {"train_examples": 1401, "validation_examples": 37},
      "--train-examples 1401 .*1 to 1400.*less 37 held out",
    ),
  ],
)
def test_limits_out_of_range_or_overlapping(limits, message):
  with pytest.raises(UserError, match=message) as caught:
    data.restrict(data.load("digits"), **limits)
  assert "\n" not in str(caught.value)


def test_holding_out_twice_is_refused():
  part = data.restrict(data.load("digits"), validation_examples=10)
  with pytest.raises(UserError, match="10 images are held out already"):
    data.restrict(part, validation_examples=5)


def test_the_records_are_frozen():
  with pytest.raises(dataclasses.FrozenInstanceError):
    data.info("digits").name = "other"


def test_facts_and_files_need_neither_jax_nor_tfds():
  code = (
    "import sys\n"
    "from ekd_jax import data\n"
    "data.info('cifar100')\n"
    "heavy = {'jax', 'tensorflow_datasets', 'sklearn', 'tensorflow'}\n"
    "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    "assert data.augment.draw and data.order.epoch_order is "
    "data.epoch_order\n"
    "assert 'jax' in sys.modules\n"
  )
  subprocess.run([sys.executable, "-c", code], check=True)


def test_a_misspelt_attribute_is_an_attribute_error():
  with pytest.raises(AttributeError, match="augmnet"):
    _ = data.augmnet
