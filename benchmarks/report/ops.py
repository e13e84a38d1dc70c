"""Single ops on the page: ratios, time against size, rates, and how the ratios went over the runs."""

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
    note = f"With its backward pass, where it has one. {spread_note(found)}"
    alone = folded("The forward pass alone", ratio_chart(forward)) if forward else ""
    return section("Each op", paragraph(note), ratio_chart(both), alone)


def timed_ops(result: dict) -> dict[str, dict[str, dict]]:
    """Return what has numbers, by group and provider, without the step."""
    found = {}
    for group, providers in with_backward(result).items():
        timed = {p: b for p, b in providers.items() if isinstance(b, dict)}
        if timed and case(group).op != "step":
            found[group] = timed
    return found


def sizes(result: dict) -> str:
    """Show time against size for each op that has several."""
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
    note = (
        "From left to right by the work that one call declares."
        if panels
        else "No op has several sizes here."
    )
    return section("Time against size", paragraph(note), _side_by_side(panels))


def over_time(runs: list[dict]) -> str:
    """Show how each case's ratios went over the runs of one machine, the oldest first."""
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
    """Return a chart of the providers that have a value in two columns or more, if there are any."""
    series = {p: [one.get(p) for one in found] for p in dict.fromkeys(p for one in found for p in one)}
    series = {p: values for p, values in series.items() if sum(v is not None for v in values) > 1}
    known = [v for values in series.values() for v in values if v is not None]
    return [lines(title, columns, series, around(unit, known, least))] if known else []


def _side_by_side(panels: list[str]) -> str:
    return f'<div class="panels">{"".join(panels)}</div>' if panels else ""


def rates(result: dict) -> str:
    """Show bytes or FLOPs by time, and the share of what the machine was seen to reach."""
    shares, cells = {}, []
    for group, timed in timed_ops(result).items():
        of = {p: rate(b["extra_info"], b["stats"]["median"]) for p, b in timed.items()}
        cells.append([", ".join(names(group)), *(of.get(p, "") for p in ("fused", "torch", "compile"))])
        bounds = {p: b["extra_info"].get("bound") for p, b in timed.items() if p != "reference"}
        known = {p: bound / timed[p]["stats"]["median"] for p, bound in bounds.items() if bound}
        shares |= {group: known} if known else {}
    note = (
        "The bound is the larger of FLOPs and bytes over what this GPU was seen to reach."
        if shares
        else "What this machine can reach is not known (benchmarks/machine.py), so that rates stand alone."
    )
    chart = share_chart(shares, "the bound", "beyond what was seen") if shares else ""
    numbers = table(["case", "fused", "torch", "torch.compile"], cells) if cells else ""
    return section("Rates and the roofline", paragraph(note), chart, numbers)
