"""Ctrl-C, and the SIGTERM with which a machine is taken away.

The first signal asks for an orderly end. Where steps have been made that no
checkpoint has, the loop is left to finish its step and save (`signal` is what
it looks at). Where none have (while data is read, while XLA compiles, during
evaluation, while the report is written) there is nothing to wait for: the main
thread gets `Stopped` at once. It can be deep inside XLA, which may not come
back for minutes; after a grace period the process is ended without it. The
second signal ends it at once, wherever it is. Several processes agree on the
step after which they stop, see `hosts.Agreement`.

Python runs signal handlers in the main thread, between two bytecodes: not
while that thread is in XLA. The number of the signal, however, is written to a
pipe at once, and another thread reads that.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

from ekd_jax.errors import Stopped

SIGNALS = (signal.SIGINT, signal.SIGTERM)

# Longer than it takes to unwind, shorter than anybody's patience.
_GRACE_SECONDS = 3.0


class StopRequest:
  """Whether this process was asked to stop; a context manager.

  Only the main thread can be asked: in any other nothing is installed.

  Attributes:
    signal: the first signal, None before it.
    saved: whether everything done so far is in a checkpoint, so that the
      process may be left at once. The loop sets it.
    last_words: called by another thread before the process is ended without
      the main thread: finishes a save, tidies up the terminal. The loop sets
      it.
  """

  def __init__(self) -> None:
    """Prepares; signals are listened to inside the context."""
    self.signal: int | None = None
    self.saved = True
    self.last_words: Callable[[], Any] = lambda: None
    self._installed: dict[int, Any] = {}

  def __enter__(self) -> "StopRequest":
    if threading.current_thread() is not threading.main_thread():
      return self
    self._reader, self._writer = os.pipe()
    os.set_blocking(self._writer, False)
    self._wakeup = signal.set_wakeup_fd(self._writer)
    for number in SIGNALS:
      self._installed[number] = signal.signal(number, self._handle)
    self._left = threading.Event()
    self._thread = threading.Thread(target=self._watch, daemon=True)
    self._thread.start()
    return self

  def __exit__(self, *exception: object) -> None:
    if not self._installed:
      return
    for number, handler in self._installed.items():
      signal.signal(number, handler)
    self._installed = {}
    signal.set_wakeup_fd(self._wakeup)
    self._left.set()
    os.close(self._writer)  # Ends the thread's reading.
    self._thread.join()
    os.close(self._reader)

  def check(self) -> None:
    """Ends an orderly stop: everything is saved.

    Raises:
      Stopped: there was a signal.
    """
    if self.signal is not None:
      raise Stopped(self.signal, _words(self.signal))

  def _handle(self, number: int, frame: Any) -> None:
    # In the main thread, whenever it runs Python.
    self.signal = self.signal or number
    if self.saved:
      self.check()

  def _watch(self) -> None:
    first = None
    while numbers := os.read(self._reader, 64):
      for number in numbers:
        if number not in SIGNALS:
          continue
        if first is not None:
          self._leave(number)
        first = number
        self.signal = self.signal or number
        if self.saved:
          threading.Thread(
            target=self._leave_later, args=(number,), daemon=True
          ).start()

  def _leave_later(self, number: int) -> None:
    if not self._left.wait(_GRACE_SECONDS):
      self.last_words()
      self._leave(number)

  def _leave(self, number: int) -> None:
    print(_words(number), file=sys.stderr, flush=True)
    os._exit(128 + number)


def _words(number: int) -> str:
  return (
    f"stopped by {signal.Signals(number).name}: the same command goes on from "
    "the last checkpoint"
  )
