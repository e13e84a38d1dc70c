"""What a multiprocessor of each architecture holds, what it does in a clock, and what that says of a kernel.

Blocks that fit a multiprocessor at a time are the least of

    registers   4 floor(16384 / (32 registers, rounded up to 256)) / warps
    shared      shared memory / (a block's and 1 KiB of the driver's, rounded up to 128)
    threads     threads / (32 warps), and never more than `blocks`

and occupancy is their warps over those that it could hold. The bound is the longest wait of one block, in
clocks of a multiprocessor that is full and overlaps all that it can:

    tensor   FLOPs of its products / those of a clock
    mufu     32 warps MUFU instructions / 16
    memory   32 warps bytes of a thread in global memory / a multiprocessor's share of DRAM
    issue    warps instructions / 4

for the kernel's main part (sass.main_part): one pass of its main loop, or its code outside of loops. Both
sides of a branch count, so does a lane that is masked or loads what another loads, and what a cache serves
counts as DRAM's. So the bound says what a kernel is made of, and compares two versions of it; it predicts no
time.
"""

from typing import NamedTuple

from benchmarks.static import sass

WARP, SCHEDULERS, MUFU = 32, 4, 16
REGISTERS = 16384  # of each of the four schedulers
WAITS = ("tensor", "mufu", "memory", "issue")


class GPU(NamedTuple):
    """A multiprocessor: bytes, threads and blocks that it holds; bfloat16 FLOPs and bytes of DRAM a clock."""

    name: str
    shared: int
    shared_of_block: int
    threads: int
    blocks: int
    flops: int
    moved: float


# By the datasheets, at boost clock; products of sm_86 and 120 at the rate of the workstation boards, which do
# not halve it.
GPUS = {
    80: GPU("A100 80 GB", 164 << 10, 163 << 10, 2048, 32, 2048, 13.4),
    86: GPU("RTX 3090", 100 << 10, 99 << 10, 1536, 16, 1024, 6.7),
    90: GPU("H200", 228 << 10, 227 << 10, 2048, 32, 4096, 18.4),
    100: GPU("B200", 228 << 10, 227 << 10, 2048, 32, 8192, 27.5),
    120: GPU("RTX 5090", 100 << 10, 99 << 10, 1536, 24, 1024, 4.4),
}


def up(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple


def blocks(arch: int, warps: int, registers: int, shared_bytes: int) -> int:
    """Return how many blocks of a kernel one multiprocessor holds."""
    gpu = GPUS[arch]
    return min(
        SCHEDULERS * (REGISTERS // up(WARP * registers, 256)) // warps,
        gpu.shared // up(shared_bytes + 1024, 128),
        gpu.threads // (WARP * warps),
        gpu.blocks,
    )


def occupancy(arch: int, warps: int, registers: int, shared_bytes: int) -> int:
    """Return the warps of those blocks in percent of what the multiprocessor could hold."""
    return 100 * blocks(arch, warps, registers, shared_bytes) * warps * WARP // GPUS[arch].threads


def waits(arch: int, warps: int, part: list[sass.Instruction], tcgen05: float = 0) -> dict[str, int]:
    """Return by what a block waits for, in clocks, for as long as it executes `part` once."""
    gpu = GPUS[arch]
    clocks = {
        "tensor": sass.flops(part, warps, tcgen05) / gpu.flops,
        "mufu": WARP * warps * sass.count(part)["mufu"] / MUFU,
        "memory": WARP * warps * sum(instruction.bytes for instruction in part) / gpu.moved,
        "issue": warps * len(part) / SCHEDULERS,
    }
    return {name: round(clocks[name]) for name in WAITS}


def row(arch: int, warps: int, use: dict, code: list[sass.Instruction], tcgen05: float = 0) -> dict:
    """Return the figures of one compiled kernel: `use` has its registers, spills and shared memory."""
    part = sass.main_part(code)
    return {
        "warps": warps,
        **use,
        "occupancy": occupancy(arch, warps, use["registers"], use["shared_bytes"]),
        "instructions": len(code),
        **sass.count(code),
        "main": len(part),
        **{f"{name}_clocks": clocks for name, clocks in waits(arch, warps, part, tcgen05).items()},
    }


def bound(row: dict) -> tuple[str, int]:
    """Return what a kernel waits for longest, and its clocks."""
    return max(((name, row[f"{name}_clocks"]) for name in WAITS), key=lambda wait: wait[1])
