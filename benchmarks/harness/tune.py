"""Time the launch shapes of attention's kernels on this GPU: `python -m benchmarks tune`.

For each entry of the launch tables in kernels/attention.py, print the fastest shapes and the current one.
The library itself does not tune, so its first call does not take minutes, and all calls give the same bits.
"""

import argparse
from collections.abc import Callable
from itertools import product
from typing import NamedTuple

import torch
import triton
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from benchmarks.harness.machine import device
from electra_fast.kernels import attention as kernels

BLOCKS = tuple(product((16, 32, 64, 128), (32, 64, 128)))
WARPS, STAGES = (4, 8), (1, 2, 3)
FAILURES = (CompilationError, OutOfResources, PTXASError)


class Entry(NamedTuple):
    """An entry of a launch table, and a call that uses it."""

    table: str
    key: int
    dtype: torch.dtype
    D: int
    L: int

    def candidates(self) -> list[tuple[int, ...]]:
        """Return the shapes to try; a tile spans all keys, and in the backward pass all queries too."""
        blocks = [b for b in BLOCKS if b[1] == self.L] if self.table.startswith("TILE") else BLOCKS
        blocks = [b for b in blocks if b[0] == self.L] if self.table == "TILE_BWD" else blocks
        return [(*block, *rest) for block, *rest in product(blocks, WARPS, STAGES)]


def entries() -> list[Entry]:
    bf16, fp32 = torch.bfloat16, torch.float32
    found = [Entry(t, L, bf16, 64, L) for t, L in product(("TILE_FWD", "TILE_BWD"), (64, 128))]
    columns = enumerate([(bf16, 64), (bf16, 128), (fp32, 64), (fp32, 128)])
    found += [Entry(t, c, *column, 512) for t, (c, column) in product(("FWD", "DQ", "DKDV"), columns)]
    small = kernels.architecture() not in (90, 100)
    return found + ([Entry("SMALL_DKDV", 0, bf16, 64, 512)] if small else [])


def calls(entry: Entry, B: int, H: int) -> list[Callable]:
    """Return the calls to time, with dropout and without."""
    shape = (B, entry.L, H, entry.D)
    q, k, v, do = (torch.randn(shape, dtype=entry.dtype, device=device()) for _ in range(4))
    rng = torch.tensor([1, 2], device=q.device)
    rest = [(None, None, entry.L, False, entry.D**-0.5, dropout, rng, 2) for dropout in (0.1, 0.0)]
    if entry.table.endswith("FWD"):
        return [lambda args=args: kernels.attention_fwd(q, k, v, *args) for args in rest]
    kept = [kernels.attention_fwd(q, k, v, *args) for args in rest]
    return [
        lambda o=o, lse=lse, args=args: kernels.attention_bwd(do, q, k, v, o, lse, *args)
        for (o, lse), args in zip(kept, rest, strict=True)
    ]


def ranked(entry: Entry, candidates, clock, B: int, H: int) -> list[tuple[float, tuple[int, ...]]]:
    """Return (ms, shape), the fastest first; a shape that does not compile or fit is left out."""
    table, found = getattr(kernels, entry.table), []
    current, functions = table[entry.key], calls(entry, B, H)
    try:
        for shape in candidates:
            table[entry.key] = shape
            try:
                found.append((sum(clock(function) for function in functions), shape))
            except FAILURES:
                continue
    finally:
        table[entry.key] = current
    return sorted(found)


def main(arguments: list[str]) -> int:
    description = "Time candidate launch shapes of attention's kernels on this GPU, and print the fastest."
    p = argparse.ArgumentParser(prog="python -m benchmarks tune", description=description)
    p.parse_args(arguments)
    if device() != "cuda":
        raise ValueError("tune: the machine must have a GPU, got none")
    for entry in entries():
        found = ranked(entry, entry.candidates(), triton.testing.do_bench, 16384 // entry.L, 12)
        name, current = f"{entry.table}[{entry.key}]", getattr(kernels, entry.table)[entry.key]
        print(f"{name} for {entry.dtype}, D={entry.D}, L={entry.L}: {len(found)} shapes run")
        for rank, (ms, shape) in enumerate(found):
            if rank < 5 or shape == current:
                print(f"  {ms:.4f} ms  {shape}{'  current' if shape == current else ''}", flush=True)
    return 0
