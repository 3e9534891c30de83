"""Networks are compiled here, and run a few times only."""

import jax
import jax.numpy as jnp
import pytest

from ekd_jax.models import batch_norm, layers
from tests.models import formulations

OPTION = "jax_disable_most_optimizations"


@pytest.fixture(autouse=True, scope="package")
def compile_quickly():
  """Leaves out optimisations that take longer than the tests run."""
  before = jax.config.read(OPTION)
  jax.config.update(OPTION, True)
  yield
  jax.config.update(OPTION, before)


@pytest.fixture(params=formulations.NAMES)
def form(request):
  """One formulation, then the other."""
  return formulations.Formulation(request.param)


@pytest.fixture
def smooth(monkeypatch):
  """Puts tanh in the place of every ReLU.

  A ReLU whose input is within rounding of zero may open in one formulation
  and stay shut in the other, after which gradients differ by far more than
  rounding. What the ReLU does is tested layer by layer.
  """
  in_training, in_evaluation = (
    layers._batch_norm_relu,
    batch_norm.normalize_relu,
  )

  def smooth_in_training(*args):
    *args, relu, channel_axis, keep_gradient = args
    y, mean, var = in_training(*args, False, channel_axis, keep_gradient)
    return jnp.tanh(y) if relu else y, mean, var

  def smooth_in_evaluation(*args):
    *args, relu, channel_axis = args
    y = in_evaluation(*args, False, channel_axis)
    return jnp.tanh(y) if relu else y

  monkeypatch.setattr(layers, "_batch_norm_relu", smooth_in_training)
  monkeypatch.setattr(batch_norm, "normalize_relu", smooth_in_evaluation)
