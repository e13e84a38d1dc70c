"""Compare two runs on one machine, or two commits: find the cases that got slower beyond both spreads.

A case is slower if our median grew by more than the threshold, if its 20th percentile is above the earlier
80th percentile, and if our advantage over plain PyTorch shrank by the threshold too. The last condition
excludes a machine that is slower as a whole.
"""

import argparse
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from benchmarks.harness.machine import info
from benchmarks.harness.providers import OURS, label
from benchmarks.report.numbers import between, digits
from benchmarks.report.runs import case, groups, headline, read
from benchmarks.report.text import grouped
from electra_fast.errors import must

THRESHOLD = 0.05  # a smaller change counts as none
SAME = ("device", "device_name", "threads", "cpu_capability", "torch")


class Change(NamedTuple):
    group: str
    provider: str
    before: dict
    after: dict

    @property
    def time(self) -> float:
        """The median after over that before."""
        return self.after["stats"]["median"] / self.before["stats"]["median"]

    @property
    def ratios(self) -> tuple[float, float] | None:
        """How many times as fast as plain PyTorch, before and after, in the same rounds."""
        found = [one["extra_info"]["ratio"] for one in (self.before, self.after)]
        plain = next((p for p in ("torch", "reference") if all(p in ratio for ratio in found)), None)
        return (found[0][plain], found[1][plain]) if plain else None

    @property
    def counts(self) -> bool:
        """Whether it is one of ours, or a provider of a user."""
        return self.provider in OURS or "yours" in self.after["extra_info"]

    def verdict(self, threshold: float) -> str:
        """Return "slower", "faster" or an empty string."""
        old, new = self.before["extra_info"], self.after["extra_info"]
        lost = self.ratios[0] / self.ratios[1] if self.ratios else self.time
        if not self.counts:
            return ""
        if min(self.time, lost) > 1 + threshold and new["p20"] > old["p80"]:
            return "slower"
        if max(self.time, lost) < 1 - threshold and new["p80"] < old["p20"]:
            return "faster"
        return ""


def check(name: str, result: dict, other_name: str, other: dict) -> None:
    """Refuse results that cannot be compared."""
    for key in SAME:
        values = [run["machine_info"].get(key) for run in (result, other)]
        if values[0] != values[1]:
            got = f"{values[0]!r} in {name} and {values[1]!r} in {other_name}"
            raise ValueError(must(f"compare: {key}", "be the same in both", got, "use one machine for both"))
    for file, run in ((name, result), (other_name, other)):
        if run["wrong"]:
            raise ValueError(must("compare: results", "be right", f"{run['wrong'][0]!r} in {file}"))


def baseline(file: Path, ops: Collection[str]) -> dict:
    """Return a stored run with which one that starts now can be compared; `ops` are those that it times."""
    before = read(file)
    check(str(file), before, "this process", {"machine_info": info(), "wrong": []})
    if ops and not any(case(group).op in ops for group in groups(before)):
        raise ValueError(must("benchmarks: --baseline", f"contain {' or '.join(ops)}", f"{file} without it"))
    return before


def changes(before: dict, after: dict) -> list[Change]:
    """Return the cases that both runs have timed."""
    old, new = groups(before), groups(after)
    return [
        Change(group, provider, old[group][provider], benchmark)
        for group in new
        for provider, benchmark in new[group].items()
        if isinstance(benchmark, dict) and isinstance(old.get(group, {}).get(provider), dict)
    ]


def table(found: list[Change], threshold: float) -> str:
    rows: dict[str, list[list[str]]] = {}
    for c in found:
        old, new = (f"{digits(b['stats']['median'] * 1e3)} ({between(b['extra_info'])})" for b in c[2:])
        ratios = f"{c.ratios[0]:.2f} -> {c.ratios[1]:.2f}" if c.ratios and c.counts else ""
        row = [label(c.provider), old, new, f"{c.time - 1:+.1%}", ratios, c.verdict(threshold)]
        rows.setdefault(c.group, []).append(row)
    head = ["provider", "before, ms (p20 - p80)", "after", "change", "x plain", ""]
    return "\n".join(grouped(head, rows, right=range(1, 5)))


def show(before: dict, after: dict, threshold: float) -> int:
    """Print the comparison; return 1 if one of our providers, or one of a user, got slower."""
    found = changes(before, after)
    if not found:
        raise ValueError("compare: results must have a case in common, got none; measure the same cases")
    print(f"before: {headline(before)}\nafter:  {headline(after)}\n\n{table(found, threshold)}\n")
    known = {(c.group, c.provider) for c in found}
    for word, run in (("before", before), ("after", after)):
        alone = [f"{g}, {p}" for g, of in groups(run).items() for p in of if (g, p) not in known]
        print("\n".join(f"only {word}: {line}" for line in alone), end="\n" if alone else "")
    slower = [c for c in found if c.verdict(threshold) == "slower"]
    print(f"{len(slower)} of {len(found)} got slower by more than {threshold:.0%} and beyond both spreads")
    return 1 if slower else 0


def share(text: str) -> float:
    """Read a threshold: 5% or 0.05."""
    return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)


def main(arguments: list[str]) -> int:
    p = argparse.ArgumentParser(prog="python -m benchmarks compare", description=__doc__.split("\n")[0])
    p.add_argument("files", nargs="*", type=Path, metavar="JSON", help="the results before, and after")
    p.add_argument("--base", metavar="REV", help="build and time this commit and the working tree instead")
    p.add_argument("--threshold", type=share, default=THRESHOLD, metavar="5%%", help="ignore smaller changes")
    p.add_argument("--only", metavar="SUBSTRING", help="with --base: only cases whose name contains this")
    p.add_argument(
        "--budget", type=float, default=60.0, metavar="SECONDS", help="with --base: seconds per process"
    )
    options = p.parse_args(arguments)
    if options.base and not options.files:
        from benchmarks.harness.commits import measured

        before, after = measured(options.base, options.only, options.budget)
        names = (options.base, "the working tree")
    elif len(options.files) == 2 and not options.base:
        before, after = map(read, options.files)
        names = tuple(map(str, options.files))
    else:
        got = f"{len(options.files)} files"
        raise ValueError(must("compare: the arguments", "be two files, or --base", got, "see --help"))
    check(names[0], before, names[1], after)
    return show(before, after, options.threshold)
