"""A run as a table for the terminal: its cases, what has no number, and why."""

import collections

from benchmarks.providers import label
from benchmarks.report.numbers import between, digits, faster_than, rate
from benchmarks.report.runs import groups, headline, is_plain, kind

COLUMNS = ["provider", "ms", "p20 - p80", "host us", "rate, of the bound", "peak MB", "fused is"]
BASIS = {
    "cpu": "Milliseconds and rates by CPU time, of all threads together.",
    "cuda": "Milliseconds and rates by events around graph replays, with a cold L2.",
}


def row(provider: str, benchmark: dict | str) -> list[str]:
    name = label(provider)
    if isinstance(benchmark, str):
        return [name, benchmark] + [""] * (len(COLUMNS) - 2)
    extra, median = benchmark["extra_info"], benchmark["stats"]["median"]
    return [
        f"{name}, no baseline" if extra.get("no_baseline") else name,
        digits(median * 1e3),
        between(extra),
        digits(extra["host"] * 1e6),
        rate(extra, median),
        digits(extra["peak_bytes"] / 1e6),
        faster_than(provider, benchmark),
    ]


def table(result: dict) -> str:
    """Return the whole run as text: its cases, what has no number, and why."""
    found = groups(result)
    rows = {group: [row(p, b) for p, b in providers.items()] for group, providers in found.items()}
    head = [c.replace("host", "wall") if kind(result) == "cpu" else c for c in COLUMNS]
    columns = zip(head, *(cells for group in rows.values() for cells in group), strict=True)
    widths = [max(map(len, column)) for column in columns]

    def line(cells: list[str]) -> str:
        aligned = (f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        return ("  " + f"{cells[0]:<{widths[0]}}  " + "  ".join(list(aligned)[1:])).rstrip()

    lines = [headline(result), BASIS[kind(result)], "", line(head)]
    for group, its_rows in rows.items():
        lines += ["", group, *map(line, its_rows)]
    return "\n".join([*lines, "", *endings(result)])


def endings(result: dict) -> list[str]:
    """Return what is wrong, how the times were taken if not all alike, and what was dropped."""
    lines = [f"{word}: {line}" for word in ("wrong", "fails") for line in result[word]]
    plain = {b["extra_info"]["op"] for b in result["benchmarks"] if is_plain(b)}
    lines += components(result)
    lines += (
        [f"without a kernel here, so that fused is plain PyTorch: {', '.join(sorted(plain))}"]
        if plain
        else []
    )
    ways = collections.Counter(b["extra_info"]["how"] for b in result["benchmarks"])
    lines += [f"{count} by {way}" for way, count in ways.items()] if len(ways) > 1 else []
    if result["dropped"]:
        lines.append(f"dropped, with {result['budget']:.0f} s to spend:")
        lines += [f"  {line}" for line in result["dropped"]]
    return [*lines, f"{len(result['benchmarks'])} numbers in {result['seconds']:.0f} s"]


def components(result: dict) -> list[str]:
    """Return where the time of a step of ours goes, beside what the roofline asks for each part."""
    lines = []
    for benchmark in result["benchmarks"]:
        parts = benchmark["extra_info"].get("components", {})
        whole = sum(part["seconds"] for part in parts.values())
        lines += [
            f"{benchmark['group']}, {benchmark['extra_info']['provider']}, where its time goes:"
        ] * bool(parts)
        for name, part in sorted(parts.items(), key=lambda item: -item[1]["seconds"]):
            least = f", at least {digits(part['bound'] * 1e3)}" if part.get("bound") else ""
            share = f"{part['seconds'] / whole:.1%}"
            lines.append(f"  {name:14} {digits(part['seconds'] * 1e3):>7} ms {share:>6}{least}")
    return lines
