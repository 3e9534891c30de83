"""A network in two parts of which equal ones share the lower: the same one."""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from ekd_jax.models import CifarResNet, Network, OwnFamily
from ekd_jax.models.bottleneck_resnet import BottleneckResNet
from ekd_jax.models.densenet import DenseNet
from ekd_jax.models.efficientnet import EfficientNet
from ekd_jax.models.googlenet import GoogLeNet
from ekd_jax.models.imagenet_resnet import VARIANTS, ImageNetResNet
from ekd_jax.models.network import Outputs
from ekd_jax.models.plain_densenet import PlainDenseNet
from ekd_jax.models.vgg import VGG16
from ekd_jax.models.wide_resnet import WideResNet
from tests.models.common import random_like

SMALL = (8, 8, 3)


class _Stem(nn.Module):
  @nn.compact
  def __call__(self, images, *, train):
    return nn.Conv(4, (3, 3))(images)


class _Branch(nn.Module):
  width: float

  @nn.compact
  def __call__(self, x, *, train):
    x = nn.Conv(int(8 * self.width), (3, 3))(x)
    return Outputs(nn.Dense(3)(x.mean((1, 2))), (x,))


FAMILIES = {
  "resnet": CifarResNet(14, 5, SMALL),
  "densenet": DenseNet(4, 22, 5, SMALL),
  "imagenet_resnet": ImageNetResNet(VARIANTS["18"], 5, (32, 32, 3)),
  "bottlenecks": ImageNetResNet(VARIANTS["50"], 5, (32, 32, 3)),
  "final norm": DenseNet(4, 22, 5, SMALL, final_norm=False),
  "plain_densenet": PlainDenseNet(4, 13, 5, SMALL),
  "wide_resnet": WideResNet("10-2", 5, SMALL),
  "bottleneck_resnet": BottleneckResNet("wide20-8", 5, SMALL),
  "vgg16": VGG16(5),
  "googlenet": GoogLeNet(5, SMALL),
  "efficientnet": EfficientNet("b0", 5, (32, 32, 3)),
  "own": OwnFamily("own", _Stem(), _Branch, SMALL),
}


def shapes_of(module, shape):
  images = jax.ShapeDtypeStruct((2, *shape), jnp.float32)
  return jax.eval_shape(module.init_with_output, jax.random.key(0), images)


@pytest.mark.parametrize("width", [1.0, 0.5])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_parts_are_as_large_as_the_whole(name, width):
  family = FAMILIES[name]
  shape = family.image_shape
  parts = Network(family.lower(width), family.upper(width))
  outputs, variables = shapes_of(parts, shape)
  params = sum(math.prod(x.shape) for x in jax.tree.leaves(variables["params"]))
  assert params == family.cost(width).params
  whole, _ = shapes_of(Network(family.stem(), family.branch(width)), shape)
  assert outputs.logits.shape == whole.logits.shape
  assert outputs.features[-1].shape == whole.features[-1].shape


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(
  "name", ["resnet", "densenet", "plain_densenet", "wide_resnet"]
)
def test_the_parts_compute_what_the_whole_does(name, train):
  family = FAMILIES[name]
  whole = Network(family.stem(), family.branch(0.5))
  parts = Network(family.lower(0.5), family.upper(0.5))
  _, shapes = shapes_of(whole, family.image_shape)
  variables = random_like(shapes, 0)
  # The same names, below "stages" of the lower part or in the upper one.
  _, of_parts = shapes_of(parts, family.image_shape)
  moved = {}
  for kind, tree in of_parts.items():
    branch = variables[kind]["branch"]
    stem = {"stages": {n: branch[n] for n in tree["stem"]["stages"]}}
    if "stem" in variables[kind]:
      stem["stem"] = variables[kind]["stem"]
    moved[kind] = {
      "stem": stem,
      "branch": {n: branch[n] for n in tree["branch"]},
    }
  assert jax.tree.structure(moved) == jax.tree.structure(of_parts)
  images = np.random.default_rng(0).normal(size=(4, *family.image_shape))

  def run(module, variables):
    outputs, changed = module.apply(
      variables, images.astype(np.float32), train=train, mutable=["batch_stats"]
    )
    return outputs.logits, changed

  expected, _ = jax.jit(lambda v: run(whole, v))(variables)
  logits, _ = jax.jit(lambda v: run(parts, v))(moved)
  np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
  "name",
  ["plain_densenet", "wide_resnet", "bottleneck_resnet", "vgg16", "googlenet"],
)
def test_both_formulations_compute_the_same(name):
  """Logits and gradients, with batch statistics."""
  family = FAMILIES[name]
  width = family.width_candidates()[3]
  images = np.random.default_rng(0).normal(size=(4, *family.image_shape))
  images = images.astype(np.float32)
  found = {}
  for formulation in ("lax", "split"):
    own = dataclasses.replace(family, formulation=formulation)
    network = Network(own.stem(), own.branch(width))
    _, shapes = shapes_of(
      Network(family.stem(), family.branch(width)), family.image_shape
    )
    variables = random_like(shapes, 1)

    def loss(params, variables=variables, network=network):
      outputs, _ = network.apply(
        {**variables, "params": params},
        images,
        train=True,
        mutable=["batch_stats"],
      )
      return jnp.square(outputs.logits).mean(), outputs.logits

    gradients, logits = jax.jit(jax.grad(loss, has_aux=True))(
      variables["params"]
    )
    found[formulation] = logits, gradients
  (logits, gradients), (others, other_gradients) = found.values()
  np.testing.assert_allclose(logits, others, rtol=1e-3, atol=1e-3)
  # Of all together: a bias before a batch norm has none but for rounding.
  gradients, _ = ravel_pytree(gradients)
  other_gradients, _ = ravel_pytree(other_gradients)
  difference = np.linalg.norm(gradients - other_gradients)
  assert difference <= 1e-3 * np.linalg.norm(gradients)
