"""The one exception that speaks to the user.

Whatever a user can get wrong is raised as `UserError`: nearly always at the
edge of the program, before anything is written, and otherwise (a recipe that
diverges) with nothing lost. The command line turns it into one line on
standard error and exit code 2; every other exception is a bug and keeps its
traceback.
"""


class UserError(Exception):
  """A mistake in what the user asked for or supplied.

  The message is one line that says what was given, what is allowed and what
  to do about it.
  """
