"""Helpers of the kernels over rows: how a tile is spread over threads, and sums over all rows.

A thread holds COLUMNS_PER_THREAD neighbouring columns of a row, 128 bits of bfloat16, and several such
pieces below each other, so that a sum over these rows needs no other thread. Rows of W columns are a tuple
of blocks ``[BLOCK_T, BLOCK_W]``. A kernel with sums over all rows starts only as many programs as a GPU runs
at once. Each program loops over its tiles and writes one row of partial sums, and `column_sums` adds these
rows. Nothing is atomic, and no sum depends on the order in which programs end.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from electra_fast.kernels._common import cdiv, rounded
from electra_fast.kernels._launch import launch

COLUMNS_PER_THREAD = 8
BLOCK_P, BLOCK_C = 256, 16  # of partial sums: 16 KB in flight per program, which hides most of the latency


def tile_shape(W: int, BLOCK_W: int, rows: int, warps: int) -> dict[str, int]:
    """Return the launch shape for W columns in blocks of BLOCK_W, with `rows` rows per thread."""
    return {"W": W, "BLOCK_T": rows * side(BLOCK_W, warps), "BLOCK_W": BLOCK_W, "num_warps": warps}


def side(BLOCK_W: int, warps: int) -> int:
    """Return SIDE, the number of rows of a tile that different threads hold side by side."""
    return max(32 * COLUMNS_PER_THREAD * warps // BLOCK_W, 1)


def programs(T: int, shape: dict[str, int], registers: int, device: torch.device, blocks: int = 1) -> int:
    """Return how many programs share the tiles of T rows most evenly, per block of columns.

    A GPU runs all of them at once: each quarter of a multiprocessor has 16384 registers.
    """
    warps = 4 * (16384 // (32 * registers)) * multiprocessors(device)
    most = max(warps // (shape["num_warps"] * blocks), 2)
    tiles = cdiv(T, shape["BLOCK_T"])
    return cdiv(tiles, cdiv(tiles, most)) if tiles > 0 else 0


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Return a GPU's number of multiprocessors; 0 for the interpreter, whose programs run in turn."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 0


@triton.jit
def row_offsets(offs_t, T, W: tl.constexpr, BLOCK_W: tl.constexpr):
    """Return the 64-bit offsets of rows `offs_t` and a mask of those elements that exist."""
    offs, mask = (), ()
    for w0 in tl.static_range(0, W, BLOCK_W):
        offs_w = w0 + tl.arange(0, BLOCK_W)
        offs = offs + (offs_t.to(tl.int64)[:, None] * W + offs_w[None, :],)
        mask = mask + ((offs_t < T)[:, None] & (offs_w < W)[None, :],)
    return offs, mask


@triton.jit
def load_rows(x_ptr, offs, mask):
    """Return the rows at `offs` in float32."""
    x = ()
    for i in tl.static_range(len(offs)):
        x = x + (tl.load(x_ptr + offs[i], mask=mask[i], other=0.0).to(tl.float32),)
    return x


@triton.jit
def load_shared_row(x_ptr, W: tl.constexpr, BLOCK_W: tl.constexpr):
    """Return what all rows share, ``[W]``, in float32, as blocks ``[1, BLOCK_W]``."""
    x = ()
    for w0 in tl.static_range(0, W, BLOCK_W):
        offs_w = w0 + tl.arange(0, BLOCK_W)
        x = x + (tl.load(x_ptr + offs_w, mask=offs_w < W, other=0.0).to(tl.float32)[None, :],)
    return x


@triton.jit
def row_sums(x):
    """Return each row's sum over its blocks, ``[BLOCK_T]``."""
    acc = x[0]
    for i in tl.static_range(1, len(x)):
        acc += x[i]
    return tl.sum(acc, axis=1)


@triton.jit
def row_means(x, mask, SHARE: tl.constexpr):
    """Return each row's mean over its 1 / SHARE columns, ``[BLOCK_T, 1]``.

    The mean is m + avg(x - m) with m = avg(x), which has a sum's rounding error. The correction is small,
    and so is its own error: the mean is rounded once, and that of a constant row is the constant. Terms are
    divided before they are added, so no sum overflows.
    """
    parts = ()
    for i in tl.static_range(len(x)):
        parts = parts + (x[i] * SHARE,)
    m = row_sums(parts)[:, None]
    parts = ()
    for i in tl.static_range(len(x)):
        parts = parts + (tl.where(mask[i], (x[i] - m) * SHARE, 0.0),)
    return m + row_sums(parts)[:, None]


@triton.jit
def fold(x, SIDE: tl.constexpr):
    """Add the rows of a tile that one thread holds: ``[BLOCK_T, BLOCK_W]`` to ``[SIDE, BLOCK_W]``."""
    return tl.sum(x.reshape(x.shape[0] // SIDE, SIDE, x.shape[1]), axis=0)


@triton.jit(do_not_specialize=["P"])  # P changes with every packed batch and must not recompile
def _column_sums(
    partial_ptr,  # [outputs, P, W] f32
    first_ptr,  # [W] out
    second_ptr,  # [W] out, or None
    P,
    W: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    offs_w = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    acc = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for p0 in range(0, P, BLOCK_P):
        offs_p = p0 + tl.arange(0, BLOCK_P)
        offs = (tl.program_id(1) * P + offs_p)[:, None] * W + offs_w[None, :]  # [BLOCK_P, BLOCK_C]
        acc += tl.load(partial_ptr + offs, mask=(offs_p < P)[:, None] & (offs_w < W)[None, :], other=0.0)
    sums = tl.sum(acc, axis=0)
    if tl.program_id(1) == 0:
        tl.store(first_ptr + offs_w, rounded(sums, first_ptr.dtype.element_ty), mask=offs_w < W)
    elif second_ptr is not None:
        tl.store(second_ptr + offs_w, rounded(sums, second_ptr.dtype.element_ty), mask=offs_w < W)


def column_sums(partial: Tensor, like: Tensor) -> list[Tensor]:
    """Return the sums over P of partial ``[1 or 2, P, W]``, as one or two tensors like `like`."""
    n, P, W = partial.shape
    sums = [torch.empty_like(like) for _ in range(n)]
    grid = (cdiv(W, BLOCK_C), n)
    outputs = sums if n == 2 else (*sums, None)
    launch(_column_sums, grid, partial, *outputs, P, W=W, BLOCK_P=BLOCK_P, BLOCK_C=BLOCK_C, num_warps=8)
    return sums
