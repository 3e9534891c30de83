"""Image folders: what is found, in which order, and what is refused."""

import pytest
from PIL import Image

from ekd_jax.data import folder
from ekd_jax.errors import UserError


def write(path):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.new("RGB", (4, 4)).save(path)


@pytest.fixture
def root(tmp_path):
  """Two images of each of three classes to train on, one to test on."""
  for name in ("ant", "bee", "cat"):
    for file in ("1.png", "2.jpg"):
      write(tmp_path / "train" / name / file)
    write(tmp_path / "val" / name / "9.png")
  return tmp_path


def message(root):
  with pytest.raises(UserError) as caught:
    folder.read(root)
  assert "\n" not in str(caught.value)
  return str(caught.value)


def test_examples_go_round_the_classes(root):
  (root / "train" / "ant" / "notes.txt").write_text("no image")
  found = folder.read(root)
  assert found.classes == ("ant", "bee", "cat")
  assert list(found.train.files) == [
    *("ant/1.png", "bee/1.png", "cat/1.png"),
    *("ant/2.jpg", "bee/2.jpg", "cat/2.jpg"),
  ]
  assert found.train.labels.tolist() == [0, 1, 2, 0, 1, 2]
  assert list(found.test.files) == ["ant/9.png", "bee/9.png", "cat/9.png"]
  content, label = found.train.read(4)
  assert content == (root / "train" / "bee" / "2.jpg").read_bytes()
  assert label == 1
  assert found.train.name(4) == str(root / "train" / "bee" / "2.jpg")


@pytest.mark.parametrize("name", ["test", "validation"])
def test_other_names_of_the_test_part(root, name):
  (root / "val").rename(root / name)
  assert len(folder.read(root).test) == 3


def test_files_in_folders_of_a_class(root):
  write(root / "train" / "ant" / "images" / "3.JPEG")
  found = folder.read(root)
  assert "ant/images/3.JPEG" in found.train.files


@pytest.fixture
def tiny_imagenet(root):
  """val/ as Tiny ImageNet has it."""
  (root / "val").rename(root / "old")
  for number in range(3):
    write(root / "val" / "images" / f"val_{number}.JPEG")
  (root / "val" / "val_annotations.txt").write_text(
    "val_0.JPEG\tcat\t0\t0\t3\t3\nval_1.JPEG\tant\t0\t0\t3\t3\n"
    "val_2.JPEG\tbee\t0\t0\t3\t3\n"
  )
  return root


def test_a_label_file(tiny_imagenet):
  found = folder.read(tiny_imagenet).test
  assert list(found.files) == [f"images/val_{i}.JPEG" for i in (1, 2, 0)]
  assert found.labels.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
  ("line", "said"),
  [
    ("val_3.JPEG\tcat\t0\n", "line 4: there is no image"),
    ("val_0.JPEG\tdog\t0\n", "line 4: 'val_0.JPEG\\tdog\\t0' does not name"),
    ("val_0.JPEG\n", "line 4"),
    ("val_0.JPEG\tant\n", "line 4: there is no image"),
  ],
)
def test_a_label_file_that_does_not_match(tiny_imagenet, line, said):
  with (tiny_imagenet / "val" / "val_annotations.txt").open("a") as file:
    file.write(line)
  assert said in message(tiny_imagenet)


def test_an_image_that_the_label_file_leaves_out(tiny_imagenet):
  write(tiny_imagenet / "val" / "images" / "val_7.JPEG")
  assert "val_7.JPEG" in message(tiny_imagenet)


def test_a_class_that_only_one_part_has(root):
  write(root / "val" / "dog" / "1.png")
  assert "has a class dog that" in message(root)
  write(root / "train" / "dog" / "1.png")
  folder.read(root)
  write(root / "train" / "eel" / "1.png")
  write(root / "train" / "fox" / "1.png")
  assert "has a class eel and 1 others that" in message(root)


def test_a_class_without_images(root):
  for file in (root / "val" / "bee").iterdir():
    file.unlink()
  assert f"{root / 'val' / 'bee'} has no images" in message(root)


@pytest.mark.parametrize("missing", ["train", "val"])
def test_a_missing_part(root, missing):
  (root / missing).rename(root / "elsewhere")
  assert f"has no folder {missing}/" in message(root)


def test_one_class_is_not_enough(tmp_path):
  write(tmp_path / "train" / "ant" / "1.png")
  write(tmp_path / "val" / "ant" / "1.png")
  assert "has 1 folders" in message(tmp_path)


def test_no_directory():
  assert "needs --data-dir DIR" in message(None)


def test_an_empty_line_of_a_label_file_says_nothing(tiny_imagenet):
  before = folder.read(tiny_imagenet).test
  with (tiny_imagenet / "val" / "val_annotations.txt").open("a") as file:
    file.write("\n")
  after = folder.read(tiny_imagenet).test
  assert list(after.files) == list(before.files)


def test_a_label_file_without_images_or_of_another_code(tiny_imagenet):
  labels = tiny_imagenet / "val" / "val_annotations.txt"
  (tiny_imagenet / "val" / "images").rename(tiny_imagenet / "elsewhere")
  assert "images/ is not: put the images of its lines there" in message(
    tiny_imagenet
  )
  (tiny_imagenet / "elsewhere").rename(tiny_imagenet / "val" / "images")
  labels.write_bytes(b"val_0.JPEG\t\xff\n")
  assert "val_annotations.txt cannot be read" in message(tiny_imagenet)


def test_hidden_files_and_folders_are_no_images(root):
  before = folder.read(root).train
  name = next(iter(before.files)).split("/")[0]
  write(root / "train" / name / "._0.png")
  write(root / "train" / name / ".cache" / "0.png")
  assert list(folder.read(root).train.files) == list(before.files)
