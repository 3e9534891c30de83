"""ImageNet as TensorFlow Datasets prepares it, and what is held out."""

import dataclasses
import io
import pickle
import shutil

import pytest
import tensorflow_datasets as tfds
from PIL import Image

from ekd_jax import data
from ekd_jax.data import large
from ekd_jax.errors import UserError
from tests.data.test_folder import write

COUNTS = {"train": 12, "validation": 5}


class TinyImageNet(tfds.core.GeneratorBasedBuilder):
  """imagenet2012 with few images and the features of the real one."""

  VERSION = tfds.core.Version("5.1.0")
  url_infos = None  # As in test_prepared.

  def _info(self):
    return tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.FeaturesDict(
        {
          "image": tfds.features.Image(encoding_format="jpeg"),
          "label": tfds.features.ClassLabel(num_classes=1000),
          "file_name": tfds.features.Text(),
        }
      ),
    )

  def _split_generators(self, dl_manager):
    return {split: self._generate_examples(split) for split in COUNTS}

  def _generate_examples(self, split):
    for index in range(COUNTS[split]):
      jpeg = io.BytesIO()
      Image.new("RGB", (20 + index, 30), (10 * index, 0, 99)).save(jpeg, "jpeg")
      jpeg.seek(0)
      yield (
        index,
        {
          "image": jpeg,
          "label": 7 * index,
          "file_name": f"{split}_{index}.JPEG",
        },
      )


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
  root = tmp_path_factory.mktemp("tfds")
  builder = TinyImageNet(data_dir=root, file_format="array_record")
  builder.download_and_prepare()
  builder.data_path.parent.rename(root / "imagenet2012")
  return root


@pytest.fixture(autouse=True)
def no_cache():
  large.find.cache_clear()


def test_imagenet_is_read_as_it_was_prepared(prepared):
  train, test, classes = large.find("imagenet", prepared)
  assert (len(train), len(test), classes) == (12, 5, 1000)
  # A worker gets a pickled copy.
  copy = pickle.loads(pickle.dumps(test))
  for files, split in ((train, "train"), (copy, "validation")):
    seen = set()
    for index in range(COUNTS[split]):
      content, label = files.read(index)
      image = Image.open(io.BytesIO(content))
      number = image.width - 20
      seen.add(number)
      assert (image.format, label) == ("JPEG", 7 * number)
      assert f"{split}_{number}.JPEG in " in files.name(index)
    assert seen == set(range(COUNTS[split]))


def test_the_last_training_images_are_held_out(prepared):
  info = data.info("imagenet")
  found = large.load(info, prepared, train_examples=6, validation_examples=4)
  whole, _, _ = large.find("imagenet", prepared)
  counts = found.train_count, len(found.validation), len(found.test)
  assert counts == (6, 4, 5)
  for part, first in ((found.train, 0), (found.validation, 8)):
    for index in range(len(part)):
      assert part.read(index) == whole.read(first + index)
      assert part.name(index) == whole.name(first + index)


def test_tfrecord_is_refused(prepared, tmp_path):
  version = tmp_path / "imagenet2012" / "5.1.0"
  version.mkdir(parents=True)
  facts = prepared / "imagenet2012" / "5.1.0" / "dataset_info.json"
  (version / "dataset_info.json").write_text(
    facts.read_text().replace("array_record", "tfrecord")
  )
  with pytest.raises(UserError, match="prepared as tfrecord"):
    large.find("imagenet", tmp_path)


def test_folders_that_are_not_imagenet_are_refused(tmp_path):
  for part in ("train", "val"):
    for name in "ab":
      write(tmp_path / part / name / "0.png")
  with pytest.raises(UserError, match="has 2 classes and ImageNet has 1000"):
    large.find("imagenet", tmp_path)
  with pytest.raises(UserError, match="needs --data-dir DIR"):
    large.find("imagenet", None)


def test_another_number_of_classes_than_before_is_refused(prepared):
  info = dataclasses.replace(data.info("imagenet"), num_classes=999)
  with pytest.raises(UserError, match="has 1000 classes and --num-classes"):
    large.load(info, prepared)


def test_a_damaged_preparation_is_told_in_one_line(prepared, tmp_path):
  shutil.copytree(prepared, tmp_path / "tfds")
  (version,) = (tmp_path / "tfds" / "imagenet2012").iterdir()
  for file in version.glob("*features.json"):
    file.unlink()
  with pytest.raises(UserError, match="cannot be read as the imagenet2012"):
    large.find("imagenet", tmp_path / "tfds")


def test_a_record_that_cannot_be_read_is_a_broken_file(prepared):
  train, _, _ = large.find("imagenet", prepared)

  class Damaged:
    def __getitem__(self, index):
      raise RuntimeError("checksum")

  train.__dict__["_source"] = Damaged()
  with pytest.raises(OSError, match="record cannot be read: checksum"):
    train.read(0)
  assert train.name(3).startswith("record 3 of train in ")
