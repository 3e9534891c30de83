"""What a user is told in one line, and the exit codes.

    0    everything that was asked for is there
    1    a bug: its traceback is shown
    2    a mistake in what was asked for or supplied, or no room to save
    3    the training diverged: a loss or a gradient is not finite
    4    another process of a run on several hosts has ended (134 where JAX
         notices first, which aborts)
    130  stopped by Ctrl-C, 143 by SIGTERM (preemption); saved

After 4, 130 and 143 the same command goes on where the run was; after 2 it
does once the cause is gone. Whatever the code, nothing that was saved is lost.
"""


class UserError(Exception):
  """A mistake in what the user asked for or supplied.

  Raised at the edge of the program, before anything is written, or with
  nothing lost. The message is one line that says what was given, what is
  allowed and what to do about it. The command line prints it and ends with
  `exit_code`; every other exception is a bug and keeps its traceback.
  """

  exit_code = 2


class StorageError(UserError):
  """A run directory that cannot be written to, or not any more."""


class NonFiniteError(UserError):
  """A loss or a gradient became NaN or infinite.

  The recipe is at fault, not the code. Names the step, the member, the term.
  """

  exit_code = 3


class ProcessLostError(UserError):
  """Another process of a run on several hosts has ended."""

  exit_code = 4


class Stopped(UserError):
  """A signal asked the run to stop, and it has saved."""

  def __init__(self, signal_number: int, message: str):
    super().__init__(message)
    # What a shell reports of a process that the signal has killed.
    self.exit_code = 128 + signal_number
