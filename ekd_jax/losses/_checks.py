"""What the losses demand of their arguments, said in the caller's words.

A loss fed the wrong arrays often still returns a number: a stacked array
iterates like a list of members, and two shapes that differ may broadcast. So
everything is checked before any arithmetic. The checks look at shapes, types
and Python numbers only; they run while JAX traces and cost nothing in the
compiled step. Arrays and structure raise AssertionError through chex, a
hyper-parameter out of its range raises ValueError.
"""

import math
import numbers
from collections.abc import Sequence

import chex
import jax


def assert_true(condition: bool, message: str) -> None:
  """Raises AssertionError with `message` unless `condition` holds."""
  chex.assert_equal(condition, True, custom_message=message)


def assert_sequence(name: str, value: object, expected: str) -> None:
  """Asserts that `value` is a list or tuple; `expected` says of what."""
  got = type(value).__name__
  if hasattr(value, "shape"):
    got = f"one array of shape {value.shape}"
  assert_true(
    isinstance(value, list | tuple),
    f"{name} must be a list or tuple of {expected}, got {got}",
  )


def assert_float_array(name: str, value: object, shape: str) -> None:
  """Asserts that `value` is a floating-point array; `shape` is its notation."""
  assert_true(
    hasattr(value, "shape") and hasattr(value, "dtype"),
    f"{name} must be a floating-point array {shape}, got"
    f" {type(value).__name__}",
  )
  chex.assert_type(
    value,
    float,
    custom_message=f"{name} must be a floating-point array {shape}",
  )


def assert_logits(name: str, value: jax.Array, shape: str = "[..., K]") -> None:
  """Asserts that `value` is a floating-point array with a class axis."""
  assert_float_array(name, value, shape)
  assert_true(
    value.ndim >= 1 and value.shape[-1] >= 1,
    f"{name} must have shape {shape} with K >= 1 classes on the last axis,"
    f" got {value.shape}",
  )


def assert_same_shape(
  name: str, value: jax.Array, other_name: str, other: jax.Array, shape: str
) -> None:
  """Asserts that two arrays have one shape, so that nothing broadcasts."""
  chex.assert_equal_shape(
    [value, other],
    custom_message=f"{name} and {other_name} must have one shape {shape}, got"
    f" {value.shape} and {other.shape}",
  )


def assert_map(
  name: str, value: jax.Array, shape: str, batch_axis: int
) -> None:
  """Asserts a batch axis, and at least one element for each example."""
  assert_true(
    -value.ndim <= batch_axis < value.ndim,
    f"{name} must have shape {shape} with the batch on axis {batch_axis}, got"
    f" {value.shape}",
  )
  per_example = list(value.shape)
  del per_example[batch_axis]
  assert_true(
    len(per_example) >= 1 and 0 not in per_example,
    f"{name} must have shape {shape} with at least one element per example,"
    f" got {value.shape}",
  )


def assert_members(
  name: str, members: Sequence[jax.Array], shape: str = "[..., K]"
) -> None:
  """Asserts that `members` are the logits of at least one member."""
  assert_sequence(name, members, f"S arrays {shape}, one per member")
  assert_true(len(members) >= 1, f"{name} must hold at least one member, got 0")
  for i, member in enumerate(members):
    assert_logits(f"{name}[{i}]", member, shape)
    assert_same_shape(f"{name}[{i}]", member, f"{name}[0]", members[0], shape)


def assert_scalar(name: str, value: object) -> None:
  """Asserts that `value` is a Python number or an array of rank 0."""
  is_array = hasattr(value, "shape") and hasattr(value, "dtype")
  got = f"shape {value.shape}" if is_array else repr(value)
  assert_true(
    isinstance(value, numbers.Real) or (is_array and not value.shape),
    f"{name} must be a single number, got {got}",
  )


def check_temperature(temperature: float | jax.Array) -> None:
  """Checks that `temperature` is one finite number above 0."""
  assert_scalar("temperature", temperature)
  # An array may be traced, and reading a concrete one would wait for the
  # device; only Python numbers have a value here for sure.
  if isinstance(temperature, numbers.Real) and not (0 < temperature < math.inf):
    raise ValueError(
      f"temperature must be a finite number above 0, got {temperature}"
    )


def check_weight(name: str, weight: float | jax.Array) -> None:
  """Checks that `weight` is one finite number, 0 or above."""
  assert_scalar(name, weight)
  if isinstance(weight, numbers.Real) and not 0 <= weight < math.inf:
    raise ValueError(f"{name} must be a finite number >= 0, got {weight}")
