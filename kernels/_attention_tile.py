"""Helpers of the kernels of `attention`: the bounds of a sequence, tiles of its rows, and its scores.

They hide from a kernel whether the batch is padded or packed.
"""

import triton
import triton.language as tl
from torch import Tensor

from electra_fast.kernels._common import LOG2E, dot, rounded

LOWEST = tl.constexpr(-3.4028234663852886e38)  # initial maximum: after -inf, -inf - -inf would be NaN


def strides(x: Tensor) -> tuple[int, int, int]:
    """Return s such that token t of sequence b, head h, is at offset b*s[0] + t*s[1] + h*s[2].

    x is ``[B, L, H, D]`` with t = b*L + l, or packed ``[T, H, D]``.
    """
    *batch, token, head, _ = x.stride()
    return batch[0] - x.shape[1] * token if batch else 0, token, head


@triton.jit
def program(L, H, BLOCK: tl.constexpr):
    """Return this program's sequence, head and first position, and whether the sequence is the last one.

    The grid has one axis, because the other two are limited to 65535 programs.
    """
    blocks = tl.cdiv(L, BLOCK)
    head = tl.program_id(0) // blocks
    last = tl.program_id(0) + blocks * H >= tl.num_programs(0)
    return head // H, head % H, tl.program_id(0) % blocks * BLOCK, last


@triton.jit
def sequence(cu_seqlens_ptr, b, last, L, T):
    """Return (seq_start, seq_len, fill_end, fill_value) of sequence b: seq_len tokens from seq_start on.

    The tokens from seq_start + seq_len to fill_end belong to no sequence. The caller fills them with
    fill_value: 0 behind the last sequence, NaN in place of one with bad bounds, which is not read. If bounds
    decrease, both neighbours are bad, because otherwise one could overwrite the NaN of the other.
    """
    seq_start, seq_len = b.to(tl.int64) * L, L
    fill_end, fill_value = seq_start, 0.0
    if cu_seqlens_ptr is not None:
        start = tl.load(cu_seqlens_ptr + b).to(tl.int64)
        end = tl.load(cu_seqlens_ptr + b + 1).to(tl.int64)
        before = tl.load(cu_seqlens_ptr + tl.maximum(b - 1, 0)).to(tl.int64)
        after = tl.load(cu_seqlens_ptr + b + 1 + tl.where(last, 0, 1)).to(tl.int64)
        legal = (before <= start) & (start <= end) & (end <= after) & (end - start <= L)
        legal = legal & (end <= T) & tl.where(b > 0, start >= 0, start == 0)
        seq_start = tl.where(b == 0, 0, tl.minimum(tl.maximum(start, 0), T))
        seq_len = tl.where(legal, end - start, 0).to(tl.int32)
        fill_end = tl.where(last, T, tl.minimum(end, T))
        fill_value = tl.where(legal, 0.0, float("nan"))
    return seq_start, seq_len, fill_end, fill_value


@triton.jit
def visible_keys(key_mask_ptr, b, start_n, seq_len, L, BLOCK_N: tl.constexpr):
    """Return which of the keys from position start_n on queries may see, ``[BLOCK_N]``."""
    offs_n = start_n + tl.arange(0, BLOCK_N)
    visible = offs_n < seq_len
    if key_mask_ptr is not None:
        visible = visible & (tl.load(key_mask_ptr + b.to(tl.int64) * L + offs_n, mask=visible, other=0) != 0)
    return visible


@triton.jit
def head_offset(strides, b, t, h):
    """Return the 64-bit offset of token t of sequence b at head h."""
    return b.to(tl.int64) * strides[0] + t * strides[1] + h.to(tl.int64) * strides[2]


@triton.jit
def load_tile(x_ptr, offset, stride, in_rows, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load rows of D numbers from `offset` on; 0 outside `in_rows`, whatever is stored there."""
    offs_r, offs_d = tl.arange(0, in_rows.shape[0]), tl.arange(0, BLOCK_D)
    mask = in_rows[:, None] & (offs_d < D)[None, :]
    return tl.load(x_ptr + offset + (offs_r[:, None] * stride + offs_d[None, :]), mask=mask, other=0.0)


@triton.jit
def store_tile(x_ptr, offset, stride, in_rows, y, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store the rows `in_rows` of y, rounded, from `offset` on."""
    offs_r, offs_d = tl.arange(0, in_rows.shape[0]), tl.arange(0, BLOCK_D)
    mask = in_rows[:, None] & (offs_d < D)[None, :]
    out_ptr = x_ptr + offset + (offs_r[:, None] * stride + offs_d[None, :])
    tl.store(out_ptr, rounded(y, x_ptr.dtype.element_ty), mask=mask)


@triton.jit
def fill_rows(x_ptr, offset, stride, n, value, BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store `value` in n rows from `offset` on."""
    y = tl.zeros((BLOCK, BLOCK_D), tl.float32) + value
    for r0 in range(0, n, BLOCK):
        in_rows = r0 + tl.arange(0, BLOCK) < n
        store_tile(x_ptr, offset + r0 * stride, stride, in_rows, y, D, BLOCK_D)


@triton.jit
def scores(q, k, scale, start_m, start_n, CAUSAL: tl.constexpr):
    """Return scale * q k^T in units of log 2, -inf for a key later than the query, ``[BLOCK_M, BLOCK_N]``."""
    s = dot(q, k.T, tl.zeros((q.shape[0], k.shape[0]), tl.float32)) * (scale * LOG2E)
    if CAUSAL:
        offs_m, offs_n = start_m + tl.arange(0, q.shape[0]), start_n + tl.arange(0, k.shape[0])
        s = tl.where(offs_n[None, :] <= offs_m[:, None], s, float("-inf"))
    return s
