"""Losses must not broadcast by accident: [N] against [N, N] is an error."""

import jax
import pytest


@pytest.fixture(autouse=True)
def no_rank_promotion():
  with jax.numpy_rank_promotion("raise"):
    yield
