"""A report as one page of HTML: a picture of the errors over their budgets, and every row."""

import math
from collections.abc import Iterator
from html import escape

from electra_fast import pages
from electra_fast.testing.report import RAISED, RIGHT, UNSUPPORTED, WRONG, Report, Row

LEAST, MOST = 1e-3, 1e3  # of the picture's axis; numbers outside are drawn at its ends
LEFT, WIDTH, LINE = 190, 560, 26  # pixels: the labels, the axis, a row of the picture
COLOURS = {"float32": "blue", "bfloat16": "green", "float16": "purple"}
OTHER = "grey"


def page(report: Report) -> str:
    """Return the page. It loads nothing from elsewhere."""
    where = f"on {report.device}, seed {report.seed}, {report.seconds:.0f} s"
    bad = [row for row in report.rows if row.verdict in (WRONG, RAISED)]
    parts = [f"<p>{escape(f'{report.summary()}; {where}')}</p>"]
    parts += [f"<p>{escape(report.note)}</p>"] if report.note else []
    parts += [picture(report.rows)] if any(row.ratio for row in report.rows) else []
    if bad:
        parts += ["<h2>Wrong</h2>", *(f'<p class="wrong">{escape(row.why)}</p>' for row in bad)]
    parts += ["<h2>All rows</h2>", _table(report.rows)]
    return pages.document(f"{report.function} as {report.subject}", parts)


def picture(rows: list[Row]) -> str:
    """Return an SVG: a line per quantity, a dot per example at its error over its budget."""
    quantities = list(dict.fromkeys(row.quantity for row in rows if row.ratio))
    height = LINE * (len(quantities) + 2)
    parts = [
        f'<svg viewBox="0 0 {LEFT + WIDTH + 20} {height}" width="100%" role="img">'
        "<title>error divided by its budget, per quantity</title>"
    ]
    for power in range(round(math.log10(LEAST)), round(math.log10(MOST)) + 1):
        x, budget = _x(10.0**power), power == 0
        stroke = 'class="vermilion" stroke="currentColor"' if budget else 'class="grid"'
        label = "budget" if budget else f"{10.0**power:g}"
        parts.append(f'<line x1="{x:.0f}" x2="{x:.0f}" y1="{LINE}" y2="{height - LINE}" {stroke}/>')
        parts.append(f'<text x="{x:.0f}" y="{height - 8}" text-anchor="middle">{label}</text>')
    dtypes = list(dict.fromkeys(row.dtype for row in rows if row.ratio))
    for i, dtype in enumerate(dtypes):
        x, colour = LEFT + 100 * i, COLOURS.get(dtype, OTHER)
        parts.append(f'<circle cx="{x}" cy="12" r="4" class="{colour}" fill="currentColor"/>')
        parts.append(f'<text x="{x + 8}" y="16">{dtype}</text>')
    for i, quantity in enumerate(quantities):
        y = LINE * (i + 1.5)
        parts.append(f'<text x="{LEFT - 12}" y="{y + 4}" text-anchor="end">{escape(quantity)}</text>')
        parts += _dots([row for row in rows if row.quantity == quantity and row.ratio], y)
    return "".join([*parts, "</svg>"])


def _dots(rows: list[Row], y: float) -> Iterator[str]:
    for row in rows:
        colour = COLOURS.get(row.dtype, OTHER) if row.verdict == RIGHT else "vermilion"
        said = escape(f"{row.example} {row.dtype}: {row.ratio:.3g} of the budget")
        yield (
            f'<circle cx="{_x(row.ratio):.1f}" cy="{y}" r="4" class="{colour}" fill="currentColor" '
            f'fill-opacity=".6"><title>{said}</title></circle>'
        )


def _x(ratio: float) -> float:
    """Return the position of an error over its budget on the logarithmic axis."""
    share = math.log(min(max(ratio, LEAST), MOST) / LEAST) / math.log(MOST / LEAST)
    return LEFT + WIDTH * share


def _table(rows: list[Row]) -> str:
    order = (WRONG, RAISED, RIGHT, UNSUPPORTED)
    head = ("example", "dtype", "quantity", "verdict", "error", "budget", "ratio", "why")
    lines = []
    for row in sorted(rows, key=lambda row: (order.index(row.verdict), -(row.ratio or 0))):
        numbers = ("" if x is None else f"{x:.3g}" for x in (row.error, row.budget, row.ratio))
        lines.append((row.example, row.dtype, row.quantity, row.verdict, *numbers, row.why))
    return pages.table(head, lines, style=lambda cells: cells[head.index("verdict")])
