"""Weights that grow, in the numbers of the published codes."""

import jax
import jax.numpy as jnp
import pytest

from ekd_jax import losses
from tests.reference import losses as reference

PUBLISHED = {
  0: 0.006738,
  1: 0.007629,
  10: 0.021750,
  40: 0.286505,
  79: 0.999219,
  80: 1.0,
  100: 1.0,
}


@pytest.mark.parametrize("epoch", PUBLISHED)
def test_80_epochs_as_published(epoch):
  weight = losses.ramp_up(epoch, 80)
  assert weight.dtype == jnp.float32
  assert weight.shape == ()
  assert float(weight) == pytest.approx(PUBLISHED[epoch], abs=6e-7)


def test_five_epochs_of_the_leader_s_weight():
  found = [10 * float(losses.ramp_up(epoch, 5)) for epoch in range(1, 7)]
  expected = [0.407622, 1.652989, 4.493290, 8.187308, 10, 10]
  assert found == pytest.approx(expected, abs=6e-6)


@pytest.mark.parametrize("length", [0, 0.5, 3, 7.5])
def test_equals_the_reference_when_traced(length):
  run = jax.jit(lambda epoch: losses.ramp_up(epoch, length))
  for epoch in (-2, 0, 0.25, 1, 2.5, 7, 50):
    assert float(run(epoch)) == pytest.approx(
      reference.ramp_up(epoch, length), rel=1e-5
    )


@pytest.mark.parametrize(
  ("epoch", "length", "error", "message"),
  [
    (1, -1, ValueError, "length must be a finite number >= 0, got -1"),
    (1, float("inf"), ValueError, "length must be a finite number"),
    (1, jnp.ones(()), ValueError, "length must be a finite number"),
    (jnp.ones(2), 3, AssertionError, "epoch must be a single number"),
  ],
)
def test_mistakes_are_named(epoch, length, error, message):
  with pytest.raises(error, match=message):
    losses.ramp_up(epoch, length)
