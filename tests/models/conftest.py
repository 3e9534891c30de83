"""Networks are compiled here, and run a few times only."""

import jax
import pytest

OPTION = "jax_disable_most_optimizations"


@pytest.fixture(autouse=True, scope="package")
def compile_quickly():
  """Leaves out optimisations that take longer than the tests run."""
  before = jax.config.read(OPTION)
  jax.config.update(OPTION, True)
  yield
  jax.config.update(OPTION, before)
