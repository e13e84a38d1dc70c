"""Charts as HTML rows with inline SVG. Coordinates are percentages and text has a fixed size, at any width.

Each provider has a colour (from Okabe and Ito's palette) and a shape; its name is next to its value.
"""

import itertools
import math
import zlib
from collections.abc import Iterable
from html import escape
from typing import NamedTuple

from benchmarks.harness.providers import in_order, label
from benchmarks.report.numbers import digits

LANE = 19  # pixels per mark
HEIGHT = 200  # pixels of a line chart
SHAPES = {
    "circle": '<circle r="4.5"/>',
    "square": '<rect x="-4" y="-4" width="8" height="8"/>',
    "diamond": '<path d="M0-5.5 5.5 0 0 5.5-5.5 0z"/>',
    "up": '<path d="M0-5 5 4H-5z"/>',
    "down": '<path d="M0 5-5-4H5z"/>',
    "cross": '<path class="stroke" d="M-4-4 4 4M-4 4 4-4"/>',
    "plus": '<path class="stroke" d="M0-5.5V5.5M-5.5 0H5.5"/>',
    "bar": '<path class="stroke" d="M0-7V7"/>',
    "ring": '<circle class="stroke" r="4"/>',
}
STYLES = {
    "fused": ("blue", "circle"),
    "eager": ("blue", "ring"),
    "packed": ("sky", "ring"),
    "fused_int8": ("blue", "diamond"),
    "fused_graph": ("blue", "square"),
    "packed_graph": ("blue", "down"),
    "pipeline_patched": ("blue", "cross"),
    "trainer_packed": ("sky", "bar"),
    "trainer_patched": ("blue", "bar"),
    "electra": ("blue", "plus"),
    "candidate": ("blue", "up"),
    "torch": ("vermilion", "square"),
    "compile": ("green", "diamond"),
    "compile_max": ("green", "plus"),
    "compile_rand4x": ("green", "cross"),
    "trainer": ("orange", "plus"),
    "trainer_grouped": ("orange", "bar"),
    "pipeline": ("orange", "ring"),
    "pipeline_sorted": ("green", "ring"),
    "huggingface": ("orange", "up"),
    "huggingface_compile": ("orange", "cross"),
    "huggingface_reduce": ("green", "up"),
    "linear_ce_chunked": ("purple", "down"),
    "linear_ce_one": ("purple", "up"),
    "linear_ce": ("purple", "cross"),
    "linear_ce_cute": ("purple", "bar"),
    "liger": ("purple", "plus"),
    "quack": ("purple", "circle"),
    "cce": ("purple", "ring"),
    "sdpa_flash": ("sky", "down"),
    "sdpa_efficient": ("sky", "cross"),
    "sdpa_cudnn": ("sky", "plus"),
    "sdpa_math": ("sky", "up"),
    "varlen_flash": ("sky", "square"),
    "varlen_cudnn": ("sky", "diamond"),
    "flex": ("purple", "square"),
    "flex_flash": ("orange", "square"),
    "flash_attn": ("purple", "diamond"),
    "flash_attn_3": ("orange", "diamond"),
    "flash_attn_4": ("orange", "down"),
    "ort": ("vermilion", "circle"),
    "ort_int8": ("vermilion", "ring"),
    "openvino": ("vermilion", "up"),
    "cublaslt_tanh": ("orange", "circle"),
    "reference": ("grey", "cross"),
    "roofline": ("grey", "bar"),
}
# Those of providers of a user. Which one it is depends on the name only, so it is the same in every chart.
YOURS = [(colour, form) for colour in ("green", "vermilion") for form in ("circle", "square", "down", "bar")]
YOURS = [style for style in YOURS if style not in STYLES.values()]


class Axis(NamedTuple):
    title: str
    low: float
    high: float
    log: bool = True

    def percent(self, value: float) -> float:
        low, high, at = (math.log(x) if self.log else x for x in (self.low, self.high, value))
        return 100 * min(max((at - low) / (high - low), 0), 1)

    def ticks(self) -> list[float]:
        """Return at most nine round values."""
        if not self.log:
            span = self.high - self.low
            step = next(s for s in _rounds(span / 1e3) if span / s <= 6)
            return [i * step for i in range(math.ceil(self.low / step), int(self.high / step) + 1)]
        found: list[float] = []
        for parts in ((1,), (1, 2, 5), (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)):
            finer = [x for x in _rounds(self.low, parts) if self.low <= x <= self.high]
            found = finer if len(found) < 3 or len(finer) <= 9 else found
        return found


def _rounds(start: float, parts: tuple[float, ...] = (1, 2, 5)) -> list[float]:
    """Return these multiples of each power of ten, for twelve decades from the one below `start`."""
    first = math.floor(math.log10(start))
    return [float(f"{part}e{e}") for e in range(first, first + 12) for part in parts]


def around(title: str, values: list[float], least: float = 0.0, log: bool = True) -> Axis:
    """Return an axis for these values: linear from 0, or logarithmic with `least` and 1/`least` on it."""
    if not log:
        return Axis(title, 0.0, 1.06 * max(values), log=False)
    values = [x for x in values if x > 0] + ([least, 1 / least] if least else [])
    return Axis(title, min(values) / 1.15, max(values) * 1.15)


def close_to(title: str, values: Iterable[float]) -> Axis:
    """Return a linear axis that ends close to the lowest and the highest value."""
    values = list(values)
    margin = 0.04 * (max(values) - min(values))
    return Axis(title, min(values) - margin, max(values) + margin, log=False)


class Mark(NamedTuple):
    provider: str
    value: float
    text: str  # the formatted value
    low: float | None = None
    high: float | None = None


class Tint(NamedTuple):
    """A named area of the chart, below or above a limit."""

    name: str
    limit: float
    below: bool


class Point(NamedTuple):
    x: float
    y: float
    low: float | None = None
    high: float | None = None


class Curve(NamedTuple):
    style: str  # classes of page.css: a colour, "dashed", "dotted"
    points: list[Point]
    provider: str = ""  # its shape marks the points


class Row(NamedTuple):
    name: str
    note: str
    marks: list[Mark]


class Stack(NamedTuple):
    """A bar with the named shares of a whole, and the text next to it."""

    name: str
    shares: dict[str, float]
    value: str


def style(provider: str) -> tuple[str, str]:
    """Return the colour and the shape of a provider."""
    return STYLES.get(provider) or YOURS[zlib.crc32(provider.encode()) % len(YOURS)]


def shape(provider: str) -> str:
    colour, form = style(provider)
    return f'<g class="mark {colour}">{SHAPES[form]}</g>'


def legend(providers: list[str], tint: str = "") -> str:
    box = '<svg class="key" viewBox="-8 -8 16 16">'
    keys = "".join(f"<li>{box}{shape(p)}</svg>{escape(label(p))}</li>" for p in providers)
    area = f'<li>{box}<path class="tint" d="M-8-8H8V8H-8z"/></svg>{escape(tint)}</li>' if tint else ""
    return f'<ul class="legend">{keys}{area}</ul>' if keys or area else ""


def _providers(marks: list[Mark]) -> list[str]:
    return in_order(mark.provider for mark in marks)


def dots(rows: list[Row], axis: Axis, tint: Tint | None = None) -> str:
    """Return a chart with one row per case and one lane per provider."""
    providers = _providers([mark for row in rows for mark in row.marks])
    several = len(providers) > 1
    keys = legend(providers if several else [], tint.name if tint else "")
    behind = grid(axis, tint)
    lanes = "".join(_row(row, axis, behind, several) for row in rows)
    below = f'<div class="row axis"><span></span><svg height="20">{labels(axis)}</svg><span></span></div>'
    return f'{keys}<div class="dots">{lanes}{below}<p class="unit">{escape(axis.title)}</p></div>'


def _row(row: Row, axis: Axis, behind: str, several: bool) -> str:
    drawn, values = [], []
    for i, mark in enumerate(row.marks):
        y = LANE * (i + 0.5)
        colour, _ = style(mark.provider)
        tooltip = f"{row.name} {row.note}, {label(mark.provider)}: {mark.text}"
        if mark.low is not None and mark.high is not None:
            ends = (axis.percent(mark.low), axis.percent(mark.high))
            drawn.append(_line(*ends, y, y, f"whisker {colour}"))
        at = f'<svg x="{axis.percent(mark.value):.2f}%" y="{y}" overflow="visible">'
        drawn.append(f"{at}<title>{escape(tooltip)}</title>{shape(mark.provider)}</svg>")
        whose = f" {escape(label(mark.provider))}" if several else ""
        values.append(f"<li><b>{escape(mark.text)}</b>{whose}</li>")
    strip = f'<svg height="{LANE * len(row.marks)}" aria-hidden="true">{behind}{"".join(drawn)}</svg>'
    note = f" <small>{escape(row.note)}</small>" if row.note else ""
    return (
        f'<div class="row"><span class="case">{escape(row.name)}{note}</span>{strip}'
        f'<ul class="values">{"".join(values)}</ul></div>'
    )


def stacks(bars: list[Stack], colours: dict[str, str], unit: str) -> str:
    """Return a chart with one bar per case; the parts have the same colours and order in all bars."""
    box = '<svg class="key" viewBox="-8 -8 16 16"><rect x="-7" y="-7" width="14" height="14"'
    keys = "".join(f'<li>{box} class="part {c}"/></svg>{escape(name)}</li>' for name, c in colours.items())
    rows = "".join(_stack(bar, colours) for bar in bars)
    below = f'<p class="unit">{escape(unit)}</p>'
    return f'<ul class="legend">{keys}</ul><div class="dots">{rows}{below}</div>'


def _stack(bar: Stack, colours: dict[str, str]) -> str:
    start, parts = 0.0, []
    for name, colour in colours.items():
        tooltip = f"<title>{escape(f'{bar.name}, {name}: {bar.shares[name]:.0%}')}</title>"
        parts.append(block(start, start + 100 * bar.shares[name], 3, colour, tooltip))
        start += 100 * bar.shares[name]
    return (
        f'<div class="row"><span class="case">{escape(bar.name)}</span>'
        f'<svg height="{LANE}" aria-hidden="true">{"".join(parts)}</svg>'
        f'<ul class="values"><li>{escape(bar.value)}</li></ul></div>'
    )


def lines(title: str, columns: list[str], series: dict[str, list[float | None]], axis: Axis) -> str:
    """Return a chart with one line per provider over equidistant columns."""
    found = [
        Curve(
            style(provider)[0],
            [Point(i + 0.5, v) for i, v in enumerate(values) if v is not None],
            provider,
        )
        for provider, values in series.items()
    ]
    wide = f"min-width:{64 * len(columns)}px"
    under = "".join(f"<span>{escape(column)}</span>" for column in columns)
    return (
        f'<div class="panel"><h4>{escape(title)}</h4>{legend(list(series))}'
        f'<p class="unit">{escape(axis.title)}</p><div class="scroll"><div style="{wide}">'
        f'<svg height="{HEIGHT}" aria-hidden="true">'
        f"{curves(found, Axis('', 0, len(columns), log=False), axis)}</svg>"
        f'<div class="columns" style="grid-template-columns:repeat({len(columns)},1fr)">{under}</div>'
        "</div></div></div>"
    )


def curves(found: list[Curve], x: Axis, y: Axis) -> str:
    """Return the contents of an SVG element of HEIGHT: the grid and labels of y, and the curves."""

    def at(value: float) -> float:
        return round(HEIGHT - 8 - (HEIGHT - 22) * y.percent(value) / 100, 1)

    drawn = []
    for t in y.ticks():
        drawn.append(_line(0, 100, at(t), at(t), "grid") + f'<text x="0" y="{at(t) - 3}">{_tick(t)}</text>')
    for curve in found:
        for p, q in itertools.pairwise(curve.points):
            drawn.append(_line(x.percent(p.x), x.percent(q.x), at(p.y), at(q.y), f"curve {curve.style}"))
        for p in curve.points:
            across = x.percent(p.x)
            if p.low is not None and p.high is not None:
                drawn.append(_line(across, across, at(p.low), at(p.high), f"whisker {curve.style}"))
            if curve.provider:
                tooltip = f"<title>{escape(f'{label(curve.provider)}: {digits(p.y)}')}</title>"
                start = f'<svg x="{across:.2f}%" y="{at(p.y)}" overflow="visible">'
                drawn.append(f"{start}{tooltip}{shape(curve.provider)}</svg>")
    return "".join(drawn)


def block(start: float, end: float, y: float, colour: str, inner: str = "") -> str:
    """Return a bar from `start` to `end`, in per cent."""
    sizes = f'x="{start:.2f}%" y="{y}" width="{end - start:.2f}%" height="{LANE - 6}"'
    return f'<rect class="part {colour}" {sizes}>{inner}</rect>'


def grid(axis: Axis, tint: Tint | None = None) -> str:
    """Return the vertical lines at the ticks, and the tinted area with its limit."""
    found = "".join(_vertical(axis.percent(t), "grid") for t in axis.ticks())
    if tint:
        at = axis.percent(tint.limit)
        start, width = (0, at) if tint.below else (at, 100 - at)
        found = f'<rect class="tint" x="{start:.2f}%" width="{width:.2f}%" height="100%"/>{found}'
        found += _vertical(at, "limit")
    return found


def _line(x1: float, x2: float, y1: float, y2: float, style: str) -> str:
    return f'<line class="{style}" x1="{x1:.2f}%" x2="{x2:.2f}%" y1="{y1}" y2="{y2}"/>'


def _vertical(x: float, style: str) -> str:
    return f'<line class="{style}" x1="{x:.2f}%" x2="{x:.2f}%" y1="0" y2="100%"/>'


def labels(axis: Axis) -> str:
    """Return the labels of the ticks; a narrow screen hides a label that is close to the one before it."""
    found, last = [], -math.inf
    for value in axis.ticks():
        at = axis.percent(value)
        close = at - last < 12
        last = last if close else at
        style = "middle close" if close else "middle"
        found.append(f'<text x="{at:.2f}%" y="14" class="{style}">{_tick(value)}</text>')
    return "".join(found)


def _tick(value: float) -> str:
    return f"{value:,.0f}".replace(",", "\u202f") if value >= 1000 else f"{value:g}"
