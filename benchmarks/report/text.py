"""A run as text for the terminal: a line per case, or all of it; what has no number, and why."""

import collections
import re

from benchmarks.providers import label
from benchmarks.report.numbers import between, digits, faster_than, rate, standard_error
from benchmarks.report.runs import case, groups, headline, is_plain, kind, spread, times_fused, with_backward

WELL_KNOWN = ("torch", "compile", "huggingface")
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


def summary(result: dict) -> str:
    """Return a line per case and well-known rival: both times, their ratio and its standard error."""
    rows = [["", "fused, ms", "beside", "ms", "fused is", "", "rounds"]]
    for group, providers in with_backward(result).items():
        name, fused = ", ".join(case(group)[:2]), providers.get("fused")
        found = [
            (p, b) for p, b in providers.items() if p in WELL_KNOWN and isinstance(b, dict) and times_fused(b)
        ]
        if not found and isinstance(fused, dict):
            rows.append(
                [name, digits(fused["stats"]["median"] * 1e3), "", "", "", "", str(fused["stats"]["rounds"])]
            )
        for provider, benchmark in found:
            ratio, ms, rounds = times_fused(benchmark), *(benchmark["stats"][x] for x in ("median", "rounds"))
            error = f"± {standard_error(spread(benchmark), rounds):.1%}" if spread(benchmark) else ""
            ours = digits(ms / ratio * 1e3)  # in the same rounds
            rows.append(
                [name, ours, label(provider), digits(ms * 1e3), f"{ratio:.2f}x as fast", error, str(rounds)]
            )
            name = ""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = ("<", ">", "<", ">", ">", "<", ">")
    shown = [
        "  ".join(
            f"{cell:{side}{width}}" for cell, side, width in zip(row, aligned, widths, strict=True)
        ).rstrip()
        for row in rows
    ]
    return "\n".join([headline(result), BASIS[kind(result)], "", *shown, "", *endings(result)])


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
    return "\n".join([*lines, "", *components(result), *endings(result)])


def endings(result: dict) -> list[str]:
    """Return what is wrong, how the times were taken if not all alike, and what was dropped."""
    lines = [f"{word}: {line}" for word in ("wrong", "fails") for line in result[word]]
    plain = {b["extra_info"]["op"] for b in result["benchmarks"] if is_plain(b)}
    lines += (
        [f"without a kernel here, so that fused is plain PyTorch: {', '.join(sorted(plain))}"]
        if plain
        else []
    )
    ways = collections.Counter(b["extra_info"]["how"] for b in result["benchmarks"])
    lines += [f"{count} by {way}" for way, count in ways.items()] if len(ways) > 1 else []
    return [*lines, *dropped(result), f"{len(result['benchmarks'])} numbers in {result['seconds']:.0f} s"]


def dropped(result: dict) -> list[str]:
    """Return a line for all that no time was left for, with the command for it, and one per other reason."""
    reasons: dict[str, list[str]] = {}
    needs = []  # seconds, as far as they were known
    for line in result["dropped"]:
        name, _, reason = line.partition(": ")
        if need := re.match(r"needs (\d+) s, \d+ s are left", reason):
            needs.append(int(need[1]))
        else:
            reasons.setdefault(reason, []).append(name.rpartition(", ")[2])
    lines = [
        f"dropped: {', '.join(dict.fromkeys(map(label, names)))}: {reason}"
        for reason, names in reasons.items()
    ]
    if needs:
        # On two cores a number takes 5 s, if it needs no compiling.
        budget = 60 * round((result["seconds"] + sum(max(5, need) for need in needs)) / 60 + 0.5)
        command = f"make bench BUDGET={budget}"
        if result.get("only"):
            command = f"python -m benchmarks --only '{result['only']}' --budget {budget}"
        lines.append(f"no time was left for {len(needs)} numbers; {command} measures them too")
    return lines


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
