"""Two runs of one machine, or two commits on this one: what got slower beyond the spread of both.

A case is slower where the median of ours grew by more than the threshold, its 20th percentile is above the
80th of before, and its advantage over the plain form shrank by the threshold too: a machine that is slower
today slows both.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

from benchmarks.providers import OURS, label
from benchmarks.report.numbers import between, digits
from benchmarks.report.runs import groups, headline, read

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
        """How many times as fast as the plain form, before and after, in the same rounds."""
        found = [one["extra_info"]["ratio"] for one in (self.before, self.after)]
        plain = next((p for p in ("torch", "reference") if all(p in ratio for ratio in found)), None)
        return (found[0][plain], found[1][plain]) if plain else None

    def verdict(self, threshold: float) -> str:
        """Say "slower", "faster" or nothing."""
        old, new = self.before["extra_info"], self.after["extra_info"]
        lost = self.ratios[0] / self.ratios[1] if self.ratios else self.time
        if self.provider not in OURS:
            return ""
        if min(self.time, lost) > 1 + threshold and new["p20"] > old["p80"]:
            return "slower"
        if max(self.time, lost) < 1 - threshold and new["p80"] < old["p20"]:
            return "faster"
        return ""


def check(name: str, result: dict, other_name: str, other: dict) -> None:
    """Refuse results that say nothing about each other."""
    for key in SAME:
        values = [run["machine_info"].get(key) for run in (result, other)]
        if values[0] != values[1]:
            raise ValueError(
                f"compare: {key} must be the same in both, got {values[0]!r} in {name} and {values[1]!r} in "
                f"{other_name}; measure both on one machine"
            )
    for file, run in ((name, result), (other_name, other)):
        if run["wrong"]:
            raise ValueError(f"compare: results must be right, got in {file} the wrong {run['wrong'][0]!r}")


def changes(before: dict, after: dict) -> list[Change]:
    """Return what both have timed."""
    old, new = groups(before), groups(after)
    return [
        Change(group, provider, old[group][provider], benchmark)
        for group in new
        for provider, benchmark in new[group].items()
        if isinstance(benchmark, dict) and isinstance(old.get(group, {}).get(provider), dict)
    ]


def table(found: list[Change], threshold: float) -> str:
    lines, group = [], ""
    for c in found:
        lines += ["", c.group] if c.group != group else []
        group = c.group
        old, new = (f"{digits(b['stats']['median'] * 1e3)} ({between(b['extra_info'])})" for b in c[2:])
        ratios = f"{c.ratios[0]:.2f} -> {c.ratios[1]:.2f}" if c.ratios and c.provider in OURS else ""
        row = f"  {label(c.provider):26} {old:>26}  {new:>26} {c.time - 1:>+8.1%}  {ratios:>14}"
        lines.append(f"{row}  {c.verdict(threshold)}".rstrip())
    head = f"  {'provider':26} {'before, ms (p20 - p80)':>26}  {'after':>26} {'change':>8}  {'x plain':>14}"
    return "\n".join([head, *lines])


def show(before: dict, after: dict, threshold: float) -> int:
    """Print both; return 1 if one of ours got slower."""
    found = changes(before, after)
    if not found:
        raise ValueError("compare: both results must have a case in common, got none; measure the same ones")
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
    p.add_argument("--base", metavar="REV", help="a commit, against the working tree: builds and times both")
    p.add_argument("--threshold", type=share, default=0.05, metavar="5%%", help="less is no change")
    p.add_argument("--only", metavar="SUBSTRING", help="with --base: only cases whose name holds this")
    p.add_argument(
        "--budget", type=float, default=60.0, metavar="SECONDS", help="with --base: of each process"
    )
    options = p.parse_args(arguments)
    if options.base and not options.files:
        from benchmarks.commits import measured

        before, after = measured(options.base, options.only, options.budget)
        names = (options.base, "the working tree")
    elif len(options.files) == 2 and not options.base:
        before, after = map(read, options.files)
        names = tuple(map(str, options.files))
    else:
        raise ValueError(
            f"compare: there must be two files or --base, got {len(options.files)} files; see --help"
        )
    check(names[0], before, names[1], after)
    return show(before, after, options.threshold)
