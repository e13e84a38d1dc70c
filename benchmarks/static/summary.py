"""The figures as a table: one line per kernel and GPU, with all its variants."""

import collections
from typing import NamedTuple

from benchmarks.static import figures, gpus, sass
from electra_fast.tables import text_table

MIX = (*sass.CLASSES, "other")
HEAD = ["kernel", "GPU", "variants", "warps", "registers", "spilled", "shared bytes", "occupancy"]
HEAD += ["bound, clocks", *MIX]


class Line(NamedTuple):
    """One kernel on one GPU: all its variants, and the variant with the longest wait."""

    name: str
    arch: int
    rows: list[dict]
    heaviest: dict

    def cells(self) -> list[str]:
        """Return the cells of HEAD: ranges and sums over all variants, bound and mix of the heaviest one."""
        return [
            self.name,
            f"sm_{self.arch}",
            str(len(self.rows)),
            self.span("warps"),
            self.span("registers"),
            str(self.spilled),
            self.span("shared_bytes"),
            f"{self.occupancy}%",
            "{} {}".format(*gpus.bound(self.heaviest)),
            *(f"{share:.0%}" for share in self.mix().values()),
        ]

    @property
    def spilled(self) -> int:
        return sum(row["spill_bytes"] for row in self.rows)

    @property
    def occupancy(self) -> int:
        return min(row["occupancy"] for row in self.rows)

    def mix(self) -> dict[str, float]:
        """Return the share of each class of instructions."""
        return {name: self.heaviest[name] / self.heaviest["instructions"] for name in MIX}

    def span(self, column: str) -> str:
        low, high = (least(row[column] for row in self.rows) for least in (min, max))
        return f"{low}" if low == high else f"{low}..{high}"


def lines(rows: list[dict], every: bool = False) -> list[Line]:
    """Return one line per kernel and GPU, or per variant if `every`; most spills, least occupancy first."""
    found = collections.defaultdict(list)
    for row in rows:
        name = f"{row['kernel']}{', CUDA' * (figures.compiler(row) == 'nvcc')}"
        found[f"{name} ({row['variant']}, {row['shape']})" if every else name, row["arch"]].append(row)
    made = [Line(*key, some, max(some, key=lambda row: gpus.bound(row)[1])) for key, some in found.items()]
    return sorted(made, key=lambda line: (-line.spilled, line.occupancy, line.name, line.arch))


def table(rows: list[dict], every: bool = False) -> str:
    return text_table([HEAD, *(line.cells() for line in lines(rows, every))], right=range(1, len(HEAD)))
