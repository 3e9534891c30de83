"""The one place that knows about devices.

A step is written for one device under the named axis `AXIS_NAME`; this file
maps it over all of them with pmap. Arrays that cross the seam have a leading
device axis, which exists nowhere else: `replicate` and `shard` put it on,
`unreplicate` takes it off. Moving to another mapping changes this file only.
"""

import collections
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ekd_jax.methods.interface import AXIS_NAME

Devices = Sequence[jax.Device]


def per_device(
  function: Callable[..., Any],
  devices: Devices,
  *,
  donate_argnums: tuple[int, ...] = (),
) -> Callable[..., Any]:
  """Compiles `function` into one program per device, run at the same time.

  Args:
    function: takes and returns what one device sees.
    devices: the devices; as many as the leading axis of every argument.
    donate_argnums: arguments whose memory the results may take over.

  Returns:
    The mapped function: every argument and result has a leading device axis.
  """
  return jax.pmap(
    function,
    axis_name=AXIS_NAME,
    devices=devices,
    donate_argnums=donate_argnums,
  )


def programs_ahead() -> int:
  """How many programs to dispatch before the oldest has to be waited for.

  One on an accelerator, so that it never waits for the host. None on a CPU:
  the host is the device, so nothing would be gained, and each program that is
  dispatched holds all the memory that it needs.
  """
  return 0 if jax.default_backend() == "cpu" else 1


def when_due(dispatched: Iterable[Any]) -> Iterator[Any]:
  """Results of programs, in order, each when it is time to wait for it.

  Args:
    dispatched: dispatches a program whenever it is asked for the next result.

  Yields:
    Every result, at most `programs_ahead()` dispatches later.
  """
  running = collections.deque()
  for result in dispatched:
    running.append(result)
    if len(running) > programs_ahead():
      yield running.popleft()
  yield from running


def replicate(tree: Any, devices: Devices) -> Any:
  """Puts a copy of every array on every device."""
  sharding = _device_axis(devices)

  def copies(array: Any) -> jax.Array:
    array = np.asarray(array)
    return jax.make_array_from_callback(
      (len(devices), *array.shape), sharding, lambda _: array[np.newaxis]
    )

  return jax.tree.map(copies, tree)


def shard(tree: Any, devices: Devices) -> Any:
  """Cuts every array's first axis into one equal part per device."""
  sharding = _device_axis(devices)

  def parts(array: Any) -> jax.Array:
    array = np.asarray(array)
    count = len(devices)
    array = array.reshape(count, len(array) // count, *array.shape[1:])
    return jax.make_array_from_callback(
      array.shape, sharding, lambda index: array[index]
    )

  return jax.tree.map(parts, tree)


def own_rows(batch_size: int, devices: Devices) -> slice:
  """The rows of a global batch that this process's devices take.

  Args:
    batch_size: a multiple of the number of devices.
    devices: all of them; those of a process lie next to each other.
  """
  local = batch_size // len(devices)
  mine = [
    index
    for index, device in enumerate(devices)
    if device.process_index == jax.process_index()
  ]
  return slice(mine[0] * local, (mine[-1] + 1) * local)


def shard_own(tree: Any, devices: Devices) -> Any:
  """As `shard`, of arrays that have this process's rows only."""
  sharding = _device_axis(devices)
  count = len(sharding.addressable_devices)

  def parts(array: np.ndarray) -> jax.Array:
    array = array.reshape(count, len(array) // count, *array.shape[1:])
    shape = (len(devices), *array.shape[1:])
    return jax.make_array_from_process_local_data(sharding, array, shape)

  return jax.tree.map(parts, tree)


def unreplicate(tree: Any) -> Any:
  """Copies one device's share of every array to the host, as NumPy arrays.

  The share is taken from an addressable shard: indexing the array would
  gather it from all devices. It is a copy because the array's own memory is
  donated to the next step.
  """
  own = jax.tree.map(lambda array: array.addressable_data(0), tree)
  jax.tree.map(lambda array: array.copy_to_host_async(), own)
  return jax.tree.map(lambda array: np.array(array)[0], own)


def _device_axis(devices: Devices) -> NamedSharding:
  mesh = Mesh(np.asarray(devices), (AXIS_NAME,))
  return NamedSharding(mesh, PartitionSpec(AXIS_NAME))
