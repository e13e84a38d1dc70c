"""A run as text for the terminal: one line per case, or all numbers; and why others have none."""

import collections
import itertools
import re
from collections.abc import Collection

from benchmarks.harness.providers import label
from benchmarks.report.inference import inference
from benchmarks.report.numbers import digits, faster_than, provider_rows, standard_error, titles
from benchmarks.report.runs import (
    case,
    compared,
    groups,
    headline,
    is_plain,
    kind,
    spread,
    times_fused,
    with_backward,
)
from benchmarks.report.yours import lines as lines_of_yours
from electra_fast.tables import text_table

WELL_KNOWN = ("torch", "compile", "huggingface", "huggingface_compile", "ort", "ort_int8", "openvino")
WELL_KNOWN += ("trainer", "trainer_grouped", "pipeline", "pipeline_sorted")
WELL_KNOWN += ("packed", "fused_int8", "pipeline_patched")  # of ours
TOO_LATE = re.compile(r"needs (\d+) s, \d+ s are left")  # the reason of a number that the budget left out
COLUMNS = ["ms", "p20 - p80", "host us", "rate, share of bound", "peak MB"]
BASIS = {
    "cpu": "Times and rates are measured by CPU time, summed over all threads.",
    "cuda": "Times and rates are measured by events around graph replays, with a cold L2.",
}


def summary(result: dict) -> str:
    """Return one line per case and well-known provider: both times, their ratio and its standard error."""
    rows = [["", "fused, ms", "compared with", "ms", "fused is", "", "rounds"]]
    for group, providers in with_backward(result).items():
        name, fused = ", ".join(case(group)[:2]), providers.get("fused")
        timed = {p: b for p, b in providers.items() if p in WELL_KNOWN and isinstance(b, dict)}
        found = {p: b for p, b in timed.items() if times_fused(b)}
        if not found and isinstance(fused, dict):
            ms, rounds = digits(fused["stats"]["median"] * 1e3), str(fused["stats"]["rounds"])
            rows.append([name, ms, "", "", "", "", rounds])
        for provider, benchmark in found.items():
            seconds, rounds = benchmark["stats"]["median"], benchmark["stats"]["rounds"]
            ratio, between = times_fused(benchmark), spread(benchmark)
            error = f"± {standard_error(between, rounds):.1%}" if between else ""
            ours, ms = digits(seconds / ratio * 1e3), digits(seconds * 1e3)  # in the same rounds
            rows.append(
                [name, ours, compared(provider, benchmark), ms, f"{ratio:.2f}x as fast", error, str(rounds)]
            )
            name = ""
    shown = text_table(rows, right=(1, 3, 4, 6))
    return "\n".join([headline(result), BASIS[kind(result)], "", shown, "", *endings(result)])


def table(result: dict) -> str:
    """Return the whole run as text: all cases, and what has no number, with the reason."""
    rows = {}
    for group, providers in groups(result).items():
        cells = zip(provider_rows(providers, result, COLUMNS), providers.items(), strict=True)
        rows[group] = [[*row, "" if isinstance(b, str) else faster_than(p, b)] for row, (p, b) in cells]
    head = ["provider", *titles(COLUMNS, result), "fused is"]
    lines = [headline(result), BASIS[kind(result)], "", *grouped(head, rows, right=range(1, len(head)))]
    more = [*latency_and_rate(result), *components(result), *lines_of_yours(result)]
    return "\n".join([*lines, "", *more, *endings(result)])


def latency_and_rate(result: dict) -> list[str]:
    """Return the tables of inference, each with an empty line."""
    found = [(numbers.head, *numbers.rows) for numbers in inference(result)]
    tables = [text_table(rows, right=range(1, len(rows[0]))) for rows in found]
    return [line for table in tables for line in (table, "")]


def grouped(head: list[str], rows: dict[str, list[list[str]]], right: Collection[int]) -> list[str]:
    """Return the lines of one table, with the name of each group above its rows."""
    table = iter(text_table([head, *itertools.chain(*rows.values())], right).splitlines())
    lines = [f"  {next(table)}"]
    for group, cells in rows.items():
        lines += ["", group, *(f"  {next(table)}" for _ in cells)]
    return lines


def endings(result: dict) -> list[str]:
    """Return what is wrong, the methods of measurement if there are several, and what was dropped."""
    lines = [f"{word}: {line}" for word in ("wrong", "fails") for line in result[word]]
    plain = {b["extra_info"]["op"] for b in result["benchmarks"] if is_plain(b)}
    if plain:
        reason = "without a kernel on this device, so fused runs plain PyTorch"
        lines.append(f"{reason}: {', '.join(sorted(plain))}")
    ways = collections.Counter(b["extra_info"]["how"] for b in result["benchmarks"])
    lines += [f"{count} numbers by {way}" for way, count in ways.items()] if len(ways) > 1 else []
    return [*lines, *dropped(result), f"{len(result['benchmarks'])} numbers in {result['seconds']:.0f} s"]


def absent(result: dict) -> str:
    """Return the providers that were dropped for another reason than the budget, by reason, in one line."""
    reasons: dict[str, dict[str, None]] = {}
    for line in result["dropped"]:
        name, _, reason = line.partition(": ")
        if not TOO_LATE.match(reason):
            # Without the commas of labels, because commas separate the providers.
            reasons.setdefault(reason, {})[label(name.rpartition(", ")[2]).replace(",", "")] = None
    return "; ".join(f"{', '.join(names)}: {reason}" for reason, names in reasons.items())


def dropped(result: dict) -> list[str]:
    """Return one line for the absent providers, and one for all numbers that the budget was too short for."""
    found = absent(result)
    lines = [f"absent: {found}"] if found else []
    reasons = [line.partition(": ")[2] for line in result["dropped"]]
    needs = [int(need[1]) for reason in reasons if (need := TOO_LATE.match(reason))]  # seconds
    if needs:
        # On two cores a number needs 5 s, without compilation.
        budget = 60 * round((result["seconds"] + sum(max(5, need) for need in needs)) / 60 + 0.5)
        command = f"make bench BUDGET={budget}"
        if result.get("only"):
            yours = "".join(f" --provider {name}={of}" for name, of in result.get("yours", {}).items())
            yours += f" --adapter {result['adapter']}" if result.get("adapter") else ""
            command = f"python -m benchmarks --only '{result['only']}'{yours} --budget {budget}"
        lines.append(f"the budget was too short for {len(needs)} numbers; {command} measures them too")
    return lines


def components(result: dict) -> list[str]:
    """Return the time of each component of our steps, with its bound."""
    lines = []
    for benchmark in result["benchmarks"]:
        parts = benchmark["extra_info"].get("components", {})
        whole = sum(part["seconds"] for part in parts.values())
        rows = []
        for name, part in sorted(parts.items(), key=lambda item: -item[1]["seconds"]):
            least = f"at least {digits(part['bound'] * 1e3)} ms" if part.get("bound") else ""
            share = f"{part['seconds'] / whole:.1%}"
            rows.append([f"  {name}", f"{digits(part['seconds'] * 1e3)} ms", share, least])
        if rows:
            title = f"{benchmark['group']}, {benchmark['extra_info']['provider']}, time per component:"
            lines += [title, text_table(rows, right=(1, 2))]
    return lines
