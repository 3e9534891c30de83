"""What is measured: a case is a config of the product and random images.

Every function here that returns `run` is called in a process of its own and
imports what it measures itself: a PyTorch process never loads JAX, nor the
other way round. `run(steps)` trains for that many steps and returns when the
last one has finished.
"""

import dataclasses
import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from ekd_jax import config as configs
from ekd_jax import data, process
from ekd_jax.config import Config
from ekd_jax.errors import UserError

Run = Callable[[int], None]

# {member: channels of its stages}, the full network first.
StageChannels = Mapping[str, Sequence[int]]

PAPER_WIDTHS = (1.0, 0.8, 0.6, 0.4, 0.2)

CASES = {
  name: configs.resolve(config)
  for name, config in {
    "resnet20x5": Config(depth=20, widths=PAPER_WIDTHS, batch_size=128),
    "resnet110x4": Config(depth=110, ratios=(0.5, 0.75, 0.97), batch_size=64),
  }.items()
}

# Batches that the timed steps go round in. A few, so that no step finds its
# images in the cache.
BATCHES = 8

# So long a training that the learning rate never drops.
TOTAL_STEPS = 1_000_000


@dataclasses.dataclass(frozen=True)
class TrainingFlags:
  """Flags of a training that the benchmarks take too."""

  conv: Literal["auto", "lax", "split"] = "auto"
  scan: Literal["auto", "on", "off"] = "auto"
  remat: bool = False
  tune_allocator: bool = True

  def settings(self) -> dict[str, Any]:
    """The same as options of a Config."""
    names = [field.name for field in dataclasses.fields(TrainingFlags)]
    return {name: getattr(self, name) for name in names}


def config(case: str, **options: Any) -> Config:
  """The config of a case: the one place where ours is told what to run."""
  return dataclasses.replace(CASES[case], **options)


def cores() -> int:
  """The cores that this process may use; XLA takes all of them."""
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count()


def examples(
  config: Config, seed: int = 0, *, batches: int = BATCHES
) -> dict[str, np.ndarray]:
  """Random images "image" [N, H, W, C] uint8 and labels "label" [N] int32."""
  info = data.info(config.dataset)
  source = np.random.default_rng(seed)
  count = batches * config.batch_size
  return {
    "image": source.integers(
      0, 256, (count, *info.image_shape), dtype=np.uint8
    ),
    "label": source.integers(0, info.num_classes, count, dtype=np.int32),
  }


def stage_channels(config: Config) -> dict[str, tuple[int, ...]]:
  """Which networks the config trains, in words that PyTorch understands."""
  from ekd_jax import build

  family = build.family(config)
  return {
    member.name: family.stage_channels(member.width)
    for member in build.members(config)
  }


def require_pytorch(command: str) -> None:
  """Refuses where PyTorch is missing.

  Raises:
    UserError: naming the command and what to install.
  """
  if importlib.util.find_spec("torch") is None:
    raise UserError(f"{command} needs PyTorch: pip install -e '.[bench]'")


def compiler() -> str | None:
  """The C++ compiler that torch.compile would call, if there is one."""
  default = "clang++" if sys.platform == "darwin" else "g++"
  return shutil.which(os.environ.get("CXX", default))


def prepare_product(config: Config, platform: str | None = "cpu") -> None:
  """What the command line sets for its process, before JAX is imported.

  Args:
    config: what will be trained.
    platform: where; None for what JAX finds.
  """
  if platform is not None:
    os.environ["JAX_PLATFORMS"] = platform
  if config.tune_allocator:
    process.tune_allocator()
  process.tidy_after_compiling()
  if config.compilation_cache:
    process.use_compilation_cache()


def product(config: Config) -> Run:
  """Our own step, as the training loop runs it."""
  prepare_product(config)
  import product_step

  return product_step.prepare(config)


def product_alone(config: Config) -> Run:
  """Every member in a solo step of its own, one after the other."""
  prepare_product(config)
  import product_step
  from ekd_jax import build

  runs = [
    product_step.prepare(
      dataclasses.replace(
        config, method="solo", ratios=None, widths=(member.width,)
      )
    )
    for member in build.members(config)
  ]

  def run(steps: int) -> None:
    for run_member in runs:
      run_member(steps)

  return run


def pytorch(config: Config, channels: StageChannels, form: str) -> Run:
  """The PyTorch step; see `pytorch_step.prepare` for the forms."""
  import pytorch_step

  return pytorch_step.prepare(config, channels, form)
