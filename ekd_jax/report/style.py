"""How the page looks: colours, typography, layout.

Colours are named. The page defines each name as a CSS variable, once for a
light screen (and paper) and once for a dark one. Figures are drawn in
placeholder colours that `themed` turns into references to those variables,
so that an inline figure follows the reader's theme as text does.

The colours of members are told apart by people with the common forms of
colour blindness too (after Okabe and Ito, 2008), and no figure needs them
alone: dashes tell the solo curves, text labels the points.
"""

import re

# name: (light, dark)
_COLOURS = {
  "paper": ("#ffffff", "#14171a"),
  "panel": ("#f5f6f7", "#1d2125"),
  "ink": ("#1b1f23", "#e6e8ea"),
  "muted": ("#5f6871", "#9aa4ad"),
  "grid": ("#e0e3e6", "#31373d"),
  "good": ("#11734b", "#54c797"),
  "bad": ("#b3261e", "#f2877f"),
  "warning": ("#fdf3dc", "#3a2f14"),
  "warning-edge": ("#d99a1c", "#d9a441"),
  "series-0": ("#0b62a3", "#5aaeea"),
  "series-1": ("#d3660a", "#f0924a"),
  "series-2": ("#0f8a67", "#3fc79d"),
  "series-3": ("#b24a8c", "#e28fc0"),
  "series-4": ("#8a7300", "#d6bd3f"),
  "series-5": ("#2f9fd0", "#8fd3f2"),
  "series-6": ("#a3302b", "#ef7b74"),
  "series-7": ("#6250b5", "#a99bf0"),
}
_NAMES = list(_COLOURS)
_SERIES = [name for name in _NAMES if name.startswith("series-")]


def series(index: int) -> str:
  """The colour name of the index-th member; they repeat after eight."""
  return _SERIES[index % len(_SERIES)]


def placeholder(name: str) -> str:
  """The colour to draw with where the page is to show the named colour."""
  return f"#fe01{_NAMES.index(name):02x}"


def themed(svg: str) -> str:
  """Placeholder colours replaced by the page's variables."""
  return re.sub(
    r"#fe01([0-9a-f]{2})",
    lambda match: f"var(--{_NAMES[int(match[1], 16)]})",
    svg,
  )


def stylesheet() -> str:
  """The CSS of the page."""
  light, dark = (
    "".join(f"--{name}:{pair[i]};" for name, pair in _COLOURS.items())
    for i in (0, 1)
  )
  return (
    f":root{{color-scheme:light dark;{light}}}\n"
    # Only screens go dark: paper stays white whatever the screen's theme.
    f"@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}\n"
    f"{_LAYOUT}"
  )


_LAYOUT = """
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 70rem;
  background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans",
    "Liberation Sans", Helvetica, Arial, sans-serif;
}
.subject { margin: 0 0 .5rem; color: var(--muted); }
h1 {
  margin: 0 0 1rem; max-width: 46rem; font-size: 1.7rem; line-height: 1.25;
  font-weight: 650; letter-spacing: -.01em; text-wrap: balance;
}
h2 { margin: 3rem 0 .75rem; font-size: 1.2rem; font-weight: 650; }
h3 { margin: 1.5rem 0 .5rem; font-size: 1rem; font-weight: 650; }
p { margin: 0 0 .6rem; max-width: 46rem; }
a { color: var(--series-0); }
.note { color: var(--muted); font-size: .875rem; }
.warning {
  margin: 1rem 0; padding: .7rem 1rem; max-width: 46rem;
  background: var(--warning); border-left: 4px solid var(--warning-edge);
}
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; }
th, td { padding: .4rem .6rem; text-align: left; vertical-align: top; }
th { color: var(--muted); font-weight: 500; }
tbody tr { border-top: 1px solid var(--grid); }
.figures th, .figures td {
  text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums;
}
.figures { width: 100%; }
.figures th { white-space: pre-line; vertical-align: bottom; }
.figures th:first-child, .figures td:first-child {
  padding-left: 0; text-align: left;
}
.figures tr.ensemble { border-top: 2px solid var(--muted); }
.good { color: var(--good); }
.bad { color: var(--bad); }
.swatch {
  display: inline-block; width: .7em; height: .7em; margin-right: .5em;
  border-radius: 50%; background: currentColor;
}
.legend {
  display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; margin: 0 0 1rem;
  padding: 0; list-style: none; font-size: .875rem;
}
.legend .line {
  display: inline-block; width: 1.6em; margin-right: .45em;
  vertical-align: middle; border-top: 2.5px solid currentColor;
}
.legend .dashed { border-top: 2px dashed var(--muted); }
.grid { display: grid; gap: 2rem; grid-template-columns: 1fr; }
@media (min-width: 50rem) {
  .grid { grid-template-columns: 1fr 1fr; }
  .grid.small { grid-template-columns: 1fr 1fr 1fr; }
}
.grid > * { min-width: 0; }
figure { margin: 0; break-inside: avoid; }
figure h3 { margin: 0 0 .25rem; }
figcaption { color: var(--muted); font-size: .8125rem; line-height: 1.4; }
svg { display: block; width: 100%; height: auto; }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
svg text { font-family: inherit !important; }
pre {
  margin: 0 0 1rem; padding: .8rem 1rem; background: var(--panel);
  font: .8125rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas,
    "Liberation Mono", monospace;
  white-space: pre-wrap; overflow-wrap: anywhere;
}
.facts { width: 100%; table-layout: fixed; }
.facts td { padding: .25rem .5rem .25rem 0; overflow-wrap: anywhere; }
.facts td:first-child { width: 45%; color: var(--muted); }
@media print {
  body { max-width: none; padding: 0; font-size: 10pt; }
  h2, h3, .legend { break-after: avoid; }
  .grid { grid-template-columns: 1fr 1fr; }
  pre, .warning { print-color-adjust: exact; }
}
"""
