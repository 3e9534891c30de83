"""The example of docs/your_own_network.md, as it stands there, on a folder."""

import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

import ekd_jax
from ekd_jax.models import OwnFamily
from tests import runs

DOC = runs.ROOT / "docs" / "your_own_network.md"


def example():
  """The doc's one block of Python."""
  (code,) = re.findall(r"```python\n(.*?)```", DOC.read_text(), re.DOTALL)
  return code


def write_images(root):
  """Three classes that colours tell apart, of different sizes and kinds."""
  random = np.random.default_rng(0)
  for part, count in (("train", 16), ("val", 5)):
    for label, name in enumerate(("ant", "bee", "cat")):
      folder = root / part / name
      folder.mkdir(parents=True)
      for number in range(count):
        shape = (*random.integers(20, 40, 2), 3)
        pixels = random.integers(0, 100, shape, np.uint8)
        pixels[..., label] += 150
        ending = "jpg" if number % 2 else "png"
        Image.fromarray(pixels).save(folder / f"{number}.{ending}")


FLAGS = [
  "my_network.py",
  *("--dataset", "folder", "--data-dir", "DATA", "--image-size", "16"),
  *("--ratios", "0.5", "--epochs", "2", "--batch-size", "16"),
  *("--evaluation-batch-size", "8", "--workers", "1", "--log-every", "1"),
  *("--learning-rate", "0.05", "--run-dir", "RUN"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Where the example was run."""
  folder = tmp_path_factory.mktemp("own")
  (folder / "my_network.py").write_text(example())
  write_images(folder / "DATA")
  runs.python(*FLAGS, cwd=folder, devices=2)
  with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(folder)  # Where students and runs are loaded.
    yield folder


def test_it_is_short():
  lines = [line for line in example().splitlines() if line.strip()]
  assert len(lines) < 40


def test_it_trains(folder):
  summary = json.loads((folder / "RUN" / "summary.json").read_text())
  assert summary["network"] == "my_network"
  full, thin = summary["members"]
  # A stem of 3 x 3 x 3 to 32, then 32, 64 and 128 channels and three classes.
  kernels = 27 * 32 + 9 * (32 * 32 + 32 * 64 + 64 * 128)
  assert full["params"] == kernels + 2 * (32 + 32 + 64 + 128) + 128 * 3 + 3
  assert thin["ratio"] == pytest.approx(0.5, abs=0.02)
  assert full["macs"] == (
    27 * 32 * 256 + 9 * (32 * 32 * 64 + 32 * 64 * 16 + 64 * 128 * 4) + 128 * 3
  )
  line = json.loads(
    (folder / "RUN" / "metrics.jsonl").read_text().splitlines()[-1]
  )
  assert line["examples"] == 15


def test_a_student_is_loaded_with_it(folder):
  module, variables = ekd_jax.load_student(folder / "RUN", "student_1")
  images = np.zeros((2, 16, 16, 3), np.float32)
  assert module.apply(variables, images).logits.shape == (2, 3)


def test_a_killed_training_goes_on_in_the_middle_of_an_epoch(folder):
  """Streamed images too: the same end, to the bit."""
  flags = [*FLAGS[1:-1], "KILLED", "--checkpoint-minutes", "1e-9"]
  own = ["--network", "my_network:family"]
  killed = runs.start(runs.KILLED_RUN, "3", *flags, *own, cwd=folder, devices=2)
  runs.finish(killed, code=runs.KILLED)
  out = runs.python(FLAGS[0], *flags, cwd=folder, devices=2)
  # Three steps an epoch; the last save before the kill may be lost.
  assert "resuming at step 1 of 6" in out or "resuming at step 2 of 6" in out
  runs.assert_same_result(folder / "RUN", folder / "KILLED")


def test_two_processes_read_and_train_what_one_does(folder, tmp_path):
  port = runs.free_port()
  processes = []
  for number in range(2):
    host = tmp_path / f"host_{number}"
    host.mkdir()
    processes.append(
      runs.start(
        *(folder / FLAGS[0], *FLAGS[1:]),
        *("--data-dir", folder / "DATA"),
        *("--distributed", "--num-processes", 2, "--process-id", number),
        *("--coordinator-address", f"localhost:{port}"),
        cwd=host,
        devices=1,
      )
    )
  for process in processes:
    runs.finish(process)
  runs.assert_close(
    tmp_path / "host_0" / "RUN", folder / "RUN", tolerance=1e-4, examples=15
  )


def test_a_broken_image_stops_the_training_or_is_counted(folder, tmp_path):
  shutil.copytree(folder / "DATA", tmp_path / "DATA")
  broken = tmp_path / "DATA" / "train" / "bee" / "3.jpg"
  broken.write_bytes(broken.read_bytes()[:200])
  flags = [folder / FLAGS[0], *FLAGS[1:]]
  _, err = runs.start(*flags, cwd=tmp_path, devices=1).communicate()
  assert err.startswith(f"error: {broken} cannot be used: ")
  assert "add --skip-broken" in err
  assert err.count("\n") == 1
  out = runs.python(*flags, "--skip-broken", cwd=tmp_path, devices=1)
  assert "1 image file cannot be used: passed over" in out


def test_a_run_does_not_go_on_with_other_images(folder, tmp_path):
  shutil.copytree(folder / "DATA", tmp_path / "DATA")
  flags = [folder / FLAGS[0], *FLAGS[1:-1], folder / "RUN"]
  (tmp_path / "DATA" / "train" / "bee" / "3.jpg").unlink()
  _, err = runs.start(*flags, cwd=tmp_path, devices=1).communicate()
  assert "--train-examples (there 48, now 47)" in err
  assert err.count("\n") == 1


@pytest.mark.parametrize(
  ("name", "said"),
  [
    ("nowhere:family", "there is no module nowhere"),
    ("my_network:other", "my_network has no other"),
    ("resnext", "--network resnext is not known"),
  ],
)
def test_a_network_that_is_not_there(name, said, folder):
  process = runs.start(
    *FLAGS[:-1], "ELSEWHERE", "--network", name, cwd=folder, devices=1
  )
  _, err = process.communicate()
  assert process.returncode == 2
  assert said in err
  assert err.count("\n") == 1
  assert not (folder / "ELSEWHERE").exists()


def test_costs_are_those_of_the_traced_network():
  import flax.linen as nn

  class Two(nn.Module):
    channels: int

    @nn.compact
    def __call__(self, x, *, train):
      x = nn.Conv(self.channels, (3, 3), 2, feature_group_count=2)(x)
      return nn.Dense(self.channels)(x)

  class Head(nn.Module):
    width: float

    @nn.compact
    def __call__(self, x, *, train):
      x = Two(int(8 * self.width))(x, train=train)
      return ekd_jax.models.Outputs(nn.Dense(5)(x.mean((1, 2))), (x,))

  family = OwnFamily("two", Two(4), Head, (8, 8, 2))
  cost = family.cost(0.5)
  assert family.feature_channels == (8,)
  # Kernels and biases of conv, dense, conv, dense, dense.
  kernels = [9 * 1 * 4, 4 * 4, 9 * 2 * 4, 4 * 4, 4 * 5]
  assert cost.params == sum(kernels) + 4 + 4 + 4 + 4 + 5
  areas = [16, 16, 4, 4, 1]
  assert cost.macs == sum(
    kernel * area for kernel, area in zip(kernels, areas, strict=True)
  )
