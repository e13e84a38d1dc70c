"""Charts of lines over the steps of a run, as SVG."""

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from electra_fast.pages import text_of

WIDTH, HEIGHT = 440, 250
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 26, 40  # the margins around the area of the lines
COLOURS = ("blue", "vermilion", "green", "purple", "orange", "sky")
DASHES = ("", "5 3", "1 3")
STYLE = """
.charts { display: grid; gap: 1rem 2rem }
.charts { grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)) }
.charts svg { width: 100% }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 0 1.2rem; margin: .5rem 0; padding: 0 }
.legend { font-size: 13px }
.legend svg { width: 24px; height: 12px; margin-right: .4em; vertical-align: -1px }
.curve { fill: none; stroke: currentColor; stroke-width: 1.75 }
"""

Point = tuple[float, float]  # a step and a value


class Line(NamedTuple):
    name: str
    points: list[Point]


def chart(title: str, y_label: str, lines: Sequence[Line]) -> str:
    """Return a chart; a line without points is left out, and has the next colour nevertheless.

    Args:
        title: of the chart, for screen readers.
        y_label: what the values are, and their unit.
        lines: their steps increase, and all numbers are finite.
    """
    points = [point for line in lines for point in line.points]
    said = escape("; ".join(_described(line) for line in lines if line.points) or "no values")
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img"><title>{escape(title)}</title><desc>{said}</desc>',
        f'<text x="{LEFT}" y="14">{escape(y_label)}</text>',
    ]
    if points:
        steps, values = zip(*points, strict=True)
        across = _Axis(0, max(*steps, 1), LEFT, WIDTH - RIGHT)
        up = _Axis(*_wider(min(values), max(values)), HEIGHT - BOTTOM, TOP)
        parts += [_grid(across, up), *(_curve(i, line.points, across, up) for i, line in enumerate(lines))]
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 6}" text-anchor="end">steps</text></svg>')
    return "".join(parts)


def legend(names: Sequence[str]) -> str:
    """Return the colours of the lines of a chart with these names."""
    box = '<svg viewBox="0 0 24 12" aria-hidden="true">'
    keys = (
        f'<li>{box}<path {_style(i)} d="M0 6H24"/></svg>{escape(name)}</li>' for i, name in enumerate(names)
    )
    return f'<ul class="legend">{"".join(keys)}</ul>'


class _Axis(NamedTuple):
    low: float
    high: float
    begin: float  # the position of low
    end: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.begin + share * (self.end - self.begin), 1)

    def ticks(self) -> list[float]:
        """Return at most six multiples, floats, of 1, 2 or 5 times a power of ten."""
        power = math.floor(math.log10(self.high - self.low)) - 1
        steps = (factor * 10.0**exponent for exponent in (power, power + 1) for factor in (1, 2, 5))
        step = next(step for step in steps if (self.high - self.low) / step < 6)
        return [i * step for i in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]


def _wider(low: float, high: float) -> tuple[float, float]:
    """Return a range with a margin, so wide that labels with four digits differ."""
    margin = max(0.05 * (high - low), 5e-3 * max(abs(low), abs(high))) or 1.0
    return low - margin, high + margin


def _grid(across: _Axis, up: _Axis) -> str:
    lines = []
    for value in up.ticks():
        lines.append(f'<path class="grid" d="M{LEFT} {up(value)}H{WIDTH - RIGHT}"/>')
        lines.append(f'<text x="{LEFT - 6}" y="{up(value) + 4:.1f}" text-anchor="end">{value:.4g}</text>')
    for step in filter(float.is_integer, across.ticks()):
        anchor = "middle" if across(step) < WIDTH - 30 else "end"
        at = f'x="{across(step)}" y="{HEIGHT - BOTTOM + 16}" text-anchor="{anchor}"'
        lines.append(f"<text {at}>{text_of(round(step))}</text>")
    return "".join(lines)


def _curve(i: int, points: list[Point], across: _Axis, up: _Axis) -> str:
    """Return a line with a dot at its end, which shows a line of one point too."""
    if not points:
        return ""
    corners = "L".join(f"{across(step)} {up(value)}" for step, value in points)
    x, y = across(points[-1][0]), up(points[-1][1])
    dot = f'<circle class="{_colour(i)}" fill="currentColor" cx="{x}" cy="{y}" r="3"/>'
    return f'<path {_style(i)} d="M{corners}"/>{dot}'


def _style(i: int) -> str:
    dashes = DASHES[i // len(COLOURS) % len(DASHES)]
    return f'class="curve {_colour(i)}"' + (f' stroke-dasharray="{dashes}"' if dashes else "")


def _colour(i: int) -> str:
    return COLOURS[i % len(COLOURS)]


def _described(line: Line) -> str:
    (first, before), (last, after) = line.points[0], line.points[-1]
    return f"{line.name}: {text_of(before)} at step {first:.0f}, {text_of(after)} at step {last:.0f}"
