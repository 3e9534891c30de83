"""Directories prepared by TensorFlow Datasets, without TensorFlow.

TFDS encodes arrays with TensorFlow but takes images that are encoded already,
so these tests let TFDS itself write real array_record directories.
"""

import io
import json
import shutil
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from ekd_jax import data
from ekd_jax.data import prepared
from ekd_jax.errors import UserError

COUNTS = {"train": 40, "test": 20}


class TinyCifar(tfds.core.GeneratorBasedBuilder):
  """CIFAR-100 with 40 + 20 images and the features of the real one."""

  VERSION = tfds.core.Version("3.0.2")
  # Nothing is downloaded. Looking for checksums would import a package that
  # TFDS 4.9.10 uses without requiring it (importlib_resources).
  url_infos = None

  def _info(self):
    return tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.FeaturesDict(
        {
          "id": tfds.features.Text(),
          "image": tfds.features.Image(shape=(32, 32, 3)),
          "label": tfds.features.ClassLabel(num_classes=100),
          "coarse_label": tfds.features.ClassLabel(num_classes=20),
        }
      ),
    )

  def _split_generators(self, dl_manager):
    return {split: self._generate_examples(split) for split in COUNTS}

  def _generate_examples(self, split):
    images, labels = _arrays(split)
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
      png = io.BytesIO()
      Image.fromarray(image).save(png, "png")
      png.seek(0)
      yield (
        index,
        {
          "id": f"{split}_{index:05d}",
          "image": png,
          "label": int(label),
          "coarse_label": 0,
        },
      )


def _arrays(split):
  rng = np.random.default_rng(len(split))
  count = COUNTS[split]
  images = rng.integers(0, 256, (count, 32, 32, 3), np.uint8)
  return images, rng.integers(0, 100, count).astype(np.int32)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
  root = tmp_path_factory.mktemp("tfds")
  builder = TinyCifar(data_dir=root, file_format="array_record")
  builder.download_and_prepare()
  return builder.data_path


@pytest.fixture
def version(pristine, tmp_path, layouts):
  folder = tmp_path / "cifar100" / "3.0.2"
  shutil.copytree(pristine, folder)
  return folder


def _message(data_dir):
  with pytest.raises(UserError) as caught:
    data.load("cifar100", data_dir)
  message = str(caught.value)
  assert "\n" not in message
  return message


def _edit(version, **changes):
  file = version / "dataset_info.json"
  facts = json.loads(file.read_text())
  file.write_text(json.dumps(facts | changes))


def test_reads_what_tfds_wrote_in_the_official_order(version, tmp_path):
  builder = tfds.builder_from_directory(version)
  stored = [example["id"] for example in builder.as_data_source("train")]
  assert stored != sorted(stored), "TFDS no longer shuffles"
  before = "tensorflow" in sys.modules
  dataset = data.load("cifar100", tmp_path)
  assert ("tensorflow" in sys.modules) == before
  for split in COUNTS:
    images, labels = _arrays(split)
    np.testing.assert_array_equal(getattr(dataset, f"{split}_images"), images)
    np.testing.assert_array_equal(getattr(dataset, f"{split}_labels"), labels)
  assert dataset.train_images.dtype == np.uint8
  assert dataset.train_labels.dtype == np.int32


def test_comes_before_the_archive(version, tmp_path):
  (tmp_path / "cifar-100-binary.tar.gz").write_bytes(b"broken")
  assert len(data.load("cifar100", tmp_path).train_labels) == 40


def test_finds_the_newest_finished_version(tmp_path):
  assert prepared.find(tmp_path / "cifar100") is None
  for name in ("3.0.2", "3.0.10", "incomplete.ABC_4.0.0", "notes"):
    folder = tmp_path / "cifar100" / name
    folder.mkdir(parents=True)
    (folder / "dataset_info.json").write_text("{}")
  (tmp_path / "cifar100" / "5.0.0").mkdir()
  assert prepared.find(tmp_path / "cifar100").name == "3.0.10"


def test_tfrecord_is_refused_with_the_command_that_helps(version, tmp_path):
  _edit(version, fileFormat="tfrecord")
  message = _message(tmp_path)
  assert f"{version} was prepared as tfrecord" in message
  assert (
    f"tfds.builder('cifar100', data_dir='{tmp_path}', "
    "file_format='array_record').download_and_prepare()"
  ) in message


def test_array_record_beside_tfrecord_is_read(version, tmp_path):
  _edit(version, fileFormat="tfrecord", alternativeFileFormats=["array_record"])
  assert len(data.load("cifar100", tmp_path).train_labels) == 40


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"fileFormat": null}'])
def test_unreadable_description(version, tmp_path, text):
  (version / "dataset_info.json").write_text(text)
  assert str(version) in _message(tmp_path)


@pytest.mark.parametrize("damage", ["missing", "cut", "features"])
def test_damaged_files(version, tmp_path, damage):
  file = version / "tiny_cifar-test.array_record-00000-of-00001"
  if damage == "missing":
    file.unlink()
  elif damage == "cut":
    file.write_bytes(file.read_bytes()[:-100])
  else:
    (version / "features.json").unlink()
  assert f"{version} cannot be read" in _message(tmp_path)


def test_another_number_of_examples(version, tmp_path, layouts):
  object.__setattr__(layouts["cifar100"], "test_records", 21)
  assert "20 examples instead of 21" in _message(tmp_path)


@pytest.mark.parametrize(
  ("field", "value", "message"),
  [
    ("id", b"train_00001", "repeated id"),
    ("id", b"train_00040", "unexpected"),
    ("id", b"test_00000", "unexpected"),
    ("label", 100, "label 100"),
    ("image", (8, 8), "an image of (8, 8) pixels"),
    ("image", b"no image", "UnidentifiedImageError"),
  ],
)
def test_examples_that_do_not_belong(field, value, message):
  if isinstance(value, tuple):
    png = io.BytesIO()
    Image.fromarray(np.zeros(value, np.uint8)).save(png, "png")
    value = png.getvalue()

  png = io.BytesIO()
  Image.fromarray(_arrays("train")[0][0]).save(png, "png")

  class Source:
    def __len__(self):
      return 40

    def __getitems__(self, keys):
      examples = [
        {"id": f"train_{key:05d}".encode(), "label": 5, "image": png.getvalue()}
        for key in keys
      ]
      examples[3][field] = value
      return examples

  with pytest.raises(prepared.DAMAGE) as caught:
    prepared._in_official_order(Source(), "train", 40, 100)
  assert message in f"{type(caught.value).__name__}: {caught.value}"
