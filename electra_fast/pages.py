"""Pages of HTML that load nothing from elsewhere: their style, for light and dark screens, and tables."""

import math
from collections.abc import Callable, Iterable, Sequence
from html import escape

# The colours are Okabe and Ito's palette, which colour-blind readers can tell apart.
STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fdfcfa; --ink: #1d1d1f; --soft: #5c5c63; --rule: #d9d7d2; --blue: #0072b2; --sky: #2b8fc9;
  --vermilion: #d55e00; --green: #00835d; --orange: #b87700; --purple: #b0568c; --grey: #77777d;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #17181b; --ink: #e8e6e1; --soft: #a5a39d; --rule: #393a40; --blue: #58aef0; --sky: #8fd0f5;
    --vermilion: #f58143; --green: #3fc79a; --orange: #efb13a; --purple: #dd9cc4; --grey: #97979d;
  }
}
body { margin: 0 auto; max-width: 62rem; padding: 2rem 1.25rem 4rem; font: 16px/1.5 system-ui, sans-serif }
body { background: var(--paper); color: var(--ink) }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .5rem }
h2 { font-size: 1.25rem; margin: 2rem 0 0; padding-top: 1rem; border-top: 1px solid var(--rule) }
h3 { font-size: 1rem; margin: 1.5rem 0 0 }
p { margin: .5rem 0; max-width: 46rem; overflow-wrap: anywhere }
.scroll { overflow-x: auto }
table { border-collapse: collapse; margin: .5rem 0; font-size: 13px; font-variant-numeric: tabular-nums }
th, td { padding: 3px 14px 3px 0; text-align: left; border-bottom: 1px solid var(--rule) }
th { color: var(--soft); font-weight: 600; vertical-align: bottom }
td { vertical-align: top; overflow-wrap: anywhere }
th.number, td.number { text-align: right; white-space: nowrap }
.wrong, .raised { color: var(--vermilion); font-weight: 600 }
.unsupported { color: var(--soft) }
svg text { fill: var(--soft); font: 12px system-ui, sans-serif; font-variant-numeric: tabular-nums }
.grid { stroke: var(--rule) }
.blue { color: var(--blue) } .sky { color: var(--sky) } .vermilion { color: var(--vermilion) }
.green { color: var(--green) } .orange { color: var(--orange) } .purple { color: var(--purple) }
.grey { color: var(--grey) }
"""

Cell = str | float | None


def document(title: str, parts: Iterable[str], style: str = "") -> str:
    """Return a page.

    Args:
        title: text, also the heading.
        parts: HTML.
        style: CSS in addition to `STYLE`.
    """
    title = escape(title)
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}{style}</style>"
    )
    body = f"<h1>{title}</h1>{''.join(parts)}"
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{body}</body></html>\n'


def table(
    head: Sequence[str], rows: Sequence[Sequence[Cell]], style: Callable[[Sequence[Cell]], str] | None = None
) -> str:
    """Return a table, which scrolls if it is wider than the screen. A column without texts is aligned right.

    Args:
        head: the names of the columns.
        rows: the same number of texts or numbers in each row.
        style: returns the class of the cells of a row.
    """
    columns = zip(*rows, strict=True)
    right = ["" if any(isinstance(cell, str) for cell in column) else " number" for column in columns]
    lines = [_row("th", head, right)]
    for row in rows:
        lines.append(_row("td", row, [f"{style(row)}{each}" for each in right] if style else right))
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'


def _row(tag: str, cells: Sequence[Cell], classes: Sequence[str]) -> str:
    found = (
        f'<{tag} class="{name.strip()}">{escape(text_of(cell))}</{tag}>'
        for cell, name in zip(cells, classes, strict=True)
    )
    return f"<tr>{''.join(found)}</tr>"


def text_of(cell: Cell) -> str:
    """Return a text unchanged, an integer with all its digits, another number with four.

    A number that is None or not finite is a dash.
    """
    if isinstance(cell, str):
        return cell
    if cell is None or not math.isfinite(cell):
        return "\N{EN DASH}"
    decimals = 0 if isinstance(cell, int) else max(0, 4 - len(f"{abs(cell):.0f}"))
    return f"{cell:,.{decimals}f}".replace(",", "\N{NARROW NO-BREAK SPACE}")
