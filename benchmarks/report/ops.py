"""Single ops on the page: ratios, time by size, rates, and the ratios of earlier runs."""

from benchmarks.report.charts import FASTER, names, ratio_chart, share_chart, spread_note
from benchmarks.report.html import folded, paragraph, section, table
from benchmarks.report.losses import comparisons
from benchmarks.report.numbers import amount, rate
from benchmarks.report.runs import case, with_backward
from benchmarks.report.svg import around, lines


def ops(result: dict) -> str:
    whole = with_backward(result)
    found = [c for c in comparisons(result) if case(c.group).op != "step"]
    both, forward = ([c for c in found if (c.group in whole) == kept] for kept in (True, False))
    note = f"With the backward pass, if the op has one. {spread_note(found)}"
    separate = folded("The forward pass only", ratio_chart(forward)) if forward else ""
    return section("Each op", paragraph(note), ratio_chart(both), separate)


def timed_ops(result: dict) -> dict[str, dict[str, dict]]:
    """Return the benchmarks of ops that have numbers, by group and provider."""
    found = {}
    for group, providers in with_backward(result).items():
        timed = {p: b for p, b in providers.items() if isinstance(b, dict)}
        if timed and case(group).op != "step":
            found[group] = timed
    return found


def sizes(result: dict) -> str:
    """Return charts of time by size, for each op that has several sizes."""
    by_op: dict[str, list[tuple[float, str, dict]]] = {}
    for timed in timed_ops(result).values():
        extra = next(iter(timed.values()))["extra_info"]
        name = f"{extra['size']}, {amount(extra['work'], extra['unit'])}"
        by_op.setdefault(extra["op"], []).append((extra["work"], name, timed))
    panels = []
    for op, found in by_op.items():
        found.sort(key=lambda one: one[:2])
        times = [{p: b["stats"]["median"] * 1e3 for p, b in timed.items()} for _, _, timed in found]
        panels += _panel(op, [name for _, name, _ in found], times, "ms (logarithmic)", 0)
    note = "From left to right by the work of one call." if panels else "In this run no op has several sizes."
    return section("Time by size", paragraph(note), _side_by_side(panels))


def over_time(runs: list[dict]) -> str:
    """Return charts of each case's ratios over the runs of one machine, the oldest first."""
    by_run = [comparisons(run) for run in runs]
    dates = [run["datetime"][:16].replace("T", " ") for run in runs]
    panels = []
    for group in with_backward(runs[-1]):
        ratios = [{c.provider: c.ratio for c in found if c.group == group} for found in by_run]
        panels += _panel(", ".join(names(group)), dates, ratios, FASTER, 0.9)
    return section("Over time", _side_by_side(panels)) if panels else ""


def _panel(
    title: str, columns: list[str], found: list[dict[str, float]], unit: str, least: float
) -> list[str]:
    """Return a chart of the providers with values in at least two columns, if there are any."""
    series = {p: [one.get(p) for one in found] for p in dict.fromkeys(p for one in found for p in one)}
    series = {p: values for p, values in series.items() if sum(v is not None for v in values) > 1}
    known = [v for values in series.values() for v in values if v is not None]
    return [lines(title, columns, series, around(unit, known, least))] if known else []


def _side_by_side(panels: list[str]) -> str:
    return f'<div class="panels">{"".join(panels)}</div>' if panels else ""


def rates(result: dict) -> str:
    """Return bytes or FLOPs per second, and their share of the machine's bound."""
    shares, cells = {}, []
    for group, timed in timed_ops(result).items():
        of = {p: rate(b["extra_info"], b["stats"]["median"]) for p, b in timed.items()}
        cells.append([", ".join(names(group)), *(of.get(p, "") for p in ("fused", "torch", "compile"))])
        bounds = {p: b["extra_info"].get("bound") for p, b in timed.items() if p != "reference"}
        known = {p: bound / timed[p]["stats"]["median"] for p, bound in bounds.items() if bound}
        shares |= {group: known} if known else {}
    note = (
        "The bound is the larger one of FLOPs and bytes, each over the rate that this GPU reached."
        if shares
        else "The rates that this machine can reach are not known (benchmarks/harness/machine.py)."
    )
    chart = share_chart(shares, "the bound", "above the bound") if shares else ""
    numbers = table(["case", "fused", "torch", "torch.compile"], cells) if cells else ""
    return section("Rates and the roofline", paragraph(note), chart, numbers)
