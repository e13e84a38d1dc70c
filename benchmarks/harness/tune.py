"""Time the launch shapes of a kernel on this GPU: `python -m benchmarks tune attention`, or `linear_gelu`.

For each entry of the launch tables in kernels/<op>.py, print the fastest shapes and the current one. The
library itself does not tune, so its first call does not take minutes, and all calls give the same bits.
"""

import argparse
from collections.abc import Callable
from itertools import product
from types import ModuleType
from typing import NamedTuple

import torch
import triton
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from benchmarks.harness.machine import device
from electra_fast.kernels import _linear_gelu as linear_gelu
from electra_fast.kernels import attention

BLOCKS = tuple(product((16, 32, 64, 128), (32, 64, 128)))
WARPS, STAGES = (4, 8), (1, 2, 3)
FAILURES = (CompilationError, OutOfResources, PTXASError)
TOKENS = 16384
Shape = tuple[int, ...]


class Entry(NamedTuple):
    """An entry of a launch table, the shapes to try, and the calls that use it."""

    kernels: ModuleType
    table: str
    key: int
    use: str  # the arguments that this entry is for
    candidates: list[Shape]
    calls: Callable[[], list[Callable]]  # makes the arguments

    @property
    def current(self) -> Shape:
        return getattr(self.kernels, self.table)[self.key]


def of_attention(
    table: str, key: int, dtype: torch.dtype, D: int, L: int, B: int | None = None, H: int = 12
) -> Entry:
    """Return an entry of attention; a tile spans all keys, and in the backward pass all queries too.

    The tables of few queries have one.
    """
    few = table.startswith("FEW")
    blocks = [b for b in BLOCKS if b[1] == L] if "TILE" in table else BLOCKS
    blocks = [b for b in blocks if b[0] == L] if table == "TILE_BWD" else blocks
    blocks = [b for b in blocks if b[0] == 16] if few else blocks
    shapes = [(*block, *rest) for block, *rest in product(blocks, WARPS, STAGES)]

    def calls() -> list[Callable]:
        """Return the calls with dropout and without."""
        shape = (TOKENS // L if B is None else B, L, H, D)
        q, k, v, do = (torch.randn(shape, dtype=dtype, device=device()) for _ in range(4))
        q = q[:, :1] if few else q
        rng = torch.tensor([1, 2], device=q.device)
        rest = [(None, None, q.shape[1], False, D**-0.5, p, rng, 2, None, L) for p in (0.1, 0.0)]
        if few or table.endswith("FWD"):
            return [lambda args=args: attention.attention_fwd(q, k, v, *args) for args in rest]
        kept = [attention.attention_fwd(q, k, v, *args) for args in rest]
        return [
            lambda o=o, lse=lse, args=args: attention.attention_bwd(do, q, k, v, o, lse, *args)
            for (o, lse), args in zip(kept, rest, strict=True)
        ]

    return Entry(attention, table, key, f"{dtype}, D={D}, L={L}", shapes, calls)


def attention_entries() -> list[Entry]:
    bf16, fp32 = torch.bfloat16, torch.float32
    tiles = ("TILE_FWD", "FEW_TILE", "TILE_BWD")
    found = [of_attention(t, L, bf16, 64, L) for t, L in product(tiles, (64, 128))]
    columns = enumerate([(bf16, 64), (bf16, 128), (fp32, 64), (fp32, 128)])
    loops = ("FWD", "FEW", "DQ", "DKDV")
    found += [of_attention(t, c, *column, 512) for t, (c, column) in product(loops, columns)]
    small = attention.architecture() not in (90, 100)
    return found + ([of_attention("SMALL_DKDV", 0, bf16, 64, 512)] if small else [])


# The shapes that do not spill on sm_90, and those of the launch tables.
FORWARD = [(128, 128, 64, 8, 3), (128, 128, 64, 8, 4), (128, 128, 32, 8, 4), (128, 128, 64, 4, 3)]
FORWARD += [(128, 256, 64, 8, 3), (256, 128, 64, 8, 3), (128, 64, 64, 4, 4), (128, 64, 32, 8, 3)]
DX = [(128, 64, 8, 2), (128, 32, 8, 2), (64, 64, 4, 2), (64, 64, 8, 2), (64, 32, 8, 2), (64, 32, 4, 2)]


def of_linear_gelu(table: str, key: int, dtype: torch.dtype, K: int, N: int, T: int = TOKENS) -> Entry:
    """Return an entry of linear_gelu: the forward pass of training, or the backward pass with cuBLAS."""

    def calls() -> list[Callable]:
        shapes = ((T, K), (N, K), (N,), (T, N))
        x, weight, bias, dy = (torch.randn(shape, dtype=dtype, device=device()) for shape in shapes)
        _, h = linear_gelu.linear_gelu_fwd(x, weight, bias, True)
        if table == "FORWARD":
            return [lambda: linear_gelu.linear_gelu_fwd(x, weight, bias, True)]
        return [lambda: linear_gelu.linear_gelu_bwd(dy, x, weight, bias, h)]

    shapes = FORWARD if table == "FORWARD" else DX
    return Entry(linear_gelu, table, key, f"{dtype}, K={K}, N={N}", shapes, calls)


def linear_gelu_entries() -> list[Entry]:
    bf16 = torch.bfloat16
    sizes = ((256, 1024), (768, 3072), (1024, 4096))  # small, base, large
    found = [of_linear_gelu("FORWARD", 0, bf16, K, N) for K, N in sizes]
    small = int(linear_gelu.architecture() not in (90, 100))
    return [*found, of_linear_gelu("DX", small, bf16, 256, 1024)]


ENTRIES = {"attention": attention_entries, "linear_gelu": linear_gelu_entries}


def ranked(entry: Entry, clock: Callable[[Callable], float]) -> list[tuple[float, Shape]]:
    """Return (ms, shape), the fastest first; a shape that does not compile or fit is left out."""
    table, found = getattr(entry.kernels, entry.table), []
    current, functions = entry.current, entry.calls()
    try:
        for shape in entry.candidates:
            table[entry.key] = shape
            try:
                found.append((sum(clock(function) for function in functions), shape))
            except FAILURES:
                continue
    finally:
        table[entry.key] = current
    return sorted(found)


def main(arguments: list[str]) -> int:
    description = "Time candidate launch shapes of a kernel on this GPU, and print the fastest."
    p = argparse.ArgumentParser(prog="python -m benchmarks tune", description=description)
    p.add_argument("op", choices=ENTRIES)
    op = p.parse_args(arguments).op
    if device() != "cuda":
        raise ValueError("tune: the machine must have a GPU, got none")
    for entry in ENTRIES[op]():
        found = ranked(entry, triton.testing.do_bench)
        print(f"{entry.table}[{entry.key}] for {entry.use}: {len(found)} shapes run")
        for rank, (ms, shape) in enumerate(found):
            if rank < 5 or shape == entry.current:
                print(f"  {ms:.4f} ms  {shape}{'  current' if shape == entry.current else ''}", flush=True)
    return 0
