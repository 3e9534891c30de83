"""Elementwise work on a CPU that is done once and not in every use of it.

XLA for CPUs copies elementwise work into whatever uses it. Before a
convolution, which stacks shifted copies, that is three times; along residual
sums it is the sums of all the blocks before. It would also copy across
`optimization_barrier`, but not into or out of a loop: so maps pass through a
loop that never runs.
"""

import jax
import jax.numpy as jnp


def compute_once(maps: jax.Array, any_number: jax.Array) -> jax.Array:
  """The maps; the compiler writes them to memory once. Has no gradient.

  Args:
    maps: any array.
    any_number: a scalar that the compiler cannot know. No square is below -1,
      so the loop does not run. It is not compared with 0, which could be
      simplified; and the body changes the maps, because a loop that hands
      them through is removed.

  Returns:
    The same array.
  """
  never = jnp.square(any_number) < -1
  return jax.lax.while_loop(
    lambda carry: carry[1],
    lambda carry: (-carry[0], jnp.zeros_like(carry[1])),
    (maps, never),
  )[0]


@jax.custom_vjp
def swish(x: jax.Array) -> jax.Array:
  """x sigmoid(x) of maps, computed once."""
  return compute_once(jax.nn.silu(x), x.reshape(-1)[0])


def _forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  return swish(x), x


def _backward(x: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
  wide = x.astype(jnp.float32)
  gate = jax.nn.sigmoid(wide)
  slope = gate * (1 + wide * (1 - gate))
  return (gradient * slope.astype(x.dtype),)


swish.defvjp(_forward, _backward)


@jax.custom_vjp
def keep(x: jax.Array) -> jax.Array:
  """The same array, computed once; so is its gradient."""
  return compute_once(x, x.reshape(-1)[0])


@jax.custom_vjp
def keep_gradient(x: jax.Array) -> jax.Array:
  """The same array, whose gradient is computed once."""
  return x


def _keep_backward(_: None, gradient: jax.Array) -> tuple[jax.Array]:
  return (compute_once(gradient, gradient.reshape(-1)[0]),)


keep.defvjp(lambda x: (keep(x), None), _keep_backward)
keep_gradient.defvjp(lambda x: (x, None), _keep_backward)
