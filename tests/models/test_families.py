"""Every family: parameters as published, and networks as their plans say."""

import dataclasses

import jax
import numpy as np
import pytest

from ekd_jax.errors import UserError
from ekd_jax.models import CifarResNet, imagenet_resnet
from ekd_jax.models.bottleneck_resnet import BottleneckResNet
from ekd_jax.models.densenet import DenseNet
from ekd_jax.models.efficientnet import EfficientNet
from ekd_jax.models.googlenet import GoogLeNet
from ekd_jax.models.imagenet_resnet import ImageNetResNet
from ekd_jax.models.own import count_macs
from ekd_jax.models.plain_densenet import PlainDenseNet
from ekd_jax.models.vgg import VGG16
from ekd_jax.models.wide_resnet import WideResNet
from tests.models.common import shapes

WIDTHS = (1.0, 0.8, 0.6, 0.4, 0.2)


def imagenet(name, classes):
  return ImageNetResNet(imagenet_resnet.VARIANTS[name], classes)


# Measured with the reference implementation, five widths; stem and branch.
PUBLISHED = [
  (CifarResNet(20, 10), (272474, 171536, 97018, 42231, 10773)),
  (CifarResNet(32, 10), (466906, 293560, 165442, 71555, 17745)),
  (CifarResNet(44, 10), (661338, 415584, 233866, 100879, 24717)),
  (CifarResNet(56, 100), (861620, 542288, 305800, 132543, 32859)),
  (CifarResNet(110, 10), (1730714, 1086716, 610198, 262161, 63063)),
  (CifarResNet(110, 100), (1736564, 1091396, 613708, 264501, 64233)),
  (DenseNet(12, 100, 10), (769162, 446170, 279482, 102410, 33002)),
  (imagenet("resnext50", 10), (23000394, 14282626, 8187786, 3699858, 1095194)),
  (EfficientNet("b0", 10), (4020358, 2577548, 1444910, 758880, 218242)),
  (EfficientNet("b2", 10), (7715084, 5027044, 2921916, 1398400, 362014)),
  (EfficientNet("b4", 10), (17566546, 11318320, 6371770, 2881562, 862140)),
  (imagenet("18", 1000), (11689512, 7603501, 4438212, 2133581, 711064)),
  (imagenet("50", 1000), (25557032, 16724243, 9847057, 4789824, 1589738)),
  (imagenet("wide50", 10), (66854730, 42859918, 24438270, 11222538, 3310154)),
]
STEMS = {
  "resnet20": 464,
  "densenet_bc_12_100": 648,
  "resnext50_32x4d": 215360,
  "efficientnet_b0": 928,
  "efficientnet_b2": 928,
  "efficientnet_b4": 1392,
  "resnet18": 157504,
  "resnet50": 225344,
  "wide_resnet50_2": 643904,
}
# At full width with 100 classes, counted in the codes of FFSD and PCL.
OTHERS = [
  (WideResNet("16-2", 100), 704420),
  (WideResNet("40-2", 100), 2258084),
  (PlainDenseNet(12, 40, 100), 1100428),
  (GoogLeNet(100), 6258500),
  (BottleneckResNet("110", 100), 1170868),
  (BottleneckResNet("wide20-8", 100), 6871220),
  (VGG16(100), 15299748),
  (DenseNet(12, 40, 100, final_norm=False), 187828),
]
# Kernels, biases and batch norms of the first layers, by hand.
STEMS |= {
  "wide_resnet16-2": 27 * 16 + 16,
  "plain_densenet_12_40": 27 * 24,
  "googlenet": 27 * 192 + 192 + 2 * 192,
  "bottleneck_resnetwide20-8": 27 * 16 + 2 * 16,
  "vgg16": (27 + 9 * 64) * 64 + 2 * (64 + 2 * 64),
  "densenet_bc_12_40_unnormalized": 27 * 24,
}
STEMMED = [family for family, _ in PUBLISHED + OTHERS if family.name in STEMS]

# At full width with 1000 classes, as torchvision's and timm's tables have them.
KNOWN = {
  "34": 21797672,
  "101": 44549160,
  "152": 60192808,
  "resnext101": 88791336,
  "wide101": 126886696,
}
KNOWN_EFFICIENT = {
  "b0": 5288548,
  "b1": 7794184,
  "b3": 12233232,
  "b5": 30389784,
  "b6": 43040704,
  "b7": 66347960,
}


@pytest.mark.parametrize(
  ("family", "params"), PUBLISHED, ids=lambda x: getattr(x, "name", "")
)
def test_parameters_as_published(family, params):
  assert tuple(family.cost(width).params for width in WIDTHS) == params


@pytest.mark.parametrize(
  ("family", "params"), OTHERS, ids=lambda x: getattr(x, "name", "")
)
def test_parameters_of_the_networks_of_other_papers(family, params):
  assert family.cost(1.0).params == params


@pytest.mark.parametrize("name", KNOWN)
def test_parameters_of_other_resnets(name):
  assert imagenet(name, 1000).cost(1.0).params == KNOWN[name]


@pytest.mark.parametrize("name", KNOWN_EFFICIENT)
def test_parameters_of_other_efficientnets(name):
  assert EfficientNet(name, 1000).cost(1.0).params == KNOWN_EFFICIENT[name]


@pytest.mark.parametrize("family", STEMMED, ids=lambda family: family.name)
@pytest.mark.parametrize("width", [1.0, 0.4])
def test_networks_have_what_their_costs_say(family, width):
  """Counted in the traced network: it is another way to the same numbers."""
  side = 64 if family.image_shape[0] > 32 else 32
  family = dataclasses.replace(family, image_shape=(side, side, 3))
  network, variables = shapes(family, width)
  cost = family.cost(width)
  counts = jax.tree.map(lambda x: int(np.prod(x.shape)), variables["params"])
  assert sum(jax.tree.leaves(counts)) == cost.params
  assert sum(jax.tree.leaves(counts["stem"])) == STEMS[family.name]
  images = jax.ShapeDtypeStruct((1, side, side, 3), np.float32)
  traced = jax.make_jaxpr(network.apply)(variables, images)
  assert count_macs(traced.jaxpr) == cost.macs
  outputs = jax.eval_shape(network.apply, variables, images)
  full = jax.eval_shape(*_full(family), images)
  assert [maps.shape[3] for maps in full.features] == list(
    family.feature_channels
  )
  # Adapters can bring the thin one's maps to the full one's shape.
  assert [maps.shape[:3] for maps in outputs.features] == [
    maps.shape[:3] for maps in full.features
  ]


def _full(family):
  network, variables = shapes(family, 1.0)
  return network.apply, variables


@pytest.mark.parametrize(
  ("family", "width", "said"),
  [
    (DenseNet(12, 100, 10), 0.08, "0.0833333"),
    (imagenet("18", 10), 0.001, "0.0078125"),
    (imagenet("resnext50", 10), 0.1, "0.125"),
    (WideResNet("16-2", 10), 0.03, "0.03125"),
    (PlainDenseNet(12, 40, 10), 0.08, "0.0833333"),
    (GoogLeNet(10), 0.06, "0.0625"),
    (BottleneckResNet("110", 10), 0.06, "0.0625"),
    (VGG16(10), 0.007, "0.0078125"),
  ],
  ids=lambda x: getattr(x, "name", ""),
)
def test_a_width_that_leaves_nothing_names_the_thinnest(family, width, said):
  for refused in (family.branch, family.cost):
    with pytest.raises(UserError, match=f"possible width is {said}"):
      refused(width)
  family.branch(family.width_candidates()[0])


@pytest.mark.parametrize("family", STEMMED, ids=lambda family: family.name)
def test_candidates_are_different_networks_and_end_in_the_full_one(family):
  candidates = family.width_candidates()
  params = [family.cost(width).params for width in candidates]
  assert params == sorted(params)
  assert len(set(params)) == len(params)
  assert candidates[-1] == 1.0
