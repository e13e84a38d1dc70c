"""A report as one page of HTML: a picture of the errors over their budgets, and every row."""

import html
import math
from collections.abc import Iterator

from electra_fast.testing.report import RAISED, RIGHT, UNSUPPORTED, WRONG, Report, Row

LEAST, MOST = 1e-3, 1e3  # of the picture's axis; numbers outside are drawn at its ends
LEFT, WIDTH, LINE = 190, 560, 26  # pixels: the labels, the axis, a row of the picture
COLORS = {"float32": "#2b6cb0", "bfloat16": "#2f855a", "float16": "#b7791f"}
OTHER = "#6b46c1"
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a202c }
body { max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums }
td, th { padding: 2px 12px 2px 0; text-align: left; border-bottom: 1px solid #e2e8f0; vertical-align: top }
.wrong, .raised { color: #c53030; font-weight: 600 } .unsupported { color: #718096 }
@media (prefers-color-scheme: dark) {
  body { background: #1a202c; color: #e2e8f0 } td, th { border-color: #4a5568 } svg { background: #fff }
  .wrong, .raised { color: #fc8181 } }
"""


def page(report: Report) -> str:
    """Return the page. It loads nothing from elsewhere."""
    title = html.escape(f"{report.function} as {report.subject}")
    where = html.escape(f"on {report.device}, seed {report.seed}, {report.seconds:.0f} s")
    bad = [row for row in report.rows if row.verdict in (WRONG, RAISED)]
    parts = [f"<h1>{title}</h1><p>{html.escape(report.summary())}; {where}</p>"]
    parts += [f"<p>{html.escape(report.note)}</p>"] if report.note else []
    parts += [picture(report.rows)] if any(row.ratio for row in report.rows) else []
    if bad:
        parts += ["<h2>Wrong</h2>", *(f'<p class="wrong">{html.escape(row.why)}</p>' for row in bad)]
    parts += ["<h2>All rows</h2>", _table(report.rows)]
    head = f'<meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>\n'


def picture(rows: list[Row]) -> str:
    """Return an SVG: a line per quantity, a dot per example at its error over its budget; red is wrong."""
    quantities = list(dict.fromkeys(row.quantity for row in rows if row.ratio))
    height = LINE * (len(quantities) + 2)
    parts = [
        f'<svg viewBox="0 0 {LEFT + WIDTH + 20} {height}" width="100%" role="img" font-size="12" '
        f'font-family="system-ui, sans-serif"><title>error divided by its budget, per quantity</title>'
    ]
    for power in range(round(math.log10(LEAST)), round(math.log10(MOST)) + 1):
        x, budget = _x(10.0**power), power == 0
        stroke = "#c53030" if budget else "#e2e8f0"
        label = "budget" if budget else f"{10.0**power:g}"
        parts.append(f'<line x1="{x:.0f}" x2="{x:.0f}" y1="{LINE}" y2="{height - LINE}" stroke="{stroke}"/>')
        parts.append(f'<text x="{x:.0f}" y="{height - 8}" text-anchor="middle" fill="#4a5568">{label}</text>')
    dtypes = list(dict.fromkeys(row.dtype for row in rows if row.ratio))
    for i, dtype in enumerate(dtypes):
        x, color = LEFT + 100 * i, COLORS.get(dtype, OTHER)
        parts.append(f'<circle cx="{x}" cy="12" r="4" fill="{color}"/>')
        parts.append(f'<text x="{x + 8}" y="16">{dtype}</text>')
    for i, quantity in enumerate(quantities):
        y = LINE * (i + 1.5)
        parts.append(f'<text x="{LEFT - 12}" y="{y + 4}" text-anchor="end">{html.escape(quantity)}</text>')
        parts += _dots([row for row in rows if row.quantity == quantity and row.ratio], y)
    return "".join([*parts, "</svg>"])


def _dots(rows: list[Row], y: float) -> Iterator[str]:
    for row in rows:
        color = COLORS.get(row.dtype, OTHER) if row.verdict == RIGHT else "#c53030"
        said = html.escape(f"{row.example} {row.dtype}: {row.ratio:.3g} of the budget")
        yield (
            f'<circle cx="{_x(row.ratio):.1f}" cy="{y}" r="4" fill="{color}" fill-opacity=".6">'
            f"<title>{said}</title></circle>"
        )


def _x(ratio: float) -> float:
    """Return the position of an error over its budget on the logarithmic axis."""
    share = math.log(min(max(ratio, LEAST), MOST) / LEAST) / math.log(MOST / LEAST)
    return LEFT + WIDTH * share


def _table(rows: list[Row]) -> str:
    order = (WRONG, RAISED, RIGHT, UNSUPPORTED)
    head = ("example", "dtype", "quantity", "verdict", "error", "budget", "ratio", "why")
    lines = ["".join(f"<th>{name}</th>" for name in head)]
    for row in sorted(rows, key=lambda row: (order.index(row.verdict), -(row.ratio or 0))):
        numbers = ("" if x is None else f"{x:.3g}" for x in (row.error, row.budget, row.ratio))
        cells = (row.example, row.dtype, row.quantity, row.verdict, *numbers, row.why)
        lines.append("".join(f'<td class="{row.verdict}">{html.escape(cell)}</td>' for cell in cells))
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"
