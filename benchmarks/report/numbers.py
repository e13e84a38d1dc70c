"""Numbers as people read them."""

import math

from benchmarks.machine import DATASHEET
from benchmarks.providers import LATE
from benchmarks.report.runs import times_fused


def standard_error(spread: tuple[float, float], rounds: int) -> float:
    """Return the relative standard error of a median, from the 20th and 80th percentile of its rounds.

    Of normal noise that is 1.25 standard deviations over the root of the rounds; the two percentiles are
    1.68 standard deviations apart.
    """
    low, high = spread
    return 1.25 / 1.68 * (high - low) / (0.5 * (low + high)) / math.sqrt(rounds)


def digits(x: float) -> str:
    """Return x with the three digits that count, without an exponent."""
    for places, limit in ((3, 1), (2, 10), (1, 100)):
        if x < limit:
            return f"{x:.{places}f}"
    return f"{x:,.0f}".replace(",", " ")


def times(ratio: float | None) -> str:
    """Return how many times as fast, nothing where it is not known."""
    return f"{ratio:.2f}\u00d7" if ratio else ""


def between(extra: dict) -> str:
    """Return the 20th and the 80th percentile in milliseconds."""
    return f"{digits(extra['p20'] * 1e3)} - {digits(extra['p80'] * 1e3)}"


def rate(extra: dict, seconds: float) -> str:
    """Return the declared work over the time, in a unit that reads well, and the share of what can be had."""
    value, unit = extra["work"] / seconds, extra["unit"]
    if unit == "tokens/s":
        return f"{digits(value)} tokens/s"
    share = f", {extra['bound'] / seconds:.0%}" if extra.get("bound") else ""
    for factor, letter in ((1e12, "T"), (1e9, "G")):
        if value >= factor:
            return f"{digits(value / factor)} {letter}{unit}{share}"
    return f"{digits(value / 1e6)} M{unit}{share}"


def faster_than(provider: str, benchmark: dict) -> str:
    """Say how many times as fast fused is; beside a provider that came later it was timed again."""
    times = times_fused(benchmark)
    if times is None:
        return ""
    apart = provider in LATE or benchmark["extra_info"].get("apart")
    then = f" (then {digits(benchmark['stats']['median'] / times * 1e3)})" if apart else ""
    return f"{times:.2f}x as fast{then}"


def utilisation(extra: dict, seconds: float, result: dict) -> str:
    """Return model FLOPs utilisation: the products of the mathematics over the datasheet's peak."""
    peak = DATASHEET.get(result["machine_info"]["device"])
    return f"{extra['flops'] / seconds / peak:.0%}" if peak else ""


def amount(work: float, unit: str) -> str:
    """Return the work of a call, its unit that of a rate: "19.8 MB"."""
    of = unit.removesuffix("/s")
    factor, letter = next(((f, n) for f, n in ((1e12, "T"), (1e9, "G"), (1e6, "M")) if work >= f), (1e3, "k"))
    return f"{digits(work / factor)} {letter}{of}"
