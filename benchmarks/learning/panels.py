"""A picture of learning curves: two panels in each row."""

import itertools
import math
from typing import Any, NamedTuple

from benchmarks.report import picture, svg

WIDTH, HEIGHT = 410, 290  # pixels of a panel with its margins
INNER = 388  # pixels: the width of its chart


class Panel(NamedTuple):
    title: str
    curves: list[svg.Curve]
    across: svg.Axis
    level: float  # of a dotted line


def by_tokens(curve: list[dict[str, Any]], name: str, *ends: str) -> list[svg.Point]:
    """Return a metric of a run by million tokens; `ends` are the names of its interval's ends."""
    return [
        svg.Point(p["tokens"] / 1e6, p[name], *(p[e] for e in ends)) for p in curve if p[name] is not None
    ]


def drawn(legend: str, panels: list[Panel]) -> str:
    """Return the picture as SVG."""
    parts = [picture.text(16, 24, legend)]
    for number, (title, curves, across, level) in enumerate(panels):
        ends = [(p.y, p.low or p.y, p.high or p.y) for curve in curves for p in curve.points]
        axis = svg.close_to(title, [level, *itertools.chain(*ends)])
        dotted = svg.Curve("grey dotted", [svg.Point(x, level) for x in (across.low, across.high)])
        left, top = 16 + WIDTH * (number % 2), 60 + HEIGHT * (number // 2)
        lines = svg.curves([*curves, dotted], across, axis)
        parts.append(picture.text(left, top, title, "ink"))
        parts.append(picture.box(left, top + 10, INNER, svg.HEIGHT, lines))
        parts.append(picture.box(left, top + 10 + svg.HEIGHT, INNER, 20, svg.labels(across)))
        parts.append(picture.text(left + INNER, top + svg.HEIGHT + 44, across.title, anchor="end"))
    return picture.document(60 + HEIGHT * math.ceil(len(panels) / 2), parts, "light")
