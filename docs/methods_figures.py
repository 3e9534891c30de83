"""Draws the pictures of docs/methods.md, one SVG for each method.

    python docs/methods_figures.py

writes docs/methods/METHOD.svg. Solid arrows are the forward pass, dashed ones
say who teaches whom, under the name that the term has in metrics.jsonl. What is
shipped has a heavy green frame.
"""

import pathlib
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

WIDTH = 720
_LINE = 18  # From line to line of a text.

_PAPER, _INK, _TEACHES, _SHIPPED = "#fbfaf7", "#26303a", "#b03a2e", "#1e7b45"
_FILLS = {
  "shared": "#cfdff0",
  "private": "#ffffff",
  "training": "#fbe8c3",
  "plain": _PAPER,
}
_STYLE = f"""
text {{ font: 14px system-ui, "DejaVu Sans", sans-serif; fill: {_INK};
  text-anchor: middle; dominant-baseline: central; }}
.small {{ font-size: 13px; }}
.left {{ text-anchor: start; }}
.teaches {{ fill: {_TEACHES}; font-size: 13px; }}
rect {{ stroke: {_INK}; stroke-width: 1.3; }}
.shipped {{ stroke: {_SHIPPED}; stroke-width: 3.5; }}
path.line {{ fill: none; stroke: {_INK}; stroke-width: 1.4;
  marker-end: url(#ink); }}
path.dashed {{ fill: none; stroke: {_TEACHES}; stroke-width: 1.6;
  stroke-dasharray: 6 4; marker-end: url(#red); }}
path.both {{ marker-start: url(#red); }}
path.dotted {{ stroke-dasharray: 1.5 3.5; stroke-linecap: round; }}
"""


class Point(NamedTuple):
  """A place in the picture, in pixels from its left and upper side."""

  x: float
  y: float


class Box(NamedTuple):
  """A rectangle that arrows begin and end at."""

  x: float
  y: float
  width: float
  height: float

  def left(self, part: float = 0.5) -> Point:
    """The point at this part of the left side, from above."""
    return Point(self.x, self.y + part * self.height)

  def right(self, part: float = 0.5) -> Point:
    """The point at this part of the right side, from above."""
    return Point(self.x + self.width, self.y + part * self.height)

  def top(self, part: float = 0.5) -> Point:
    """The point at this part of the upper side, from the left."""
    return Point(self.x + part * self.width, self.y)

  def bottom(self, part: float = 0.5) -> Point:
    """The point at this part of the lower side, from the left."""
    return Point(self.x + part * self.width, self.y + self.height)


class Figure:
  """An SVG that is being drawn."""

  def __init__(self, title: str):
    self._title = title
    self._parts: list[str] = []
    self._kinds: set[str] = set()

  def box(
    self,
    x: float,
    y: float,
    width: float,
    height: float,
    text: str,
    kind: str = "private",
    *,
    shipped: bool = False,
  ) -> Box:
    """Draws a box with a text of one or more lines in its middle."""
    self._kinds.add(kind)
    which = ' class="shipped"' if shipped else ""
    self._parts.append(
      f'<rect{which} x="{x}" y="{y}" width="{width}" height="{height}"'
      f' rx="5" fill="{_FILLS[kind]}"/>'
    )
    self.text(Point(x + width / 2, y + height / 2), text)
    return Box(x, y, width, height)

  def text(self, middle: Point, text: str, kind: str = "") -> None:
    """Writes lines around a point; kind "left" begins them there."""
    lines = text.split("\n")
    which = f' class="{kind}"' if kind else ""
    for index, line in enumerate(lines):
      y = middle.y + (index - (len(lines) - 1) / 2) * _LINE
      self._parts.append(
        f'<text{which} x="{middle.x:g}" y="{y:g}">{escape(line)}</text>'
      )

  def forward(self, *points: Point) -> None:
    """Draws an arrow of the forward pass."""
    self._path("line", points)

  def mean(self, *points: Point) -> None:
    """Draws an arrow from parameters to their running mean."""
    self._path("line dotted", points)

  def teaches(self, *points: Point, both: bool = False) -> None:
    """Draws an arrow from a teacher to who learns; `both` ways if asked."""
    self._path("dashed both" if both else "dashed", points)

  def term(self, middle: Point, name: str) -> None:
    """Writes the name of a loss term."""
    self.text(middle, name, "teaches")

  def svg(self, height: float) -> str:
    """The file, with what the colours mean below the picture."""
    self._legend(height - 24)
    return "\n".join(
      [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}"'
        f' height="{height}" viewBox="0 0 {WIDTH} {height}" role="img">',
        f"<title>{escape(self._title)}</title>",
        f"<style>{_STYLE}</style>",
        f"<defs>{_marker('ink', _INK)}{_marker('red', _TEACHES)}</defs>",
        f'<rect x="1" y="1" width="{WIDTH - 2}" height="{height - 2}" rx="9"'
        f' fill="{_PAPER}" style="stroke: #d9d5ca"/>',
        *self._parts,
        "</svg>\n",
      ]
    )

  def _path(self, kind: str, points: Sequence[Point]) -> None:
    steps = " L".join(f"{x:g} {y:g}" for x, y in points)
    self._parts.append(f'<path class="{kind}" d="M{steps}"/>')

  def _legend(self, y: float) -> None:
    x = 16
    for name, kind, shipped in (
      ("shared", "shared", False),
      ("private", "private", False),
      ("training only", "training", False),
      ("may be shipped", "plain", True),
    ):
      if kind in self._kinds:
        self.box(x, y - 8, 22, 16, "", kind, shipped=shipped)
        self.text(Point(x + 30, y), name, "small left")
        x += 48 + 7 * len(name)
    self.forward(Point(x, y), Point(x + 26, y))
    self.text(Point(x + 34, y), "forward", "small left")
    self.teaches(Point(x + 100, y), Point(x + 126, y))
    self.text(Point(x + 134, y), "teaches", "small left")


def ekd() -> str:
  """Ensemble distillation: a stem, branches, the mean of their logits."""
  figure = Figure("EKD: members of several widths share a stem")
  images = figure.box(16, 131, 66, 50, "images", "plain")
  stem = figure.box(106, 121, 62, 70, "stem", "shared", shipped=True)
  ensemble = figure.box(
    598, 30, 106, 252, "ensemble:\nmean of\nall logits", "training"
  )
  figure.forward(images.right(), stem.left())
  rows = []
  # The full network in the middle: its maps teach upwards and downwards.
  for name, y, height in (
    ("student_1", 38, 40),
    ("student_0", 124, 64),
    ("student_2", 234, 34),
  ):
    blocks = [
      figure.box(x, y, 72, height, f"block_{b}", shipped=True)
      for b, x in enumerate((212, 304, 396))
    ]
    rows.append(blocks)
    middle = y + height / 2
    turn = Point(190, stem.right().y)
    figure.forward(stem.right(), turn, Point(turn.x, middle), blocks[0].left())
    for before, after in zip(blocks, blocks[1:], strict=False):
      figure.forward(before.right(), after.left())
    end = blocks[-1].right().x
    figure.forward(Point(end, middle - 7), Point(ensemble.x, middle - 7))
    figure.teaches(Point(ensemble.x, middle + 7), Point(end, middle + 7))
    figure.text(Point((end + ensemble.x) / 2, middle - 20), name)
    figure.term(Point((end + ensemble.x) / 2, middle + 20), "distill")
  above, full, below = rows
  for thin, mine, target in zip(above, full, below, strict=True):
    figure.teaches(mine.top(), thin.bottom())
    figure.teaches(mine.bottom(), target.top())
  for y in (101, 211):
    for x in (294, 386):
      figure.term(Point(x, y), "feature")
  return figure.svg(336)


def dml() -> str:
  """Mutual learning: whole networks, each a teacher of the others."""
  figure = Figure("DML: whole networks learn from each other")
  images = figure.box(16, 116, 76, 50, "images", "plain")
  outputs = []
  for index, y in enumerate((24, 116, 208)):
    network = figure.box(
      190, y, 200, 50, f"student_{index}\na whole network", shipped=True
    )
    logits = figure.box(472, y, 76, 50, f"logits {index}", "plain")
    figure.forward(
      images.right(), Point(140, 141), Point(140, y + 25), network.left()
    )
    figure.forward(network.right(), logits.left())
    outputs.append(logits)
  first, second, third = outputs
  figure.teaches(first.bottom(), second.top(), both=True)
  figure.teaches(second.bottom(), third.top(), both=True)
  figure.teaches(
    first.right(),
    Point(620, first.right().y),
    Point(620, third.right().y),
    third.right(),
    both=True,
  )
  for point in (Point(542, 95), Point(542, 187), Point(654, 141)):
    figure.term(point, "mutual")
  return figure.svg(312)


def ffl() -> str:
  """Feature fusion: the last maps of all networks make one classifier."""
  figure = Figure("FFL: a classifier of fused maps teaches the networks")
  images = figure.box(16, 118, 64, 50, "images", "plain")
  lower = figure.box(
    100, 103, 92, 80, "all but the\nlast stage", "shared", shipped=True
  )
  fusion = figure.box(312, 118, 72, 50, "fusion\nmodule", "training")
  fused = figure.box(414, 113, 96, 60, "ensemble:\nfused logits", "training")
  mean = figure.box(642, 113, 62, 60, "mean\nlogits", "training")
  figure.forward(images.right(), lower.left())
  figure.forward(fusion.right(), fused.left())
  figure.teaches(mean.left(), fused.right())
  figure.term(Point(576, 131), "distill/ensemble")
  for index, y in enumerate((24, 212)):
    upper = figure.box(
      210, y, 96, 50, f"student_{index}\nlast stage", shipped=True
    )
    logits = figure.box(424, y, 76, 50, f"logits {index}", "plain")
    middle = y + 25
    if index == 0:
      ends = lower.top(), fusion.top(), fused.top(), mean.top()
      learns = logits.bottom()
    else:
      ends = lower.bottom(), fusion.bottom(), fused.bottom(), mean.bottom()
      learns = logits.top()
    start, maps, teacher, together = ends
    figure.forward(start, Point(start.x, middle), upper.left())
    figure.forward(upper.right(), logits.left())
    figure.forward(Point(maps.x, middle), maps)
    figure.text(Point(maps.x + 9, (middle + maps.y) / 2), "maps", "small left")
    figure.forward(logits.right(), Point(together.x, middle), together)
    figure.teaches(teacher, learns)
    figure.term(
      Point(532, (teacher.y + learns.y) / 2), f"distill/student_{index}"
    )
  return figure.svg(322)


def pcl() -> str:
  """Peer collaborative learning: an ensemble and running means teach."""
  figure = Figure("PCL: a peer ensemble and peer mean teachers")
  images = figure.box(16, 86, 66, 50, "images", "plain")
  lower = figure.box(
    212, 24, 92, 174, "all but the\nlast stage,\none pass\nper view", "shared"
  )
  ensemble = figure.box(
    598,
    24,
    106,
    174,
    "ensemble:\na classifier\nof all pooled\nmaps",
    "training",
  )
  for index, y in enumerate((24, 90, 156)):
    view = figure.box(116, y, 70, 42, f"view {index}", "plain")
    peer = figure.box(334, y, 108, 42, f"peer_{index}\nlast stage")
    middle = y + 21
    figure.forward(
      images.right(), Point(98, 111), Point(98, middle), view.left()
    )
    figure.forward(view.right(), Point(lower.x, middle))
    figure.forward(Point(lower.right().x, middle), peer.left())
    figure.forward(Point(442, y + 11), Point(ensemble.x, y + 11))
    figure.teaches(Point(ensemble.x, y + 27), Point(442, y + 27))
    figure.term(Point(520, y + 40), "distill")
  figure.text(
    Point(16, 306),
    "The same peers,\nand running\nmeans of their\nparameters, with\n"
    "shared layers of\ntheir own:",
    "small left",
  )
  peers, means = [], []
  for index, y in enumerate((246, 306, 366)):
    peers.append(figure.box(166, y - 21, 84, 42, f"peer_{index}"))
    means.append(
      figure.box(
        544, y - 21, 160, 42, f"student_{index}\nmean teacher", shipped=True
      )
    )
  for index, (peer, mean) in enumerate(zip(peers, means, strict=True)):
    figure.mean(peer.right(), mean.left())
    # Arrows to the others; each has an end of its own on both sides.
    for other, learner in enumerate(peers):
      if other != index:
        start, end = (0.8, 0.2) if other > index else (0.2, 0.8)
        if abs(other - index) == 1 and index != 1:
          start = 0.65 if other > index else 0.35
        if abs(other - index) == 1 and other != 1:
          end = 0.35 if other > index else 0.65
        figure.teaches(mean.left(start), learner.right(end))
  figure.text(Point(397, 234), "running mean", "small")
  figure.term(Point(397, 380), "mean_teacher")
  return figure.svg(436)


def ffsd() -> str:
  """Feature fusion and self-distillation: common students and a leader."""
  figure = Figure("FFSD: common students and their fused maps teach a leader")
  images = figure.box(14, 92, 62, 50, "images", "plain")
  first = figure.box(112, 20, 150, 56, "common_0")
  second = figure.box(112, 158, 150, 56, "common_1")
  joined = figure.box(284, 92, 62, 50, "joined\nmaps", "training")
  fusion = figure.box(366, 92, 70, 50, "fusion\nmodule", "training")
  fused = figure.box(470, 88, 96, 58, "ensemble:\nfused logits", "training")
  mean = figure.box(646, 92, 60, 50, "mean\nlogits", "training")
  decoder = figure.box(112, 262, 150, 40, "decoder", "training")
  shallow = figure.box(
    112, 362, 150, 50, "student_0 (leader)\nshallow stages", shipped=True
  )
  last = figure.box(356, 362, 90, 50, "student_0\nlast stage", shipped=True)
  logits = figure.box(480, 362, 76, 50, "logits", "plain")
  spread = figure.box(284, 446, 88, 36, "spread", "training")

  for network in (first, second, shallow):
    end = network.left()
    figure.forward(images.right(), Point(94, 117), Point(94, end.y), end)
  figure.forward(first.right(0.8), Point(315, first.right(0.8).y), joined.top())
  figure.forward(
    second.right(0.2),
    Point(joined.bottom(0.3).x, second.right(0.2).y),
    joined.bottom(0.3),
  )
  figure.forward(first.right(0.25), Point(676, first.right(0.25).y), mean.top())
  figure.forward(
    second.right(0.75), Point(676, second.right(0.75).y), mean.bottom()
  )
  figure.text(Point(290, 55), "maps", "small")
  figure.text(Point(290, 23), "logits", "small")
  figure.forward(joined.right(), fusion.left())
  figure.forward(fusion.right(), fused.left())
  figure.forward(shallow.right(), last.left())
  figure.forward(last.right(), logits.left())
  figure.forward(
    fusion.bottom(0.25), Point(fusion.bottom(0.25).x, 282), decoder.right()
  )
  figure.forward(last.bottom(), Point(last.bottom().x, 464), spread.right())

  figure.teaches(first.bottom(0.08), second.top(0.08), both=True)
  figure.teaches(first.bottom(0.48), second.top(0.48))
  figure.term(Point(154, 117), "mutual")
  figure.term(Point(232, 108), "diversity")
  figure.term(Point(232, 126), "self_distill")
  figure.teaches(mean.left(), fused.right())
  figure.term(Point(606, 78), "fused_distill")
  figure.teaches(decoder.bottom(0.68), shallow.top(0.68))
  figure.term(Point(262, 332), "self_distill")
  figure.teaches(shallow.top(0.2), decoder.bottom(0.2))
  figure.term(Point(178, 332), "decoder")
  figure.teaches(fusion.bottom(0.75), Point(fusion.bottom(0.75).x, last.y))
  figure.term(Point(464, 250), "fused_maps")
  figure.teaches(fused.bottom(), logits.top())
  figure.term(Point(548, 290), "distill")
  figure.teaches(joined.bottom(0.7), Point(joined.bottom(0.7).x, spread.y))
  figure.term(Point(290, 428), "all_maps")
  return figure.svg(540)


def _marker(name: str, colour: str) -> str:
  return (
    f'<marker id="{name}" viewBox="0 0 10 10" refX="9.5" refY="5"'
    ' markerUnits="userSpaceOnUse" markerWidth="10" markerHeight="10"'
    ' orient="auto-start-reverse">'
    f'<path d="M0 1 L10 5 L0 9 z" fill="{colour}"/></marker>'
  )


def main() -> None:
  """Writes all pictures."""
  folder = pathlib.Path(__file__).parent / "methods"
  folder.mkdir(exist_ok=True)
  for draw in (ekd, dml, ffl, pcl, ffsd):
    (folder / f"{draw.__name__}.svg").write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
  main()
