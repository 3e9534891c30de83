"""Four CPU devices for every test, set before jax is imported.

Tests that need one device take the first of the four.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "")
  + " --xla_force_host_platform_device_count=4"
).strip()
