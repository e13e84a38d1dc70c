"""The capacity and the rates of a multiprocessor of each architecture, and a kernel's occupancy and bound.

The number of blocks that are resident on a multiprocessor is the smallest of

    registers   4 floor(16384 / (32 registers, rounded up to 256)) / warps
    shared      shared memory / (a block's plus the driver's 1 KiB, rounded up to 128)
    threads     threads / (32 warps)
    blocks      the limit of the architecture

Occupancy is their warps divided by the warps that the multiprocessor can hold. The bound is the longest of
four times of one block, in clocks of a full multiprocessor that overlaps everything it can:

    tensor   FLOPs of its matrix products / FLOPs per clock
    mufu     32 warps MUFU instructions / 16
    memory   32 warps bytes per thread in global memory / the multiprocessor's share of DRAM bandwidth
    issue    warps instructions / 4

These are computed for the kernel's main part (sass.main_part): one pass of its main loop, or its code outside
of loops. Both sides of a branch count, masked lanes count, repeated loads count, and a cache hit counts as
DRAM traffic. The bound therefore compares two versions of a kernel; it does not predict a time.
"""

from typing import NamedTuple

from benchmarks.static import sass

WARP, SCHEDULERS, MUFU = 32, 4, 16
REGISTERS = 16384  # of each of the four schedulers
WAITS = ("tensor", "mufu", "memory", "issue")


class GPU(NamedTuple):
    """One multiprocessor of a GPU."""

    name: str
    shared: int  # bytes of shared memory
    shared_of_block: int  # bytes that one block can use
    threads: int
    blocks: int
    flops: int  # bfloat16 tensor-core FLOPs per clock
    moved: float  # its share of DRAM bandwidth, bytes per clock


# From the datasheets, at boost clock. sm_86 and sm_120 have the tensor-core rate of the workstation boards;
# consumer boards have half of it.
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
    """Return how many blocks of a kernel are resident on one multiprocessor."""
    gpu = GPUS[arch]
    return min(
        SCHEDULERS * (REGISTERS // up(WARP * registers, 256)) // warps,
        gpu.shared // up(shared_bytes + 1024, 128),
        gpu.threads // (WARP * warps),
        gpu.blocks,
    )


def occupancy(arch: int, warps: int, registers: int, shared_bytes: int) -> int:
    """Return the resident warps as a percentage of the multiprocessor's maximum."""
    return 100 * blocks(arch, warps, registers, shared_bytes) * warps * WARP // GPUS[arch].threads


def waits(arch: int, warps: int, part: list[sass.Instruction], tcgen05: float = 0) -> dict[str, int]:
    """Return the four times of the module's docstring for one pass of `part`, in clocks."""
    gpu = GPUS[arch]
    clocks = {
        "tensor": sass.flops(part, warps, tcgen05) / gpu.flops,
        "mufu": WARP * warps * sass.count(part)["mufu"] / MUFU,
        "memory": WARP * warps * sum(instruction.bytes for instruction in part) / gpu.moved,
        "issue": warps * len(part) / SCHEDULERS,
    }
    return {name: round(clocks[name]) for name in WAITS}


def row(arch: int, warps: int, use: dict, code: list[sass.Instruction], tcgen05: float = 0) -> dict:
    """Return the figures of one compiled kernel; `use` contains its registers, spills and shared memory."""
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
    """Return the name of the longest wait of a kernel, and its clocks."""
    return max(((name, row[f"{name}_clocks"]) for name in WAITS), key=lambda wait: wait[1])
