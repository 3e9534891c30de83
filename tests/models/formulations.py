"""Running a layer in either formulation, from and to plain NumPy arrays.

And the arrays that tests of layers begin with.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from ekd_jax.models import layers

NAMES = ("lax", "split")

# One rounding to bfloat16's 8 significant bits moves a number by this much.
HALF_STEP = 2.0**-8


def normal(seed, *shape, mean=0.0, std=1.0):
  """Random float32 numbers."""
  values = np.random.default_rng(seed).normal(mean, std, shape)
  return values.astype(np.float32)


def bfloat16(x):
  """The nearest bfloat16 numbers, as float32."""
  return np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32)


@dataclasses.dataclass(frozen=True)
class Formulation:
  """What turns plain arrays [N, H, W, C] into maps and back.

  Written without the library's own conversions, so that these are tested too.

  Attributes:
    name: "lax" or "split".
  """

  name: str

  def maps(self, x):
    """The maps of plain arrays; None stays None."""
    if x is None or self.name == "lax":
      return x
    return layers.BatchLast(jnp.transpose(x, (3, 1, 2, 0)))

  def plain(self, maps):
    """Plain arrays of maps, which must be of this formulation's type."""
    if self.name == "lax":
      assert isinstance(maps, jax.Array)
      return maps
    assert isinstance(maps, layers.BatchLast)
    return jnp.transpose(maps.values, (3, 1, 2, 0))

  def apply(self, layer, variables, x, *args, **kwargs):
    """`layer.apply`, plain arrays to plain arrays."""
    y = layer.apply(variables, self.maps(x), *args, **kwargs)
    return self.plain(y)

  def train_norm(self, layer, variables, x, residual=None):
    """A batch norm's output in training and the statistics after it."""
    y, changed = layer.apply(
      variables,
      self.maps(x),
      self.maps(residual),
      train=True,
      mutable=["batch_stats"],
    )
    return self.plain(y), changed["batch_stats"]


def relative_error(actual, expected):
  """The largest difference, next to the largest of what is expected.

  Sums of many products are as exact as their largest term, not as themselves.
  """
  expected = np.asarray(expected, np.float64)
  assert actual.shape == expected.shape
  return np.abs(actual - expected).max() / np.abs(expected).max()
