"""What the kernels of `attention` share: where a sequence lies, its rows read and written, its scores.

Padded and packed batches look alike to a kernel.
"""

import triton
import triton.language as tl
from torch import Tensor

from electra_fast.kernels._common import dot, rounded

LOG2E = tl.constexpr(1.4426950408889634)  # scores are in units of log 2: an exponential is one instruction
LOWEST = tl.constexpr(-3.4028234663852886e38)  # a maximum starts here: from -inf, -inf - -inf would be NaN


def strides(x: Tensor) -> tuple[int, int, int]:
    """Return s such that token t of sequence b, head h, lies at b*s[0] + t*s[1] + h*s[2].

    x is ``[B, L, H, D]`` with t = b*L + l, or packed ``[T, H, D]``.
    """
    *batch, token, head, _ = x.stride()
    return batch[0] - x.shape[1] * token if batch else 0, token, head


@triton.jit
def program(L, H, BLOCK: tl.constexpr):
    """Return (b, h, first, last): this program's sequence, head and block of it; whether b is the last one.

    All in one axis of the grid: others end at 65535.
    """
    blocks = tl.cdiv(L, BLOCK)
    head = tl.program_id(0) // blocks
    last = tl.program_id(0) + blocks * H >= tl.num_programs(0)
    return head // H, head % H, tl.program_id(0) % blocks * BLOCK, last


@triton.jit
def sequence(cu_ptr, b, last, L, T):
    """Return (t0, n, stop, rest) of sequence b: it has n tokens from t0 on.

    Rows from t0 + n up to `stop` belong to nobody and shall hold `rest`: 0 behind the last sequence, NaN in
    place of one whose bounds are bad, which is not read. Where bounds fall both neighbours are bad, or one
    might write over the other's NaN.
    """
    t0, n, stop, rest = b.to(tl.int64) * L, L, b.to(tl.int64) * L, 0.0
    if cu_ptr is not None:
        start, end = tl.load(cu_ptr + b).to(tl.int64), tl.load(cu_ptr + b + 1).to(tl.int64)
        before = tl.load(cu_ptr + tl.maximum(b - 1, 0)).to(tl.int64)
        after = tl.load(cu_ptr + b + 1 + tl.where(last, 0, 1)).to(tl.int64)
        legal = (before <= start) & (start <= end) & (end <= after) & (end - start <= L)
        legal = legal & (end <= T) & tl.where(b > 0, start >= 0, start == 0)
        t0 = tl.where(b == 0, 0, tl.minimum(tl.maximum(start, 0), T))
        n = tl.where(legal, end - start, 0).to(tl.int32)
        stop = tl.where(last, T, tl.minimum(end, T))
        rest = tl.where(legal, 0.0, float("nan"))
    return t0, n, stop, rest


@triton.jit
def visible(mask_ptr, b, first, n, L, BLOCK: tl.constexpr):
    """Return which of a sequence's tokens first .. first + BLOCK are keys to be seen."""
    m = first + tl.arange(0, BLOCK)
    seen = m < n
    if mask_ptr is not None:
        seen = seen & (tl.load(mask_ptr + b.to(tl.int64) * L + m, mask=seen, other=0) != 0)
    return seen


@triton.jit
def place(strides, b, t, h):
    """Return where token t of sequence b begins at head h, in 64 bits."""
    return b.to(tl.int64) * strides[0] + t * strides[1] + h.to(tl.int64) * strides[2]


@triton.jit
def load(x_ptr, at, stride, inside, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load the rows at, at + stride, … of D numbers; 0 where not `inside`, whatever lies there."""
    i, d = tl.arange(0, inside.shape[0]), tl.arange(0, BLOCK_D)
    mask = inside[:, None] & (d < D)[None, :]
    return tl.load(x_ptr + at + (i[:, None] * stride + d[None, :]), mask=mask, other=0.0)


@triton.jit
def store(x_ptr, at, stride, inside, y, D: tl.constexpr, BLOCK_D: tl.constexpr):
    i, d = tl.arange(0, inside.shape[0]), tl.arange(0, BLOCK_D)
    mask = inside[:, None] & (d < D)[None, :]
    tl.store(x_ptr + at + (i[:, None] * stride + d[None, :]), rounded(y, x_ptr.dtype.element_ty), mask=mask)


@triton.jit
def fill(x_ptr, at, stride, rows, value, BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    y = tl.zeros((BLOCK, BLOCK_D), tl.float32) + value
    for first in range(0, rows, BLOCK):
        inside = first + tl.arange(0, BLOCK) < rows
        store(x_ptr, at + first * stride, stride, inside, y, D, BLOCK_D)


@triton.jit
def scores(q, k, scale, first_l, first_m, CAUSAL: tl.constexpr):
    """Return scale * q k^T in units of log 2, -inf where a key comes later than the query."""
    s = dot(q, k.T, tl.zeros((q.shape[0], k.shape[0]), tl.float32)) * (scale * LOG2E)
    if CAUSAL:
        l, m = first_l + tl.arange(0, q.shape[0]), first_m + tl.arange(0, k.shape[0])
        s = tl.where(m[None, :] <= l[:, None], s, float("-inf"))
    return s
