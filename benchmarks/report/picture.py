"""Self-contained SVG files in the style of the page: the ratios of a run, for README.md; learning curves."""

import re
from html import escape
from pathlib import Path

from benchmarks.harness.providers import OURS, label
from benchmarks.report.charts import FASTER, SLOWER, names
from benchmarks.report.losses import Comparison, comparisons
from benchmarks.report.numbers import times
from benchmarks.report.runs import MODELS, case, headline, kind, with_backward
from benchmarks.report.svg import LANE, around, block, grid, labels, style

CSS = Path(__file__).with_name("page.css").read_text()
THEMES = ("light", "dark")  # the order of the two palettes in page.css
WIDTH = 830  # pixels, the width of README.md
LEFT, TOP, STRIP = 185, 62, 375  # pixels: the position and the width of the strip with the bars


def document(height: float, parts: list[str], theme: str) -> str:
    """Return an SVG file of WIDTH that needs no other file, with the rules of page.css for its elements."""
    palette = re.findall(r":root \{(.*?)\}", CSS, re.S)[THEMES.index(theme)]
    colours = dict(re.findall(r"--(\w+): (#\w+)", palette))
    rules = re.search(r"^svg text.*?\n\n", CSS, re.S | re.M)[0]
    rules = re.sub(r"var\(--(\w+)\)", lambda name: colours[name[1]], rules)
    size = f'width="{WIDTH}" height="{height:g}" viewBox="0 0 {WIDTH} {height:g}"'
    ink = f"svg .ink {{ fill: {colours['ink']}; font-weight: 600; }}"
    back = f'<rect width="100%" height="100%" fill="{colours["paper"]}"/>'
    start = f'<svg xmlns="http://www.w3.org/2000/svg" {size}>\n<style>\n{rules}{ink}\n</style>'
    return "\n".join([start, back, *parts, "</svg>\n"])


def text(x: float, y: float, words: str, style: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{style}" text-anchor="{anchor}">{escape(words)}</text>'


def box(x: float, y: float, width: float, height: float, inner: str) -> str:
    """Return `inner`, whose percentages are those of this rectangle."""
    sizes = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"'
    return f'<svg {sizes} overflow="visible">{inner}</svg>'


def chosen(result: dict) -> dict[str, list[Comparison]]:
    """Return, of each training step and of each op at its first size, plain PyTorch and the fastest other."""
    whole = with_backward(result)
    found: dict[str, list[Comparison]] = {}
    for c in comparisons(result):
        is_model = case(c.group).op in MODELS
        if c.group in whole and c.provider not in (*OURS, "reference") and not is_model:
            found.setdefault(c.group, []).append(c)
    first = {case(group).op: group for group in reversed(found)}
    kept = {}
    for group, compared in found.items():
        if case(group).op == "step" or first[case(group).op] == group:
            best = min((c.ratio for c in compared if c.provider != "torch"), default=None)
            kept[group] = [c for c in compared if c.provider == "torch" or c.ratio == best]
    return kept


def ratios(result: dict, theme: str) -> str:
    """Return the picture of a run: ratios to plain PyTorch and to the fastest other implementation."""
    rows = chosen(result)
    axis = around(FASTER, [c.ratio for compared in rows.values() for c in compared], least=0.5)
    title = "electra_fast is this many times as fast as plain PyTorch and the fastest other implementation"
    basis = "CPU time, summed over all threads" if kind(result) == "cpu" else "graph replays, cold L2"
    parts = [text(16, 24, title, "ink")]
    parts.append(text(16, 44, f"{headline(result)}; {basis}; ops with their backward pass"))
    bars, y = [], 0.0
    for group, compared in rows.items():
        name, note = names(group)
        parts += [text(16, TOP + y + 15, name, "ink"), text(16, TOP + y + 15 + LANE, note)]
        for i, c in enumerate(compared):
            lane = y + i * LANE
            ends = sorted(map(axis.percent, (1, c.ratio)))
            bars.append(block(*ends, lane + 4, style(c.provider)[0]))
            parts.append(text(LEFT + STRIP + 58, TOP + lane + 15, times(c.ratio), "ink", "end"))
            parts.append(text(LEFT + STRIP + 66, TOP + lane + 15, label(c.provider)))
        y += 2 * LANE + 6
    parts.append(box(LEFT, TOP, STRIP, y, grid(axis, SLOWER) + "".join(bars)))
    parts.append(box(LEFT, TOP + y, STRIP, 20, labels(axis)))
    parts.append(text(LEFT, TOP + y + 34, f"logarithmic axis; shaded: {SLOWER.name}"))
    return document(TOP + y + 48, parts, theme)
