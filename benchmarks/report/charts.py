"""Charts that several sections use: ratios to fused, and shares of a limit."""

from benchmarks.report.html import paragraph
from benchmarks.report.losses import Comparison
from benchmarks.report.runs import case
from benchmarks.report.svg import Mark, Row, Tint, around, dots

FASTER = "fused is this many times as fast (logarithmic)"
SLOWER = Tint("others are faster", 1, below=True)


def names(group: str) -> tuple[str, str]:
    """Return the title of a group's row, and its size."""
    op, size, _ = case(group)
    return "training step" if op == "step" else op, size


def ratio_chart(found: list[Comparison]) -> str:
    """Return a chart with one row per case and one mark per provider, with its spread."""
    if not found:
        return paragraph("In this run no other provider was timed together with fused.")
    rows: dict[str, Row] = {}
    for c in found:
        row = rows.setdefault(c.group, Row(*names(c.group), []))
        row.marks.append(Mark(c.provider, c.ratio, f"{c.ratio:.2f}", *(c.spread or (None, None))))
    ends = [x for c in found for x in (c.ratio, *(c.spread or ()))]
    return dots(list(rows.values()), around(FASTER, ends, least=0.5), SLOWER)


def spread_note(found: list[Comparison]) -> str:
    if any(c.spread for c in found):
        return "A bar spans the 20th to the 80th percentile of the ratios of single rounds."
    return "These results do not contain the spread of the ratios."


def share_chart(shares: dict[str, dict[str, float]], unit: str, beyond: str) -> str:
    """Return a chart of shares by group and provider; `beyond` names the area above 100 per cent."""
    rows = [
        Row(*names(group), [Mark(p, 100 * s, f"{s:.1%}", 0, 100 * s) for p, s in of.items()])
        for group, of in shares.items()
    ]
    most = [100.0, *(mark.value for row in rows for mark in row.marks)]
    return dots(rows, around(f"per cent of {unit}", most, log=False), Tint(beyond, 100, below=False))
