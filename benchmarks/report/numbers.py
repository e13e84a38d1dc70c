"""Numbers formatted for people."""

import math

from benchmarks.harness.machine import DATASHEET
from benchmarks.harness.providers import LATE, label
from benchmarks.report.runs import compared, kind, times_fused

PRECISE = 0.02  # a median or a ratio with this relative standard error needs no more rounds


def standard_error(spread: tuple[float, float], rounds: int) -> float:
    """Return the relative standard error of a median, from the 20th and 80th percentile of its rounds.

    For normal noise it is 1.25 standard deviations over the square root of the number of rounds, and the two
    percentiles are 1.68 standard deviations apart.
    """
    low, high = spread
    return 1.25 / 1.68 * (high - low) / (0.5 * (low + high)) / math.sqrt(rounds)


def digits(x: float) -> str:
    """Return x with three significant digits, without an exponent."""
    for decimals, limit in ((3, 1), (2, 10), (1, 100)):
        if x < limit:
            return f"{x:.{decimals}f}"
    return f"{x:,.0f}".replace(",", " ")


def times(ratio: float | None) -> str:
    """Return the ratio with a multiplication sign, or an empty string for None."""
    return f"{ratio:.2f}\u00d7" if ratio else ""


def between(extra: dict) -> str:
    """Return the 20th and 80th percentile in milliseconds."""
    return f"{digits(extra['p20'] * 1e3)} - {digits(extra['p80'] * 1e3)}"


def rate(extra: dict, seconds: float) -> str:
    """Return the declared work per second, and the share of the bound if the bound is known."""
    value, unit = extra["work"] / seconds, extra["unit"]
    if unit in ("tokens/s", "texts/s"):
        return f"{digits(value)} {unit}"
    share = f", {extra['bound'] / seconds:.0%}" if extra.get("bound") else ""
    for factor, letter in ((1e12, "T"), (1e9, "G")):
        if value >= factor:
            return f"{digits(value / factor)} {letter}{unit}{share}"
    return f"{digits(value / 1e6)} M{unit}{share}"


def faster_than(provider: str, benchmark: dict) -> str:
    """Return how many times as fast fused is; add its time if it was measured again for this provider."""
    times = times_fused(benchmark)
    if times is None:
        return ""
    apart = provider in LATE or benchmark["extra_info"].get("apart")
    then = f" (then {digits(benchmark['stats']['median'] / times * 1e3)})" if apart else ""
    return f"{times:.2f}x as fast{then}"


def utilisation(extra: dict, seconds: float, result: dict) -> str:
    """Return model FLOPs utilisation: FLOPs of the mathematics per second over the datasheet's peak."""
    peak = DATASHEET.get(result["machine_info"]["device"])
    return f"{extra['flops'] / seconds / peak:.0%}" if peak else ""


def amount(work: float, unit: str) -> str:
    """Return the work of a call with its unit, like "19.8 MB"; `unit` is that of its rate."""
    of = unit.removesuffix("/s")
    factor, letter = next(((f, n) for f, n in ((1e12, "T"), (1e9, "G"), (1e6, "M")) if work >= f), (1e3, "k"))
    return f"{digits(work / factor)} {letter}{of}"


# Titles of the columns of `provider_rows` for results of a CPU.
ON_A_CPU = {"ms": "CPU ms", "host us": "wall us", "tokens / s": "tokens / CPU s"}
ON_A_CPU |= {"hours, paper's schedule": "CPU hours, paper's schedule"}


def titles(columns: list[str], result: dict) -> list[str]:
    return [ON_A_CPU.get(name, name) for name in columns] if kind(result) == "cpu" else columns


def step_columns(result: dict) -> list[str]:
    """Return the columns that the results of a training step have."""
    mfu = ["MFU"] * (result["machine_info"]["device"] in DATASHEET)
    counts = ["operators"] if kind(result) == "cpu" else ["operators", "launches"]
    times = ["ms", "p20 - p80", "tokens / s", "hours, paper's schedule", *mfu]
    return [*times, *counts, "peak MB", "fused is"]


def provider_rows(providers: dict[str, dict | str], result: dict, columns: list[str]) -> list[list[str]]:
    """Return one row per provider: its label and these columns, or why it has no number."""
    rows = []
    for provider, benchmark in providers.items():
        if isinstance(benchmark, str):
            rows.append([label(provider), benchmark] + [""] * (len(columns) - 1))
            continue
        extra, median = benchmark["extra_info"], benchmark["stats"]["median"]
        cells = {
            "ms": digits(median * 1e3),
            "p20 - p80": between(extra),
            "rounds": str(benchmark["stats"]["rounds"]),
            "host us": digits(extra["host"] * 1e6),
            "rate, share of bound": rate(extra, median),
            "peak MB": digits(extra["peak_bytes"] / 1e6),
            "fused is": times(times_fused(benchmark)),
            "served by": extra.get("served_by") or "",
        }
        cells |= {name: digits(extra[name]) if name in extra else "" for name in ("operators", "launches")}
        if extra["op"] == "step":
            cells["tokens / s"] = digits(extra["work"] / median)
            cells["hours, paper's schedule"] = digits(extra["paper_steps"] * median / 3600)
            cells["MFU"] = utilisation(extra, median, result)
        name = f"{compared(provider, benchmark)}{', no baseline' * bool(extra.get('no_baseline'))}"
        name += f", SDPA's {extra['backend']}" if extra.get("backend") else ""
        rows.append([name, *(cells[column] for column in columns)])
    return rows
