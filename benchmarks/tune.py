"""Time the launch shapes of attention's kernels on this GPU: `python -m benchmarks.tune`.

Prints, for each row of the tables in kernels/attention.py, the fastest candidates and what stands there now.
The library itself never tunes: so a first call takes no minutes, and all calls give the same bits.
"""

import sys
from collections.abc import Callable
from itertools import product
from typing import NamedTuple

import torch
import triton
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from benchmarks.machine import device
from electra_fast.kernels import attention as kernels

BLOCKS = tuple(product((16, 32, 64, 128), (32, 64, 128)))
WARPS, STAGES = (4, 8), (1, 2, 3)
FAILURES = (CompilationError, OutOfResources, PTXASError)


class Row(NamedTuple):
    """A place in a table, and the calls that it serves."""

    table: str
    key: int
    dtype: torch.dtype
    D: int
    L: int

    def candidates(self) -> list[tuple[int, ...]]:
        """Return shapes to try; a tile has all keys, and backward's all queries."""
        blocks = [b for b in BLOCKS if b[1] == self.L] if self.table.startswith("TILE") else BLOCKS
        blocks = [b for b in blocks if b[0] == self.L] if self.table == "TILE_BWD" else blocks
        return [(*block, *rest) for block, *rest in product(blocks, WARPS, STAGES)]


def rows() -> list[Row]:
    tiles = [Row(t, L, torch.bfloat16, 64, L) for t, L in product(("TILE_FWD", "TILE_BWD"), (64, 128))]
    columns = [(torch.bfloat16, 64), (torch.bfloat16, 128), (torch.float32, 64), (torch.float32, 128)]
    tables = ("FWD", "DQ", "DKDV")
    small = [] if kernels.architecture() in (90, 100) else [Row("SMALL_DKDV", 0, *columns[0], 512)]
    return tiles + [Row(t, c, *column, 512) for t, (c, column) in product(tables, enumerate(columns))] + small


def calls(row: Row, B: int, H: int) -> list[Callable]:
    """Return the calls to time, with dropout and without."""
    shape = (B, row.L, H, row.D)
    q, k, v, do = (torch.randn(shape, dtype=row.dtype, device=device()) for _ in range(4))
    rng = torch.tensor([1, 2], device=q.device)
    sites = [(None, None, row.L, False, row.D**-0.5, dropout, rng, 2) for dropout in (0.1, 0.0)]
    if row.table.endswith("FWD"):
        return [lambda site=site: kernels.attention_fwd(q, k, v, *site) for site in sites]
    kept = [kernels.attention_fwd(q, k, v, *site) for site in sites]
    return [
        lambda o=o, lse=lse, site=site: kernels.attention_bwd(do, q, k, v, o, lse, *site)
        for (o, lse), site in zip(kept, sites, strict=True)
    ]


def ranked(row: Row, candidates, clock, B: int, H: int) -> list[tuple[float, tuple[int, ...]]]:
    """Return (ms, shape) from the fastest on; a shape that does not compile or fit is left out."""
    table, found = getattr(kernels, row.table), []
    now, functions = table[row.key], calls(row, B, H)
    try:
        for shape in candidates:
            table[row.key] = shape
            try:
                found.append((sum(clock(function) for function in functions), shape))
            except FAILURES:
                continue
    finally:
        table[row.key] = now
    return sorted(found)


def main() -> None:
    if device() != "cuda":
        sys.exit("benchmarks.tune: needs a GPU, this machine has none")
    for row in rows():
        found = ranked(row, row.candidates(), triton.testing.do_bench, 16384 // row.L, 12)
        now = getattr(kernels, row.table)[row.key]
        print(f"{row.table}[{row.key}] for {row.dtype}, D={row.D}, L={row.L}: {len(found)} shapes run")
        for place, (ms, shape) in enumerate(found):
            if place < 5 or shape == now:
                print(f"  {ms:.4f} ms  {shape}{'  now' if shape == now else ''}", flush=True)


if __name__ == "__main__":
    main()
