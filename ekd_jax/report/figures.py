"""Figures as inline SVG, drawn by matplotlib without a display.

One figure is one pure function from figures to a string: `Figure` objects
instead of pyplot, so that nothing global changes, and no dates or random
identifiers, so that the same run gives the same page byte for byte. Text
stays text: it is set in the page's font, can be searched, and follows the
page's theme (see `style`). One unit is one CSS pixel at full size.
"""

import io
import itertools
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from ekd_jax.report import curves, formatting, style

# For half the width of the page, or less than that, and a third of it.
HALF = (470, 330)
THIRD = (340, 235)

_POINTS_PER_INCH = 72  # an SVG of matplotlib has 72 units per inch


class Line(NamedTuple):
  """A curve and how it is drawn."""

  points: curves.Curve
  colour: str  # a name of `style`
  faint: bool = False  # dashed and behind the others


class Point(NamedTuple):
  """A network in the plot of accuracy against size."""

  name: str
  params: float
  top1: float
  spread: float | None
  solo: float | None
  solo_spread: float | None
  colour: str


def over_epochs(
  name: str,
  lines: Sequence[Line],
  *,
  size: tuple[int, int] = HALF,
  zero_line: bool = False,
) -> str:
  """Curves over epochs.

  Args:
    name: what the figure shows, for readers who cannot see it.
    lines: the curves; points that are not finite are gaps.
    size: width and height in pixels.
    zero_line: marks zero, for differences.

  Returns:
    An <svg> element; "" if no curve has a point to draw.
  """
  lines = [line for line in lines if curves.drawable(line.points)]
  if not lines:
    return ""

  def draw(axes: object) -> None:
    for line in lines:
      points = curves.thin(line.points)
      axes.plot(
        list(points),
        list(points.values()),
        color=style.placeholder(line.colour),
        linewidth=1.2 if line.faint else 1.8,
        linestyle=(0, (4, 3)) if line.faint else "-",
        alpha=0.6 if line.faint else 1,
        # Few points may be one point, which is no line.
        marker="o" if len(points) <= 12 else "",
        markersize=3 if line.faint else 4.5,
        zorder=2 if line.faint else 3,
      )
    logged = [v for line in lines for v in line.points.values() if _finite(v)]
    if min(logged) == max(logged) > 0:
      axes.set_ylim(0, 1.5 * logged[0])  # a constant: its level, not its digits
    if zero_line:
      axes.axhline(0, color=style.placeholder("muted"), linewidth=1)
    _epoch_axis(axes, lines)
    _log_axis_if_wide(axes, logged)

  return _svg(name, size, draw)


def accuracy_against_size(
  points: Sequence[Point], ensemble: float | None
) -> str:
  """Top-1 against parameters (log scale), together and alone.

  Args:
    points: members; those without parameters or accuracy are left out.
    ensemble: top-1 of the ensemble, a dashed line; None for no line.

  Returns:
    An <svg> element; "" if there is no point to draw.
  """
  points = sorted(
    (p for p in points if _positive(p.params) and _finite(p.top1)),
    key=lambda point: point.params,
  )
  if not points:
    return ""

  def draw(axes: object) -> None:
    axes.set_xscale("log")
    solo = [point for point in points if _finite(point.solo)]
    muted, paper = style.placeholder("muted"), style.placeholder("paper")
    axes.plot(
      [p.params for p in points],
      [p.top1 for p in points],
      color=muted,
      linewidth=1,
      zorder=1,
    )
    axes.plot(
      [p.params for p in solo],
      [p.solo for p in solo],
      color=muted,
      linewidth=1,
      linestyle=(0, (4, 3)),
      zorder=1,
    )
    for p in solo:
      colour = style.placeholder(p.colour)
      axes.errorbar(
        p.params,
        p.solo,
        yerr=_bar(p.solo_spread),
        color=colour,
        marker="o",
        markersize=7,
        markerfacecolor=paper,
        markeredgewidth=1.5,
        zorder=2,
      )
    for p in points:
      axes.errorbar(
        p.params,
        p.top1,
        yerr=_bar(p.spread),
        marker="o",
        markersize=8,
        color=style.placeholder(p.colour),
        capsize=3,
        zorder=3,
      )
    axes.margins(x=0.12, y=0.12)
    _size_axis(axes, [p.params for p in points])
    if _finite(ensemble):
      ink = style.placeholder("ink")
      axes.axhline(ensemble, color=ink, linewidth=1.3, linestyle=(0, (6, 4)))
      axes.annotate(
        f"ensemble {ensemble:.2f}",
        (0, ensemble),
        xytext=(4, 4),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        color=ink,
      )
    _label_points(axes, points, ensemble)

  return _svg("Top-1 accuracy against parameters", HALF, draw)


class TimedPoint(NamedTuple):
  """A method in the plot of accuracy against time."""

  name: str
  ratio: float  # of the time of a step to solo's
  top1: float | None
  spread: float | None
  colour: str


def accuracy_against_time(points: Sequence[TimedPoint]) -> str:
  """Top-1 against the time of a step.

  Args:
    points: methods; those without an accuracy are left out.

  Returns:
    An <svg> element; "" if there is no point to draw.
  """
  points = [point for point in points if _finite(point.top1)]
  if not points:
    return ""

  def draw(axes: object) -> None:
    for point in points:
      colour = style.placeholder(point.colour)
      axes.errorbar(
        point.ratio,
        point.top1,
        yerr=_bar(point.spread),
        marker="o",
        markersize=8,
        color=colour,
        capsize=3,
      )
      axes.annotate(
        point.name,
        (point.ratio, point.top1),
        xytext=(8, 4),
        textcoords="offset points",
        color=colour,
      )
    axes.margins(x=0.15, y=0.15)
    axes.set_xlabel("time of a step, as a multiple of solo's")

  return _svg("Top-1 accuracy against the time of a step", HALF, draw)


def _svg(name: str, size: tuple[int, int], draw: object) -> str:
  """Draws one pair of axes and returns it as an element for inlining."""
  import matplotlib.style
  from matplotlib.figure import Figure

  ink, muted, grid = map(style.placeholder, ("ink", "muted", "grid"))
  settings = {
    "svg.fonttype": "none",
    "svg.hashsalt": name,
    "text.parse_math": False,
    "text.color": ink,
    "font.size": 12,
    "axes.edgecolor": muted,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.labelcolor": muted,
    "grid.color": grid,
    "grid.linewidth": 1,
    "xtick.color": muted,
    "xtick.minor.visible": False,
    "ytick.color": muted,
    "ytick.left": False,
    "ytick.minor.left": False,
  }
  # "default" first: a matplotlibrc of the user must not reach the page.
  with matplotlib.style.context(["default", settings]):
    figure = Figure(
      figsize=tuple(length / _POINTS_PER_INCH for length in size),
      layout="constrained",
    )
    draw(figure.subplots())
    text = io.StringIO()
    figure.savefig(
      text,
      format="svg",
      transparent=True,
      metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")),
    )
  return style.themed(_inline(text.getvalue(), name))


def _inline(document: str, name: str) -> str:
  """An SVG document as an element of an HTML page.

  Identifiers get the figure's name in front: matplotlib numbers them anew in
  every figure, and a page must not have the same identifier twice. The style
  element goes because it would style the whole page.
  """
  prefix = re.sub(r"\W+", "-", name.lower())
  element = document[document.index("<svg") :]
  element = re.sub(r"<style.*?</style>", "", element, flags=re.DOTALL)
  element = re.sub(r"<!--.*?-->\n?", "", element, flags=re.DOTALL)
  element = re.sub(r'\bid="', f'id="{prefix}-', element)
  element = re.sub(r'xlink:href="#', f'href="#{prefix}-', element)
  element = re.sub(r"url\(#", f"url(#{prefix}-", element)
  view_box = re.search(r'viewBox="[^"]*"', element)[0]
  label = name.replace("&", "&amp;").replace('"', "&quot;")
  return re.sub(
    r"<svg.*?>",
    lambda _: f'<svg {view_box} role="img" aria-label="{label}">',
    element,
    count=1,
    flags=re.DOTALL,
  )


def _epoch_axis(axes: object, lines: Sequence[Line]) -> None:
  from matplotlib.ticker import MaxNLocator

  epochs = [epoch for line in lines for epoch in line.points]
  if min(epochs) == max(epochs):
    axes.set_xlim(epochs[0] - 1, epochs[0] + 1)
  axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
  axes.set_xlabel("epoch")


def _log_axis_if_wide(axes: object, values: Sequence[float]) -> None:
  """A log scale where a linear one would show only the first epochs."""
  if min(values) > 0 and max(values) > 20 * min(values):
    axes.set_yscale("log")
    _log_ticks(axes.yaxis, *axes.get_ylim(), "{:g}".format)


def _size_axis(axes: object, params: list[float]) -> None:
  axes.set_xlabel("parameters (log scale)")
  low, high = axes.get_xlim()
  if min(params) == max(params):
    low, high = params[0] / 3, params[0] * 3
    axes.set_xlim(low, high)
  _log_ticks(axes.xaxis, low, high, formatting.count)


def _log_ticks(axis: object, low: float, high: float, show: object) -> None:
  """Ticks at 1, 2, 5, 10, ...; only at powers of ten if those were many."""
  from matplotlib.ticker import MaxNLocator

  decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
  for steps in ((1, 2, 5), (1, 3), (1,)):
    ticks = [step * 10.0**decade for decade in decades for step in steps]
    ticks = [tick for tick in ticks if low <= tick <= high]
    if len(ticks) <= 6:
      break
  if len(ticks) < 2:  # a narrow range: nearly linear
    ticks = MaxNLocator(4).tick_values(low, high)[1:-1]
  axis.set_ticks(ticks, [show(tick) for tick in ticks])
  axis.set_ticks([], minor=True)


def _label_points(
  axes: object, points: Sequence[Point], ensemble: float | None
) -> None:
  """Writes each point's name beside it, where it covers the least."""
  figure = axes.figure
  figure.draw_without_rendering()  # positions are known only after layout
  scale = _POINTS_PER_INCH / figure.dpi

  def place(x: float, y: float) -> tuple[float, float]:
    left, top = axes.transData.transform((x, y)) * scale
    return left, top

  marks = [place(p.params, p.top1) for p in points]
  marks += [place(p.params, p.solo) for p in points if _finite(p.solo)]
  taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in marks]
  # The lines between points, as small boxes a few pixels apart.
  for ends in itertools.pairwise(marks[: len(points)]):
    for step in range(1, 24):
      x, y = (a + (b - a) * step / 24 for a, b in zip(*ends, strict=True))
      taken.append((x - 2, y - 2, x + 2, y + 2))
  area = [edge * scale for edge in axes.bbox.extents]
  if _finite(ensemble):
    _, level = place(1, ensemble)
    taken.append((area[0], level - 4, area[2], level + 4))
    taken.append((area[0], level, area[0] + 100, level + 18))
  for p, (x, y) in zip(points, marks, strict=False):
    width, height = 6.4 * len(p.name), 13
    corners = [
      # Curves of accuracy rise: above on the left there is most room.
      (x - 5 - width, y + 5),
      (x - width / 2, y + 8),
      (x + 6, y - 6 - height),
      (x - width / 2, y - 8 - height),
      (x - 10 - width, y - height / 2),
      (x + 10, y - height / 2),
    ]
    boxes = [(a, b, a + width, b + height) for a, b in corners]
    best = min(
      boxes,
      key=lambda box: (
        sum(_overlap(box, other) for other in taken)
        + 4 * (width * height - _overlap(box, area))
      ),
    )
    taken.append(best)
    axes.annotate(
      p.name,
      (p.params, p.top1),
      xytext=(best[0] - x, best[1] - y + 3),
      textcoords="offset points",
      color=style.placeholder("ink"),
      fontsize=11.5,
    ).set_in_layout(False)


def _overlap(a: Sequence[float], b: Sequence[float]) -> float:
  """Area that two boxes (left, bottom, right, top) share."""
  width = min(a[2], b[2]) - max(a[0], b[0])
  height = min(a[3], b[3]) - max(a[1], b[1])
  return max(width, 0) * max(height, 0)


def _bar(spread: float | None) -> float | None:
  return spread if _finite(spread) else None


def _finite(value: float | None) -> bool:
  return formatting.is_number(value)


def _positive(value: float | None) -> bool:
  return formatting.is_number(value) and value > 0
