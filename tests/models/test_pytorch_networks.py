"""Our networks against torchvision's and timm's, with the same weights.

Their modules are built with random weights and statistics, which are mapped
into ours; thin students are built from their own blocks.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ekd_jax.models import Network, efficientnet, imagenet_resnet
from ekd_jax.models.bottleneck_resnet import BottleneckResNet
from ekd_jax.models.densenet import DenseNet
from ekd_jax.models.efficientnet import EfficientNet
from ekd_jax.models.googlenet import GoogLeNet
from ekd_jax.models.imagenet_resnet import ImageNetResNet
from ekd_jax.models.network import init_network
from ekd_jax.models.plain_densenet import PlainDenseNet
from ekd_jax.models.vgg import VGG16
from ekd_jax.models.wide_resnet import WideResNet

WHY = "needs the extra [bench]"
torch = pytest.importorskip("torch", reason=WHY)
torchvision = pytest.importorskip("torchvision", reason=WHY)
timm_efficientnet = pytest.importorskip("timm.models.efficientnet", reason=WHY)
builder = pytest.importorskip("timm.models._efficientnet_builder", reason=WHY)

TOLERANCE = 1e-4
CLASSES = 10
SIDE = 64
# Of width and depth (Tan and Le 2019).
MULTIPLIERS = {"b0": (1.0, 1.0), "b2": (1.1, 1.2), "b4": (1.4, 1.8)}


def kernel(module):
  return module.weight.detach().numpy().transpose(2, 3, 1, 0)


def dense(module):
  weight = module.weight.detach().numpy()
  weight = weight.reshape(weight.shape[:2])  # A 1x1 convolution may be one.
  return {"kernel": weight.T, "bias": module.bias.detach().numpy()}


class Mapped:
  """Our variables, collected layer by layer."""

  def __init__(self):
    self.params, self.batch_stats = {}, {}

  def _put(self, tree, path, leaves):
    for name in path:
      tree = tree.setdefault(name, {})
    tree.update(leaves)

  def conv(self, path, module):
    bias = {}
    if module.bias is not None:
      bias = {"bias": module.bias.detach().numpy()}
    self._put(self.params, path, {"kernel": kernel(module), **bias})

  def dense(self, path, module):
    self._put(self.params, path, dense(module))

  def norm(self, path, module):
    scale, bias = (x.detach().numpy() for x in (module.weight, module.bias))
    self._put(self.params, path, {"scale": scale, "bias": bias})
    mean, var = module.running_mean.numpy(), module.running_var.numpy()
    self._put(self.batch_stats, path, {"mean": mean, "var": var})

  def variables(self):
    stats = {"stem": {}, "branch": {}} | self.batch_stats
    return {"params": self.params, "batch_stats": stats}


def resnet(variant, width):
  """torchvision's, with stages two to four of thinner planes."""
  blocks = torchvision.models.resnet
  block = blocks.Bottleneck if variant.bottleneck else blocks.BasicBlock
  model = blocks.ResNet(
    block,
    list(variant.blocks),
    num_classes=CLASSES,
    groups=variant.groups,
    width_per_group=variant.base_width,
  )
  model.inplanes = 64 * block.expansion
  for index in (1, 2, 3):
    planes = int(64 * 2**index * width)
    stage = model._make_layer(block, planes, variant.blocks[index], stride=2)
    setattr(model, f"layer{index + 1}", stage)
  model.fc = torch.nn.Linear(planes * block.expansion, CLASSES)
  return model


def map_resnet(model):
  mapped = Mapped()
  mapped.conv(("stem", "conv"), model.conv1)
  mapped.norm(("stem", "norm"), model.bn1)
  for stage in range(4):
    top = "stem" if stage == 0 else "branch"
    for index, block in enumerate(getattr(model, f"layer{stage + 1}")):
      path = (top, f"stage_{stage}_block_{index}")
      for number in range(3):
        if hasattr(block, f"conv{number + 1}"):
          conv = getattr(block, f"conv{number + 1}")
          mapped.conv((*path, f"conv_{number}"), conv)
          norm = getattr(block, f"bn{number + 1}")
          mapped.norm((*path, f"norm_{number}"), norm)
      if block.downsample is not None:
        mapped.conv((*path, "shortcut_conv"), block.downsample[0])
        mapped.norm((*path, "shortcut_norm"), block.downsample[1])
  mapped.dense(("branch", "head"), model.fc)
  return mapped.variables()


def densenet(growth, depth, width):
  """torchvision's, with the first convolution of small images."""
  layers = (depth - 4) // 6
  model = torchvision.models.DenseNet(
    growth_rate=int(growth * width),
    block_config=(layers,) * 3,
    num_init_features=2 * growth,
    num_classes=CLASSES,
  )
  model.features.conv0 = torch.nn.Conv2d(
    3, 2 * growth, 3, padding=1, bias=False
  )
  for name in ("norm0", "relu0", "pool0"):
    setattr(model.features, name, torch.nn.Identity())
  return model


def map_densenet(model):
  mapped = Mapped()
  features = model.features
  mapped.conv(("stem", "conv"), features.conv0)
  for block in range(3):
    layers = getattr(features, f"denseblock{block + 1}").values()
    for index, layer in enumerate(layers):
      path = ("branch", f"block_{block}_layer_{index}")
      for number in range(2):
        norm = getattr(layer, f"norm{number + 1}")
        mapped.norm((*path, f"norm_{number}"), norm)
        conv = getattr(layer, f"conv{number + 1}")
        mapped.conv((*path, f"conv_{number}"), conv)
    if block < 2:
      transition = getattr(features, f"transition{block + 1}")
      path = ("branch", f"transition_{block}")
      mapped.norm((*path, "norm"), transition.norm)
      mapped.conv((*path, "conv"), transition.conv)
  mapped.norm(("branch", "norm"), features.norm5)
  mapped.dense(("branch", "head"), model.classifier)
  return mapped.variables()


def conv(inputs, outputs, size=3, stride=1, bias=False):
  return torch.nn.Conv2d(
    inputs, outputs, size, stride, padding=size // 2, bias=bias
  )


class WideBlock(torch.nn.Module):
  def __init__(self, inputs, outputs, stride):
    super().__init__()
    self.norm0 = torch.nn.BatchNorm2d(inputs)
    self.conv0 = conv(inputs, outputs, bias=True)
    self.norm1 = torch.nn.BatchNorm2d(outputs)
    self.conv1 = conv(outputs, outputs, 3, stride, bias=True)
    self.shortcut = None
    if stride != 1 or inputs != outputs:
      self.shortcut = conv(inputs, outputs, 1, stride, bias=True)

  def forward(self, x):
    y = self.conv0(torch.relu(self.norm0(x)))
    y = self.conv1(torch.relu(self.norm1(y)))
    return y + (x if self.shortcut is None else self.shortcut(x))


class Wide(torch.nn.Module):
  """WRN-16-2: two pre-activation blocks in each of three stages."""

  def __init__(self, width):
    super().__init__()
    self.first = conv(3, 16, bias=True)
    self.blocks = torch.nn.ModuleList()
    inputs = 16
    for stage, channels in enumerate((32, 64, 128)):
      for index in range(2):
        stride = 2 if stage > 0 and index == 0 else 1
        outputs = int(channels * width)
        self.blocks.append(WideBlock(inputs, outputs, stride))
        inputs = outputs
    self.norm = torch.nn.BatchNorm2d(inputs)
    self.head = torch.nn.Linear(inputs, CLASSES)

  def forward(self, x):
    x = self.first(x)
    for block in self.blocks:
      x = block(x)
    return self.head(torch.relu(self.norm(x)).mean((2, 3)))


def map_wide(model):
  mapped = Mapped()
  mapped.conv(("stem", "conv"), model.first)
  for index, block in enumerate(model.blocks):
    path = ("branch", f"stage_{index // 2}_block_{index % 2}")
    for number in range(2):
      mapped.norm((*path, f"norm_{number}"), getattr(block, f"norm{number}"))
      mapped.conv((*path, f"conv_{number}"), getattr(block, f"conv{number}"))
    if block.shortcut is not None:
      mapped.conv((*path, "shortcut"), block.shortcut)
  mapped.norm(("branch", "norm"), model.norm)
  mapped.dense(("branch", "head"), model.head)
  return mapped.variables()


class Bottlenecks(torch.nn.Module):
  """Two of torchvision's, eight times as wide inside, in each stage."""

  def __init__(self, width):
    super().__init__()
    self.conv1 = conv(3, 16)
    self.bn1 = torch.nn.BatchNorm2d(16)
    inputs = 16
    for stage, planes in enumerate((16, 32, 64)):
      blocks = []
      for index in range(2):
        stride = 2 if stage > 0 and index == 0 else 1
        outer = 4 * int(planes * width)
        downsample = None
        if stride != 1 or inputs != outer:
          downsample = torch.nn.Sequential(
            conv(inputs, outer, 1, stride), torch.nn.BatchNorm2d(outer)
          )
        blocks.append(
          torchvision.models.resnet.Bottleneck(
            *(inputs, int(planes * width), stride, downsample),
            base_width=64 * 8,
          )
        )
        inputs = outer
      setattr(self, f"layer{stage + 1}", torch.nn.Sequential(*blocks))
    self.fc = torch.nn.Linear(inputs, CLASSES)

  def forward(self, x):
    x = torch.relu(self.bn1(self.conv1(x)))
    x = self.layer3(self.layer2(self.layer1(x)))
    return self.fc(x.mean((2, 3)))


def map_bottlenecks(model):
  mapped = Mapped()
  mapped.conv(("stem", "conv"), model.conv1)
  mapped.norm(("stem", "norm"), model.bn1)
  for stage in range(3):
    for index, block in enumerate(getattr(model, f"layer{stage + 1}")):
      path = ("branch", f"stage_{stage}_block_{index}")
      for number in range(3):
        own = getattr(block, f"conv{number + 1}")
        mapped.conv((*path, f"conv_{number}"), own)
        own = getattr(block, f"bn{number + 1}")
        mapped.norm((*path, f"norm_{number}"), own)
      if block.downsample is not None:
        mapped.conv((*path, "shortcut_conv"), block.downsample[0])
        mapped.norm((*path, "shortcut_norm"), block.downsample[1])
  mapped.dense(("branch", "head"), model.fc)
  return mapped.variables()


def vgg(width):
  """torchvision's convolutions, and the head of small images."""
  layers = torchvision.models.vgg
  sizes = [
    size if size in ("M", 64) else int(size * width)
    for size in layers.cfgs["D"]
  ]
  hidden = int(512 * width)
  return torch.nn.Sequential(
    layers.make_layers(sizes, batch_norm=True),
    torch.nn.Flatten(),
    torch.nn.Linear(hidden, hidden),
    torch.nn.ReLU(),
    torch.nn.Linear(hidden, hidden),
    torch.nn.ReLU(),
    torch.nn.Linear(hidden, CLASSES),
  )


def map_vgg(model):
  mapped = Mapped()
  group = index = 0
  for layer in model[0]:
    path = ("stem", "group") if group == 0 else ("branch", "groups")
    if isinstance(layer, torch.nn.MaxPool2d):
      group, index = group + 1, 0
    elif isinstance(layer, torch.nn.Conv2d):
      mapped.conv((*path, f"conv_{group}_{index}"), layer)
    elif isinstance(layer, torch.nn.BatchNorm2d):
      mapped.norm((*path, f"norm_{group}_{index}"), layer)
      index += 1
  for name, layer in (("dense_0", 2), ("dense_1", 4), ("head", 6)):
    mapped.dense(("branch", name), model[layer])
  return mapped.variables()


class Plain(torch.nn.Module):
  """DenseNet of single 3x3 convolutions, four in each of three blocks."""

  def __init__(self, width):
    super().__init__()
    growth = int(12 * width)
    self.first = conv(3, 24)
    self.norms, self.convs = torch.nn.ModuleList(), torch.nn.ModuleList()
    channels = 24
    for index in range(15):
      outputs = channels if index % 5 == 4 else growth
      if index < 14:
        self.norms.append(torch.nn.BatchNorm2d(channels))
        self.convs.append(conv(channels, outputs, 1 if index % 5 == 4 else 3))
        channels += 0 if index % 5 == 4 else growth
    self.norm = torch.nn.BatchNorm2d(channels)
    self.head = torch.nn.Linear(channels, CLASSES)

  def forward(self, x):
    x = self.first(x)
    for index, (norm, layer) in enumerate(
      zip(self.norms, self.convs, strict=True)
    ):
      new = layer(torch.relu(norm(x)))
      if index % 5 == 4:
        x = torch.nn.functional.avg_pool2d(new, 2)
      else:
        x = torch.cat([x, new], 1)
    return self.head(torch.relu(self.norm(x)).mean((2, 3)))


def map_plain(model):
  mapped = Mapped()
  mapped.conv(("stem", "conv"), model.first)
  for index, (norm, layer) in enumerate(
    zip(model.norms, model.convs, strict=True)
  ):
    block, within = divmod(index, 5)
    name = f"block_{block}_layer_{within}"
    path = ("branch", f"transition_{block}" if within == 4 else name)
    mapped.norm((*path, "norm"), norm)
    mapped.conv((*path, "conv"), layer)
  mapped.norm(("branch", "norm"), model.norm)
  mapped.dense(("branch", "head"), model.head)
  return mapped.variables()


# Szegedy et al. 2015, Table 1: 1x1, 3x3 reduced, 3x3, 5x5 reduced, 5x5, pool.
INCEPTIONS = [
  (64, 96, 128, 16, 32, 32),
  (128, 128, 192, 32, 96, 64),
  (192, 96, 208, 16, 48, 64),
  (160, 112, 224, 24, 64, 64),
  (128, 128, 256, 24, 64, 64),
  (112, 144, 288, 32, 64, 64),
  (256, 160, 320, 32, 128, 128),
  (256, 160, 320, 32, 128, 128),
  (384, 192, 384, 48, 128, 128),
]


def step(inputs, outputs, size):
  return torch.nn.Sequential(
    conv(inputs, outputs, size, bias=True),
    torch.nn.BatchNorm2d(outputs),
    torch.nn.ReLU(),
  )


class Google(torch.nn.Module):
  def __init__(self, width):
    super().__init__()
    self.first = step(3, 192, 3)
    self.blocks = torch.nn.ModuleList()
    inputs = 192
    for sizes in INCEPTIONS:
      one, three_in, three, five_in, five, pool = (
        int(size * width) for size in sizes
      )
      self.blocks.append(
        torch.nn.ModuleDict(
          {
            "one_0": step(inputs, one, 1),
            "three_0": step(inputs, three_in, 1),
            "three_1": step(three_in, three, 3),
            "five_0": step(inputs, five_in, 1),
            "five_1": step(five_in, five, 3),
            "five_2": step(five, five, 3),
            "pool_0": step(inputs, pool, 1),
          }
        )
      )
      inputs = one + three + five + pool
    self.head = torch.nn.Linear(inputs, CLASSES)

  def forward(self, x):
    pool = torch.nn.functional.max_pool2d
    x = self.first(x)
    for index, block in enumerate(self.blocks):
      if index in (2, 7):
        x = pool(x, 3, 2, 1)
      five = block["five_2"](block["five_1"](block["five_0"](x)))
      x = torch.cat(
        [
          block["one_0"](x),
          block["three_1"](block["three_0"](x)),
          five,
          block["pool_0"](pool(x, 3, 1, 1)),
        ],
        1,
      )
    return self.head(x.mean((2, 3)))


def map_google(model):
  mapped = Mapped()

  def layer(path, sequence):
    mapped.conv((*path, "conv"), sequence[0])
    mapped.norm((*path, "norm"), sequence[1])

  layer(("stem", "first"), model.first)
  places = [(0, 0), (0, 1), *((1, i) for i in range(5)), (2, 0), (2, 1)]
  for (stage, index), block in zip(places, model.blocks, strict=True):
    for name, sequence in block.items():
      layer(("branch", f"stage_{stage}_block_{index}", name), sequence)
  mapped.dense(("branch", "head"), model.head)
  return mapped.variables()


# The paper's table in timm's words: kind of block, repeats, kernel, stride,
# expansion, channels, squeeze.
TABLE = [
  ["ds_r1_k3_s1_e1_c16_se0.25"],
  ["ir_r2_k3_s2_e6_c24_se0.25"],
  ["ir_r2_k5_s2_e6_c40_se0.25"],
  ["ir_r3_k3_s2_e6_c80_se0.25"],
  ["ir_r3_k5_s1_e6_c112_se0.25"],
  ["ir_r4_k5_s2_e6_c192_se0.25"],
  ["ir_r1_k3_s1_e6_c320_se0.25"],
]


def efficient(variant, width):
  """timm's with TensorFlow's padding, torch's epsilon, and the full stem."""
  of_width, of_depth = MULTIPLIERS[variant]
  rounded = functools.partial(
    builder.round_channels, multiplier=of_width * width
  )
  return timm_efficientnet.EfficientNet(
    builder.decode_arch_def(TABLE, depth_multiplier=of_depth),
    num_features=rounded(1280),
    stem_size=builder.round_channels(32, of_width),
    fix_stem=True,
    round_chs_fn=rounded,
    act_layer=torch.nn.SiLU,
    norm_layer=functools.partial(torch.nn.BatchNorm2d, eps=1e-5),
    pad_type="same",
    num_classes=CLASSES,
  )


def map_efficientnet(model):
  mapped = Mapped()

  def layer(path, conv, norm):
    mapped.conv((*path, "conv"), conv)
    mapped.norm((*path, "norm"), norm)

  layer(("stem", "first"), model.conv_stem, model.bn1)
  for group, blocks in enumerate(model.blocks):
    for index, block in enumerate(blocks):
      path = ("branch", f"group_{group}_block_{index}")
      if group == 0:
        layer((*path, "depthwise"), block.conv_dw, block.bn1)
        layer((*path, "project"), block.conv_pw, block.bn2)
      else:
        layer((*path, "expand"), block.conv_pw, block.bn1)
        layer((*path, "depthwise"), block.conv_dw, block.bn2)
        layer((*path, "project"), block.conv_pwl, block.bn3)
      path = (*path, "squeeze_excite")
      mapped.dense((*path, "reduce"), block.se.conv_reduce)
      mapped.dense((*path, "expand"), block.se.conv_expand)
  layer(("branch", "last"), model.conv_head, model.bn2)
  mapped.dense(("branch", "head"), model.classifier)
  return mapped.variables()


def _resnet_case(name, width):
  variant = imagenet_resnet.VARIANTS[name]
  ours = functools.partial(ImageNetResNet, variant, CLASSES)
  return ours, lambda: resnet(variant, width), map_resnet


CASES = {
  (name, width): functools.partial(_resnet_case, name, width)
  for name, width in [
    ("18", 1.0),
    ("18", 0.4),
    ("34", 0.6),
    ("50", 1.0),
    ("50", 0.2),
    ("resnext50", 1.0),
    ("resnext50", 0.4),
    ("wide50", 0.4),
  ]
}
CASES |= {
  ("densenet 12/100", width): lambda width=width: (
    functools.partial(DenseNet, 12, 100, CLASSES),
    lambda: densenet(12, 100, width),
    map_densenet,
  )
  for width in (1.0, 0.4)
}
CASES |= {
  (variant, width): lambda variant=variant, width=width: (
    functools.partial(EfficientNet, variant, CLASSES),
    lambda: efficient(variant, width),
    map_efficientnet,
  )
  for variant, width in [("b0", 1.0), ("b0", 0.6), ("b2", 0.2), ("b4", 0.4)]
}


OF_SMALL_IMAGES = {
  "wide_resnet": (
    functools.partial(WideResNet, "16-2", CLASSES),
    Wide,
    map_wide,
  ),
  "bottlenecks": (
    functools.partial(BottleneckResNet, "wide20-8", CLASSES),
    Bottlenecks,
    map_bottlenecks,
  ),
  "vgg16": (functools.partial(VGG16, CLASSES), vgg, map_vgg),
  "plain_densenet": (
    functools.partial(PlainDenseNet, 12, 16, CLASSES),
    Plain,
    map_plain,
  ),
  "googlenet": (functools.partial(GoogLeNet, CLASSES), Google, map_google),
}
CASES |= {
  (name, width): lambda parts=parts, width=width: (
    parts[0],
    lambda: parts[1](width),
    parts[2],
  )
  for name, parts in OF_SMALL_IMAGES.items()
  for width in (1.0, 0.5)
}


def randomized(model):
  """Statistics and batch norm as after some training."""
  source = torch.Generator().manual_seed(0)
  for module in model.modules():
    if isinstance(module, torch.nn.BatchNorm2d):
      shape = module.weight.shape
      module.weight.data = 0.5 + torch.rand(shape, generator=source)
      module.bias.data = 0.2 * torch.randn(shape, generator=source)
      module.running_mean = 0.2 * torch.randn(shape, generator=source)
      module.running_var = 0.5 + torch.rand(shape, generator=source)
  return model


def relative_difference(found, expected):
  return np.abs(found - expected).max() / max(1.0, np.abs(expected).max())


@pytest.mark.parametrize("formulation", ["lax", "split"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]} {case[1]}")
def test_same_numbers(case, formulation, monkeypatch):
  monkeypatch.setattr(efficientnet, "DROP_CONNECT", 0.0)
  for name, variant in efficientnet.VARIANTS.items():
    monkeypatch.setitem(
      efficientnet.VARIANTS, name, variant._replace(dropout=0.0)
    )
  ours, theirs, to_ours = CASES[case]()
  torch.manual_seed(0)
  model = randomized(theirs())
  for module in model.modules():
    if isinstance(module, torch.nn.Dropout):
      module.p = 0.0
  small = "densenet 12/100", *OF_SMALL_IMAGES
  side = 32 if case[0] in small else SIDE
  family = ours(image_shape=(side, side, 3), formulation=formulation)
  network = Network(family.stem(), family.branch(case[1]))
  images = np.random.default_rng(0).normal(size=(4, side, side, 3))
  images = images.astype(np.float32)
  variables = to_ours(model)
  drawn, _ = init_network(
    network,
    jax.random.key(0),
    jax.ShapeDtypeStruct(images.shape, jnp.float32),
  )
  assert jax.tree.map(np.shape, drawn["params"]) == jax.tree.map(
    np.shape, variables["params"]
  )
  inputs = torch.tensor(images.transpose(0, 3, 1, 2))
  for train in (False, True):
    model.train(train)
    with torch.no_grad():
      expected = model(inputs).numpy()
    outputs = network.apply(
      variables,
      images,
      train=train,
      mutable=["batch_stats"] if train else False,
      rngs={"dropout": jax.random.key(0)},
    )
    logits = (outputs[0] if train else outputs).logits
    difference = relative_difference(np.asarray(logits), expected)
    print(f"{case} {formulation} train={train}: {difference:.1e}")
    assert difference < TOLERANCE
