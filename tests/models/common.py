"""What tests of networks and of methods have in common."""

import jax
import jax.numpy as jnp
import numpy as np

from ekd_jax.models import Network


def random_like(shapes, seed=0):
  """Random parameters and statistics for a tree of shapes.

  Drawn here and not by the library, so that no value is a special one (no
  scale of 1, no bias of 0) and nothing has to be compiled for it. Kernels are
  small enough that activations neither grow nor vanish; integers are 0.
  """
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    if not np.issubdtype(leaf.dtype, np.floating):
      return np.zeros(leaf.shape, leaf.dtype)
    kind = path[-1].key
    if kind == "kernel":
      fan_in = np.prod(leaf.shape[:-1])
      values = rng.normal(scale=(2 / fan_in) ** 0.5, size=leaf.shape)
    elif kind in ("scale", "var"):
      values = rng.uniform(0.5, 1.5, leaf.shape)
    else:
      values = rng.normal(scale=0.2, size=leaf.shape)
    return values.astype(leaf.dtype)

  return jax.tree_util.tree_map_with_path(draw, shapes)


def shapes(network, width, image_shape=None):
  """Shapes of the variables of stem and branch, as one `Network`."""
  images = jax.ShapeDtypeStruct(
    (1, *(image_shape or network.image_shape)), jnp.float32
  )
  module = Network(network.stem(), network.branch(width))
  return module, jax.eval_shape(module.init, jax.random.key(0), images)
