"""What the kernels over rows share: how a tile lies over threads, and sums over all rows.

A thread takes EACH neighbouring columns of a row, 128 bits of bfloat16, and in a tile some such pieces below
each other, so that a sum over their rows stays in the thread. A kernel with sums takes no more programs than
a GPU holds at once. Each goes through its tiles and leaves one row of partial sums, and `column_sums` adds
these up. Nothing is atomic, and no sum depends on the order in which programs end.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from electra_fast.kernels._common import rounded

EACH = 8
BLOCK_P, BLOCK_C = 256, 16  # of partial sums: 16 KB on their way, which hides most of the latency


def tile(W: int, BLOCK_W: int, rows: int, warps: int) -> dict[str, int]:
    """Return the launch shape for rows of W columns in blocks of BLOCK_W, so many rows below each other."""
    return {"W": W, "BLOCK_T": rows * side(BLOCK_W, warps), "BLOCK_W": BLOCK_W, "num_warps": warps}


def side(BLOCK_W: int, warps: int) -> int:
    """Return how many rows of a tile lie side by side, in different threads."""
    return max(32 * EACH * warps // BLOCK_W, 1)


def programs(T: int, shape: dict[str, int], registers: int, device: torch.device, blocks: int = 1) -> int:
    """Return how many programs share the tiles of T rows most evenly, for each of so many blocks of columns.

    A GPU holds all of them at once: a quarter of a multiprocessor has 16384 registers.
    """
    warps = 4 * (16384 // (32 * registers)) * multiprocessors(device)
    most = max(warps // (shape["num_warps"] * blocks), 2)
    tiles = triton.cdiv(T, shape["BLOCK_T"])
    return triton.cdiv(tiles, triton.cdiv(tiles, most)) if tiles > 0 else 0


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Return how many multiprocessors a GPU has, and none for the interpreter, whose programs run in turn."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 0


@triton.jit
def places(t, T, W: tl.constexpr, BLOCK_W: tl.constexpr):
    """Return where in memory the rows t are, in 64 bits, and what of them exists, by blocks of columns."""
    at, inside = (), ()
    for first in tl.static_range(0, W, BLOCK_W):
        w = first + tl.arange(0, BLOCK_W)
        at = at + (t.to(tl.int64)[:, None] * W + w[None, :],)
        inside = inside + ((t < T)[:, None] & (w < W)[None, :],)
    return at, inside


@triton.jit
def load(x_ptr, at, inside):
    """Return rows in float32, by blocks of columns."""
    x = ()
    for i in tl.static_range(len(at)):
        x = x + (tl.load(x_ptr + at[i], mask=inside[i], other=0.0).to(tl.float32),)
    return x


@triton.jit
def load_row(x_ptr, W: tl.constexpr, BLOCK_W: tl.constexpr):
    """Return what all rows share in float32, by blocks of columns."""
    x = ()
    for first in tl.static_range(0, W, BLOCK_W):
        w = first + tl.arange(0, BLOCK_W)
        x = x + (tl.load(x_ptr + w, mask=w < W, other=0.0).to(tl.float32)[None, :],)
    return x


@triton.jit
def total(x):
    """Return each row's sum over all its blocks."""
    acc = x[0]
    for i in tl.static_range(1, len(x)):
        acc += x[i]
    return tl.sum(acc, axis=1)


@triton.jit
def average(x, inside, SHARE: tl.constexpr):
    """Return each row's mean over its 1 / SHARE columns, [rows, 1].

    That is m + avg(x - m) with m = avg(x), a sum's rounding away from the mean. What m lacks is small, and so
    is what rounding it changes: the mean is rounded once, and that of a constant row is the constant. Terms
    are divided before they are added, so no sum overflows.
    """
    parts = ()
    for i in tl.static_range(len(x)):
        parts = parts + (x[i] * SHARE,)
    m = total(parts)[:, None]
    parts = ()
    for i in tl.static_range(len(x)):
        parts = parts + (tl.where(inside[i], (x[i] - m) * SHARE, 0.0),)
    return m + total(parts)[:, None]


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
    sums = tl.sum(acc, axis=0)
    if tl.program_id(1) == 0:
        tl.store(first_ptr + c, rounded(sums, first_ptr.dtype.element_ty), mask=c < W)
    elif second_ptr is not None:
        tl.store(second_ptr + c, rounded(sums, second_ptr.dtype.element_ty), mask=c < W)


def column_sums(partial: Tensor, like: Tensor) -> list[Tensor]:
    """Return the sums of partial [one or two, P, W] over P, tensors like `like`."""
    n, P, W = partial.shape
    sums = [torch.empty_like(like) for _ in range(n)]
    grid = (triton.cdiv(W, BLOCK_C), n)
    _column_sums[grid](
        partial, *sums, *[None] * (2 - n), P, W=W, BLOCK_P=BLOCK_P, BLOCK_C=BLOCK_C, num_warps=8
    )
    return sums
