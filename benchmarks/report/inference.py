"""Inference in the tables and on the page: latency, its memory, and the rate on texts of real lengths."""

from collections.abc import Callable
from typing import NamedTuple

from benchmarks.harness.providers import in_order, label
from benchmarks.report.html import paragraph, section, table
from benchmarks.report.numbers import digits
from benchmarks.report.runs import case, groups, kind

TAIL = 20  # rounds that a 95th percentile needs
NOTE = (
    "One call of a classifier: the median of the rounds and their 95th percentile, and the memory that "
    "PyTorch's allocator held during the call. Texts of real lengths are strings, and their results are "
    "labels, so the tokenizer is included."
)


class Numbers(NamedTuple):
    """A table with one row per size and one column per provider."""

    head: list[str]
    rows: list[list[str]]


def inference(result: dict) -> list[Numbers]:
    """Return the tables of latency, memory and rate that the results have."""
    ms = "CPU ms" if kind(result) == "cpu" else "ms"
    latency = _numbers(result, "infer", f"latency, {ms}: p50 / p95", percentiles)
    memory = _numbers(result, "infer", "peak MB of a call", megabytes)
    return [*latency, *memory, *rates(result)]


def rates(result: dict) -> list[Numbers]:
    """Return the table of the rate on texts of real lengths, if the results have it."""
    second = "CPU s" if kind(result) == "cpu" else "s"
    return _numbers(result, "infer_texts", f"texts / {second}", texts_per_second)


def percentiles(benchmark: dict) -> str:
    """Return the median in milliseconds, and the 95th percentile if there are enough rounds."""
    extra, stats = benchmark["extra_info"], benchmark["stats"]
    known = "p95" in extra and stats["rounds"] >= TAIL
    return digits(stats["median"] * 1e3) + (f" / {digits(extra['p95'] * 1e3)}" if known else "")


def megabytes(benchmark: dict) -> str:
    """Return the peak memory; empty if PyTorch's allocator held nothing, as with another engine."""
    peak = benchmark["extra_info"]["peak_bytes"]
    return digits(peak / 1e6) if peak else ""


def texts_per_second(benchmark: dict) -> str:
    return digits(benchmark["extra_info"]["work"] / benchmark["stats"]["median"])


def _numbers(result: dict, op: str, title: str, cell: Callable[[dict], str]) -> list[Numbers]:
    """Return the table of an op, or none if the results do not have the op."""
    found = {case(group).size: of for group, of in groups(result).items() if case(group).op == op}
    every = in_order(provider for of in found.values() for provider in of)
    rows = [[size, *(_cell(of.get(provider), cell) for provider in every)] for size, of in found.items()]
    return [Numbers([title, *map(label, every)], rows)] if rows else []


def _cell(benchmark: dict | str | None, cell: Callable[[dict], str]) -> str:
    """Return the number of a provider, the word for one that was refused, or an empty string."""
    return cell(benchmark) if isinstance(benchmark, dict) else benchmark or ""


def inference_section(result: dict) -> str:
    """Return the section of the page; empty for a run without inference."""
    found = [table(*numbers) for numbers in inference(result)]
    return section("Inference", paragraph(NOTE), *found) if found else ""
