"""CIFAR ResNets once more: their convolutions as a list, their maths in NumPy.

Follows He et al. 2016, section 4.2, with projection shortcuts wherever a
block changes stride or channels.
"""

from typing import NamedTuple

import numpy as np

from tests.reference import layers

STEM_CHANNELS = 16


class Conv(NamedTuple):
  inputs: int
  outputs: int
  size: int
  stride: int
  height: int  # of its input
  width: int

  @property
  def weights(self):
    return self.size**2 * self.inputs * self.outputs

  @property
  def positions(self):
    """Output pixels."""
    pad = (self.size - 1) // 2
    return ((self.height + 2 * pad - self.size) // self.stride + 1) * (
      (self.width + 2 * pad - self.size) // self.stride + 1
    )

  @property
  def valid_macs(self):
    """Multiply-accumulates without those on the zero padding."""
    return (
      layers.valid_taps(self.height, self.size, self.stride)
      * layers.valid_taps(self.width, self.size, self.stride)
      * self.inputs
      * self.outputs
    )


def convolutions(depth, channels, image_shape=(32, 32, 3)):
  """Every convolution of the network; each is followed by a batch norm."""
  height, width, inputs = image_shape
  found = [Conv(inputs, STEM_CHANNELS, 3, 1, height, width)]
  inputs = STEM_CHANNELS
  for stage, outputs in enumerate(channels):
    for block in range((depth - 2) // 6):
      stride = 2 if stage > 0 and block == 0 else 1
      found.append(Conv(inputs, outputs, 3, stride, height, width))
      if stride == 2 or inputs != outputs:
        found.append(Conv(inputs, outputs, 1, stride, height, width))
      height, width = -(-height // stride), -(-width // stride)
      found.append(Conv(outputs, outputs, 3, 1, height, width))
      inputs = outputs
  return found


def block_outputs(depth, channels, image_shape=(32, 32, 3)):
  """Elements of all blocks' outputs of one image: its residual sums."""
  count = (depth - 2) // 6
  height, width, _ = image_shape
  total = 0
  for stage, c in enumerate(channels):
    if stage > 0:
      height, width = -(-height // 2), -(-width // 2)
    total += count * height * width * c
  return total


def parameters(depth, channels, num_classes):
  """Trainable parameters: kernels, batch norm's scale and bias, the head."""
  body = sum(c.weights + 2 * c.outputs for c in convolutions(depth, channels))
  return body + channels[-1] * num_classes + num_classes


def forward(params, batch_stats, images, *, train):
  """Logits and the three stages' outputs.

  Args:
    params: {"stem", "branch"} of nested dicts of arrays.
    batch_stats: the same.
    images: [N, H, W, C].
    train: whether to normalise with this batch's own statistics.
  """

  def unit(x, part, conv, norm, *, stride=1, residual=None, relu=True):
    own_params, own_stats = part
    x = layers.convolution(x, own_params[conv]["kernel"], stride)
    mean, var = (
      layers.moments(x)
      if train
      else (own_stats[norm]["mean"], own_stats[norm]["var"])
    )
    scale, bias = own_params[norm]["scale"], own_params[norm]["bias"]
    return layers.batch_norm_relu(x, scale, bias, mean, var, residual, relu)

  x = unit(images, (params["stem"], batch_stats["stem"]), "conv", "norm")
  branch, features = params["branch"], []
  count = sum(name.startswith("stage_0_") for name in branch)
  for stage in range(3):
    for block in range(count):
      name = f"stage_{stage}_block_{block}"
      part = branch[name], batch_stats["branch"][name]
      stride = 2 if stage > 0 and block == 0 else 1
      shortcut = x
      if (
        stride == 2 or x.shape[-1] != branch[name]["conv_0"]["kernel"].shape[3]
      ):
        shortcut = unit(
          x, part, "shortcut_conv", "shortcut_norm", stride=stride, relu=False
        )
      x = unit(x, part, "conv_0", "norm_0", stride=stride)
      x = unit(x, part, "conv_1", "norm_1", residual=shortcut)
    features.append(x)
  head = branch["head"]
  return np.mean(x, (1, 2)) @ head["kernel"] + head["bias"], features
