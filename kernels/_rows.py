"""What the kernels over rows share: how a tile lies over threads, and sums over all rows.

A thread takes EACH neighbouring columns of a row, 128 bits of bfloat16, and ROWS such pieces of a tile, below
each other, so that a sum over these rows stays in the thread. A kernel with sums takes no more programs than
a GPU holds at once. Each goes through its tiles and leaves one row of partial sums, and `column_sums` adds
these up. Nothing is atomic, and no sum depends on the order in which programs end.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

EACH, ROWS = 8, 4
WARPS = 24  # of a multiprocessor that the programs of a kernel with sums take, at 80 registers a thread
BLOCK_P, BLOCK_C = 256, 16  # of partial sums: 16 KB on their way, which hides most of the latency


def tile(W: int, widest: int) -> dict[str, int]:
    """Return the launch shape for rows of W columns, or for blocks of `widest` columns of them.

    SIDE rows of a tile of BLOCK_T lie side by side, in different threads.
    """
    BLOCK_W = triton.next_power_of_2(min(max(W, 32), widest))
    warps = min(max(BLOCK_W // (32 * EACH), 4), 32)
    side = max(32 * EACH * warps // BLOCK_W, 1)
    rows = max(32 * EACH * ROWS * warps // BLOCK_W, 1)
    return {"W": W, "BLOCK_T": rows, "SIDE": side, "BLOCK_W": BLOCK_W, "num_warps": warps}


def programs(T: int, shape: dict[str, int], device: torch.device) -> int:
    """Return how many programs share the tiles of T rows, as evenly as can be."""
    tiles, blocks = triton.cdiv(T, shape["BLOCK_T"]), triton.cdiv(shape["W"], shape["BLOCK_W"])
    most = max(multiprocessors(device) * WARPS // (shape["num_warps"] * blocks), 1)
    return triton.cdiv(tiles, triton.cdiv(tiles, most)) if tiles > 0 else 0


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Return how many multiprocessors a GPU has; 1 for the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@triton.jit
def fold(x, SIDE: tl.constexpr):
    """Return the sums of a tile's rows that lie below each other, [SIDE, columns]."""
    return tl.sum(x.reshape(x.shape[0] // SIDE, SIDE, x.shape[1]), axis=0)


@triton.jit(do_not_specialize=["P"])  # it changes with every packed batch, and must not recompile
def _column_sums(
    partial_ptr,  # [outputs, P, W] f32
    first_ptr,  # [W] out
    second_ptr,  # [W] out, or None
    P,
    W: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    acc = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for first in range(0, P, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)
        at = (tl.program_id(1) * P + p)[:, None] * W + c[None, :]
        acc += tl.load(partial_ptr + at, mask=(p < P)[:, None] & (c < W)[None, :], other=0.0)
    total = tl.sum(acc, axis=0)
    if tl.program_id(1) == 0:
        tl.store(first_ptr + c, total.to(first_ptr.dtype.element_ty), mask=c < W)
    elif second_ptr is not None:
        tl.store(second_ptr + c, total.to(second_ptr.dtype.element_ty), mask=c < W)


def column_sums(partial: Tensor, like: Tensor) -> list[Tensor]:
    """Return the sums of partial [one or two, P, W] over P, tensors like `like`."""
    n, P, W = partial.shape
    sums = [torch.empty_like(like) for _ in range(n)]
    grid = (triton.cdiv(W, BLOCK_C), n)
    _column_sums[grid](
        partial, *sums, *[None] * (2 - n), P, W=W, BLOCK_P=BLOCK_P, BLOCK_C=BLOCK_C, num_warps=8
    )
    return sums
