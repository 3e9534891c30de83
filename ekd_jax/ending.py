"""How a command ends: one line and an exit code, or a traceback.

Around it is quiet: libraries that write checkpoints or talk to buckets tell of
a failure several times, in their logs and from their threads, beside the
exception that is all we need.
"""

import logging
import os
import sys
from collections.abc import Callable
from typing import Any

from ekd_jax.errors import Stopped, UserError

# Orbax warns through absl of what it was asked to do (reading only, for one).
# Its failures and those of a bucket are exceptions, which asyncio and Google's
# library tell once more.
_TOO_TALKATIVE = ("absl", "asyncio", "google.auth")

# What asyncio says to whom a loop has ended too early. When the first of many
# writes fails, orbax leaves the loop that the others report to.
_LOOP_CLOSED = "Event loop is closed"


def exit_on_user_error(function: Callable[[], None]) -> None:
  """Calls it; a `UserError` becomes one line and its exit code."""
  for name in _TOO_TALKATIVE:
    logging.getLogger(name).setLevel(logging.CRITICAL)
  sys.unraisablehook = _unraisable
  try:
    function()
  except Stopped as stopped:
    print(stopped, file=sys.stderr)
    _leave(stopped.exit_code)
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(error.exit_code)


def _unraisable(event: Any) -> None:
  if str(event.exc_value) != _LOOP_CLOSED:
    sys.__unraisablehook__(event)


def _leave(code: int) -> None:
  """Ends the process without the interpreter's clean-up.

  XLA may still be compiling, in a thread of its own, and would crash when the
  interpreter goes.
  """
  from ekd_jax.training import hosts

  hosts.leave()
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)
