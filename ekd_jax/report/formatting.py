"""How figures are written for people.

A figure that was not measured, or is not finite, is always "-": an empty
cell could be read as zero and "nan" as a bug of the report.
"""

import math

MISSING = "-"


def is_number(value: object) -> bool:
  """Whether `value` is a finite number, so that it can be shown or drawn."""
  return (
    isinstance(value, int | float)
    and not isinstance(value, bool)
    and math.isfinite(value)
  )


def count(value: float | None) -> str:
  """Parameters or multiply-adds with three digits: 1.09 M, 63.1 k, 999."""
  if not is_number(value):
    return MISSING
  for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
    # 999,700 is 1.00 M: as thousands it would round to four digits.
    if abs(value) >= 0.9995 * size:
      scaled = value / size
      decimals = 2 if scaled < 9.995 else 1 if scaled < 99.95 else 0
      return f"{scaled:.{decimals}f} {suffix}"
  return f"{value:.0f}"


def percent(
  value: float | None, spread: float | None = None, *, signed: bool = False
) -> str:
  """A figure in percent or points: 70.12, +1.30 (`signed`), 70.1 ± 0.3."""
  if not is_number(value):
    return MISSING
  sign = "+" if signed else "-"
  # z: what rounds to zero is 0.00, never -0.00.
  if is_number(spread):
    return f"{value:{sign}z.1f} ± {spread:.1f}"
  return f"{value:{sign}z.2f}"


def plain(value: object) -> str:
  """Any value of a JSON file on one line, as a user would type it."""
  if value is None:
    return MISSING
  if isinstance(value, bool):
    return "true" if value else "false"
  if isinstance(value, list | tuple):
    return ", ".join(plain(item) for item in value) or MISSING
  return str(value)
