"""The providers of a user, next to fused and plain PyTorch: as lines of text and as a section of the page."""

from benchmarks.harness.providers import label
from benchmarks.report.html import paragraph, section, table
from benchmarks.report.numbers import digits
from electra_fast.tables import text_table

TITLE = "Your own kernel"
HEAD = ["case", "provider", "ms", "times as fast as fused", "times as fast as torch", "no number"]


def rows(result: dict) -> list[list[str]]:
    """Return one row per case and provider of a user, with its times and ratios or the reason for none."""
    found = []
    for benchmark in result["benchmarks"]:
        extra = benchmark["extra_info"]
        if "yours" in extra:
            ratios = [_ratio(extra, other) for other in ("fused", "torch")]
            name = label(extra["provider"])
            found.append([benchmark["group"], name, digits(benchmark["stats"]["median"] * 1e3), *ratios, ""])
    for word in ("wrong", "fails", "dropped"):
        for line in result[word]:
            subject, _, reason = line.partition(": ")
            group, _, provider = subject.rpartition(", ")
            if provider in result.get("yours", {}):
                found.append([group, label(provider), "", "", "", f"{word}: {reason}"])
    return found


def _ratio(extra: dict, other: str) -> str:
    """Return another provider's time over this one's, and the 20th and 80th percentile of the rounds."""
    if other not in extra["ratio"]:
        return ""
    spread = extra.get("spread", {}).get(other)
    return f"{extra['ratio'][other]:.2f}" + (f" ({spread[0]:.2f} - {spread[1]:.2f})" if spread else "")


def lines(result: dict) -> list[str]:
    """Return the lines of the table in the terminal."""
    found = rows(result)
    return [f"{TITLE}:", text_table([HEAD, *found], right=(2, 3, 4)), ""] if found else []


def yours(result: dict) -> str:
    """Return the section of the page; it is empty if the run had no provider of a user."""
    found = rows(result)
    if not found:
        return ""
    said = [f"{name} is {source}." for name, source in result.get("yours", {}).items()]
    said.append("It was checked like the others and timed in the same rounds as fused and torch.")
    said.append("Above 1 it is faster; in brackets are the 20th and 80th percentile of single rounds.")
    return section(TITLE, paragraph(" ".join(said)), table(HEAD, found, ("provider", "no number")))
