"""The other side: the same EKD step in eager PyTorch, written from the paper.

It is what a PyTorch user would write with some care: modules and losses of
the framework, in-place ReLUs and sums, the fused optimizer, augmentation of
the whole batch by one indexing operation, and no metric fetched within the
step. Modules have the names that our parameters have, so that weights can be
carried over (`one_step`).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import workload
from ekd_jax import data
from ekd_jax.config import Config
from ekd_jax.data import DatasetInfo

STEM_CHANNELS = 16

# Images [N, C, H, W] and labels [N] -> the loss and {metric: scalar}.
Metrics = dict[str, torch.Tensor]


def _conv(inputs: int, outputs: int, size: int, stride: int) -> nn.Conv2d:
  return nn.Conv2d(
    inputs, outputs, size, stride, padding=(size - 1) // 2, bias=False
  )


class Stem(nn.Module):
  """The common base: [N, C, H, W] -> [N, 16, H, W]."""

  def __init__(self, image_channels: int):
    super().__init__()
    self.conv = _conv(image_channels, STEM_CHANNELS, 3, 1)
    self.norm = nn.BatchNorm2d(STEM_CHANNELS)

  def forward(self, images: torch.Tensor) -> torch.Tensor:
    return F.relu(self.norm(self.conv(images)), inplace=True)


class BasicBlock(nn.Module):
  """Two 3x3 convolutions around a shortcut, projected where shapes change."""

  def __init__(self, inputs: int, channels: int, stride: int):
    super().__init__()
    self.conv_0 = _conv(inputs, channels, 3, stride)
    self.norm_0 = nn.BatchNorm2d(channels)
    self.conv_1 = _conv(channels, channels, 3, 1)
    self.norm_1 = nn.BatchNorm2d(channels)
    self.projects = stride != 1 or inputs != channels
    if self.projects:
      self.shortcut_conv = _conv(inputs, channels, 1, stride)
      self.shortcut_norm = nn.BatchNorm2d(channels)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    shortcut = x
    if self.projects:
      shortcut = self.shortcut_norm(self.shortcut_conv(x))
    x = F.relu(self.norm_0(self.conv_0(x)), inplace=True)
    x = self.norm_1(self.conv_1(x))
    x += shortcut
    return F.relu(x, inplace=True)


class Branch(nn.Module):
  """Three stages and the head: hidden maps -> logits and three feature maps."""

  def __init__(self, channels: Sequence[int], blocks: int, num_classes: int):
    super().__init__()
    inputs = STEM_CHANNELS
    self.stages = []
    for stage, outputs in enumerate(channels):
      names = [f"stage_{stage}_block_{block}" for block in range(blocks)]
      for block, name in enumerate(names):
        stride = 2 if stage > 0 and block == 0 else 1
        self.add_module(name, BasicBlock(inputs, outputs, stride))
        inputs = outputs
      self.stages.append(names)
    self.head = nn.Linear(inputs, num_classes)

  def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    features = []
    for names in self.stages:
      for name in names:
        x = getattr(self, name)(x)
      features.append(x)
    return self.head(x.mean((2, 3))), features


class EKD(nn.Module):
  """The stem, all members' branches and the thinner ones' adapters.

  Args:
    config: depth, data set and the weights of the losses.
    channels: {member: channels of its stages}, the full network first.
  """

  def __init__(self, config: Config, channels: workload.StageChannels):
    super().__init__()
    info = data.info(config.dataset)
    self.config = config
    self.stem = Stem(info.image_shape[-1])
    self.branches = nn.ModuleDict(
      {
        name: Branch(widths, (config.depth - 2) // 6, info.num_classes)
        for name, widths in channels.items()
      }
    )
    (_, full), *thinner = channels.items()
    self.adapters = nn.ModuleDict(
      {
        name: nn.ModuleDict(
          {
            f"block_{b}": nn.Conv2d(thin, wide, 1)
            for b, (thin, wide) in enumerate(zip(widths, full, strict=True))
          }
        )
        for name, widths in thinner
      }
    )
    for module in (self.stem, self.branches):
      for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
          nn.init.xavier_normal_(layer.weight)

  def forward(
    self, images: torch.Tensor, labels: torch.Tensor
  ) -> tuple[torch.Tensor, Metrics]:
    """The EKD objective of a batch.

    Args:
      images: [N, C, H, W], normalised.
      labels: [N] integers.

    Returns:
      The loss, and the metrics under the names that ours have.
    """
    config = self.config
    hidden = self.stem(images)
    outputs = {name: branch(hidden) for name, branch in self.branches.items()}
    logits = {name: output[0] for name, output in outputs.items()}
    ensemble = torch.stack(list(logits.values())).mean(0).detach()
    teacher = F.log_softmax(ensemble / config.temperature, -1)
    label = {
      f"label/{name}": F.cross_entropy(z, labels) for name, z in logits.items()
    }
    distill = {
      f"distill/{name}": config.temperature**2
      * F.kl_div(
        F.log_softmax(z / config.temperature, -1),
        teacher,
        reduction="batchmean",
        log_target=True,
      )
      for name, z in logits.items()
    }
    (_, (_, full)), *thinner = outputs.items()
    feature = {
      f"feature/{name}/block_{b}": F.mse_loss(
        self.adapters[name][f"block_{b}"](thin), wide.detach()
      )
      for name, (_, features) in thinner
      for b, (thin, wide) in enumerate(zip(features, full, strict=True))
    }
    loss = (
      config.label_weight * sum(label.values())
      + config.feature_weight * sum(feature.values())
      + config.distill_weight * sum(distill.values())
    )
    terms = {"loss": loss, **label, **distill, **feature}
    metrics = {name: term.detach() for name, term in terms.items()}
    with torch.no_grad():
      for name, z in [*logits.items(), ("ensemble", ensemble)]:
        hits = z.argmax(-1) == labels
        metrics[f"top1/{name}"] = 100 * hits.float().mean()
      metrics["label/ensemble"] = F.cross_entropy(ensemble, labels)
    return loss, metrics


def nesterov_sgd(model: EKD) -> torch.optim.Optimizer:
  """The optimizer of the config; weight decay on everything."""
  config = model.config
  adapters = list(model.adapters.parameters())
  others = [*model.stem.parameters(), *model.branches.parameters()]
  groups = [{"params": others}]
  if adapters:
    rate = config.learning_rate * config.adapter_learning_rate
    groups.append({"params": adapters, "lr": rate})
  return torch.optim.SGD(
    groups,
    lr=config.learning_rate,
    momentum=config.momentum,
    weight_decay=config.weight_decay,
    nesterov=True,
    fused=True,  # the fastest of the three implementations
  )


def augment(images: torch.Tensor, info: DatasetInfo) -> torch.Tensor:
  """Random crops and flips: uint8 [N, H, W, C] of pixels, normalised.

  Returns:
    float32 [N, C, H, W], channels last in memory.
  """
  count, height, width, _ = images.shape
  padding = info.crop_padding
  padded = F.pad(images, (0, 0, padding, padding, padding, padding))
  top, left = torch.randint(0, 2 * padding + 1, (2, count, 1))
  rows, columns = top + torch.arange(height), torch.arange(width)
  if info.flip:
    mirrored = torch.rand(count, 1) < 0.5
    columns = torch.where(mirrored, columns.flip(0), columns)
  columns = left + columns
  cropped = padded[
    torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]
  ]
  std = torch.tensor(info.std)
  scale, shift = 1 / (255 * std), -torch.tensor(info.mean) / std
  return (cropped * scale + shift).permute(0, 3, 1, 2)


def prepare(
  config: Config, channels: workload.StageChannels, form: str
) -> workload.Run:
  """Trains for a few steps and returns `run(steps)`.

  Args:
    config: of the EKD method.
    channels: {member: channels of its stages}, the full network first.
    form: "eager"; "channels_last", the same with channels last in memory; or
      "compile", forward and backward pass through torch.compile.
  """
  torch.manual_seed(config.seed)
  torch.set_num_threads(workload.cores())
  info = data.info(config.dataset)
  memory_format = (
    torch.channels_last if form == "channels_last" else torch.contiguous_format
  )
  model = EKD(config, channels).to(memory_format=memory_format)
  optimizer = nesterov_sgd(model)
  objective = torch.compile(model) if form == "compile" else model
  arrays = workload.examples(config)
  images = torch.from_numpy(arrays["image"])
  labels = torch.from_numpy(arrays["label"]).long()
  batch = 0

  def train_step() -> Metrics:
    nonlocal batch
    rows = slice(batch * config.batch_size, (batch + 1) * config.batch_size)
    batch = (batch + 1) % workload.BATCHES
    inputs = augment(images[rows], info).contiguous(memory_format=memory_format)
    loss, metrics = objective(inputs, labels[rows])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return metrics

  def run(steps: int) -> None:
    for _ in range(steps):
      train_step()

  # The allocator and oneDNN's caches need two; a compiled one a third, which
  # is when it would be compiled again.
  run(3)
  return run


def one_step(
  config: Config,
  channels: workload.StageChannels,
  ours: Mapping[str, Any],
  dtype: str = "float64",
) -> dict[str, Any]:
  """`product_step.one_step`, from its weights on its batch.

  Args:
    config: of the EKD method.
    channels: {member: channels of its stages}, the full network first.
    ours: what `product_step.one_step` returned.
    dtype: "float64" or "float32".

  Returns:
    "metrics", "gradients", "new_params" and "new_batch_stats" in its form.
  """
  floating = getattr(torch, dtype)
  model = EKD(config, channels).to(floating)
  optimizer = nesterov_sgd(model)
  tensors = model.state_dict(keep_vars=True)
  start = ours["params"] | ours["batch_stats"]
  with torch.no_grad():
    for path, array in start.items():
      tensors[_name(path)].copy_(_as_torch(array))
  missing = {
    name for name in tensors if not name.endswith("num_batches_tracked")
  } - {_name(path) for path in start}
  if missing:
    raise ValueError(f"networks differ: ours have no {', '.join(missing)}")
  images = torch.from_numpy(ours["image"]).to(floating).permute(0, 3, 1, 2)
  labels = torch.from_numpy(ours["label"]).long()
  loss, metrics = model(images.contiguous(), labels)
  loss.backward()
  optimizer.step()

  def of(paths: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {p: _as_ours(tensors[_name(p)].detach()) for p in paths}

  return {
    "metrics": {name: value.item() for name, value in metrics.items()},
    "gradients": {
      path: _as_ours(tensors[_name(path)].grad) for path in ours["params"]
    },
    "new_params": of(ours["params"]),
    "new_batch_stats": of(ours["batch_stats"]),
  }


_LEAVES = {
  "kernel": "weight",
  "scale": "weight",
  "bias": "bias",
  "mean": "running_mean",
  "var": "running_var",
}


def _name(path: str) -> str:
  """The tensor that our array of this path is called in PyTorch."""
  *modules, leaf = path.split("/")
  return ".".join([*modules, _LEAVES[leaf]])


def _as_torch(array: np.ndarray) -> torch.Tensor:
  """HWIO -> OIHW and [in, out] -> [out, in]; vectors stay."""
  tensor = torch.from_numpy(np.array(array))
  return tensor.permute(3, 2, 0, 1) if tensor.ndim == 4 else tensor.t()


def _as_ours(tensor: torch.Tensor) -> np.ndarray:
  if tensor.ndim == 4:
    return tensor.permute(2, 3, 1, 0).numpy()
  return tensor.t().numpy()
