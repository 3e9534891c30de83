"""Random input: nothing but a `UserError` comes of it (hypothesis)."""

import dataclasses
import io
import tarfile
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ekd_jax import cli
from ekd_jax import config as configs
from ekd_jax.compression import solve_widths
from ekd_jax.config import Config
from ekd_jax.data import cifar
from ekd_jax.errors import UserError
from ekd_jax.models import CifarResNet

NETWORK = CifarResNet(8, 10)
LAYOUT = dataclasses.replace(
  cifar.LAYOUTS["cifar10"],
  train_files=("data_batch_1.bin",),
  train_records=2,
  test_records=2,
)
RECORDS = 2 * 3073

quickly = settings(max_examples=200, deadline=None)


@quickly
@given(st.text(max_size=30))
def test_any_word_after_ratios(word):
  try:
    config = configs.resolve(
      cli.parse(Config(dataset="digits", depth=8), "", [f"--ratios={word}"])
    )
  except UserError as error:
    assert str(error)
    return
  assert all(0 < ratio < 1 for ratio in config.ratios)


@quickly
@given(
  st.lists(
    st.floats(min_value=0, max_value=1, exclude_min=True, exclude_max=True),
    min_size=1, max_size=4, unique=True,
  )
)  # fmt: skip
def test_any_ratios_are_met_or_refused(ratios):
  try:
    members = solve_widths(ratios, NETWORK.cost, NETWORK.width_candidates())
  except UserError as error:
    assert "\n" not in str(error)
    return
  full, *thin = members
  assert full.ratio == 0
  for asked, member in zip(ratios, thin, strict=True):
    assert member.ratio_asked == asked
    assert member.ratio == pytest.approx(1 - member.params / full.params)
    assert abs(member.ratio - asked) <= 0.02
    assert NETWORK.cost(member.width).params == member.params
  assert len({member.params for member in members}) == len(members)


@quickly
@given(st.sampled_from([0, 1, RECORDS - 1, RECORDS]), st.integers())
def test_any_bytes_as_the_unpacked_files(tmp_path_factory, size, seed):
  folder = tmp_path_factory.mktemp("data")
  random = Random(seed)
  test = bytearray(random.randbytes(RECORDS))
  # Labels that may be right: one of 256 would hardly ever be.
  test[0], test[3073] = random.randrange(12), random.randrange(12)
  (folder / "data_batch_1.bin").write_bytes(bytes(test[:size]))
  (folder / "test_batch.bin").write_bytes(test)
  try:
    *_, labels = cifar.read_folder(folder, LAYOUT)
  except UserError as error:
    assert "\n" not in str(error)
    assert size != RECORDS or max(test[0], test[3073]) > 9
    return
  assert size == RECORDS
  assert list(labels) == [test[0], test[3073]]


@quickly
@given(st.binary(max_size=2000))
def test_any_bytes_as_the_archive(tmp_path_factory, content):
  path = tmp_path_factory.mktemp("data") / "cifar-10-binary.tar.gz"
  path.write_bytes(content)
  with pytest.raises(UserError):
    cifar.read_archive(path, LAYOUT)


@quickly
@given(st.data())
def test_any_change_to_a_good_archive(tmp_path_factory, data):
  packed = bytearray(_archive())
  for _ in range(data.draw(st.integers(1, 5))):
    place = data.draw(st.integers(0, len(packed) - 1))
    packed[place] = data.draw(st.integers(0, 255))
  del packed[data.draw(st.integers(len(packed) // 2, len(packed))) :]
  path = tmp_path_factory.mktemp("data") / "cifar-10-binary.tar.gz"
  path.write_bytes(packed)
  try:
    images, labels, *_ = cifar.read_archive(path, LAYOUT)
  except UserError as error:
    assert "\n" not in str(error)
    return
  assert images.shape == (2, 32, 32, 3)
  assert (labels == 3).all()


def _archive():
  packed = io.BytesIO()
  with tarfile.open(fileobj=packed, mode="w:gz") as archive:
    for name in ("data_batch_1.bin", "test_batch.bin"):
      content = 2 * (bytes([3]) + bytes(range(256)) * 12)
      member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
      member.size = len(content)
      archive.addfile(member, io.BytesIO(content))
  return packed.getvalue()
