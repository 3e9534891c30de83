"""Pieces of the HTML pages. What comes from a run directory is escaped."""

import html
import re
from collections.abc import Iterable, Mapping

from ekd_jax.report import formatting, style


def document(title: str, body: str) -> str:
  """A whole page, with its style; nothing is fetched from anywhere."""
  return (
    '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    f"<title>{html.escape(title)}</title>\n"
    f"<style>\n{style.stylesheet()}</style>\n</head>\n"
    f"<body>\n{body}\n</body>\n</html>\n"
  )


def class_of(name: str) -> str:
  return f' class="{name}"' if name else ""


def swatch(colour: str) -> str:
  return f'<span class="swatch" style="color:var(--{colour})"></span>'


def prose(text: str) -> str:
  """Escapes a sentence and keeps a number and its unit on one line."""
  return re.sub(r"(?<=\d) (?=[kMG]\b|%)", "&nbsp;", html.escape(text))


def panel(title: str, drawn: str, caption: str) -> str:
  if not drawn:
    return ""
  text = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
  return f"<figure>\n<h3>{html.escape(title)}</h3>\n{drawn}{text}\n</figure>\n"


def grid(panels: Iterable[str], *, small: bool = False) -> str:
  content = "".join(panels)
  kind = "grid small" if small else "grid"
  return f'<div class="{kind}">\n{content}</div>\n' if content else ""


def section(title: str, content: str) -> str:
  return f"<section>\n<h2>{html.escape(title)}</h2>\n{content}\n</section>"


def figures_table(head: str, rows: list[str]) -> str:
  return (
    '<div class="scroll"><table class="figures">\n'
    f"<thead><tr>{head}</tr></thead>\n"
    f"<tbody>\n{chr(10).join(rows)}\n</tbody>\n</table></div>\n"
  )


def facts(values: Mapping[str, object]) -> str:
  rows = "\n".join(
    f"<tr><td>{html.escape(name)}</td>"
    f"<td>{html.escape(formatting.plain(value))}</td></tr>"
    for name, value in values.items()
  )
  return f'<table class="facts"><tbody>\n{rows}\n</tbody></table>'
