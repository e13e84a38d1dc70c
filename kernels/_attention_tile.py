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
def bounds(cu_seqlens_ptr, b, last, L, T):
    """Return (start, length, end, legal) of sequence b of a packed batch of T tokens.

    `end` is within the batch, and behind the tokens that belong to no sequence, if the sequence is the last.
    It is not legal if its bounds are bad. If bounds decrease, both neighbours are bad, because otherwise one
    could overwrite the NaN of the other.
    """
    start = tl.load(cu_seqlens_ptr + b).to(tl.int64)
    end = tl.load(cu_seqlens_ptr + b + 1).to(tl.int64)
    before = tl.load(cu_seqlens_ptr + tl.maximum(b - 1, 0)).to(tl.int64)
    after = tl.load(cu_seqlens_ptr + b + 1 + tl.where(last, 0, 1)).to(tl.int64)
    legal = (before <= start) & (start <= end) & (end <= after) & (end - start <= L)
    legal = legal & (end <= T) & tl.where(b > 0, start >= 0, start == 0)
    first = tl.where(b == 0, 0, tl.minimum(tl.maximum(start, 0), T))
    return first, end - start, tl.where(last, T, tl.minimum(end, T)), legal


@triton.jit
def sequences(cu_seqlens_ptr, cu_seqlens_k_ptr, key_strides, b, last, L, T, K, S, CAUSAL: tl.constexpr):
    """Return (start, length, end) of the queries of sequence b, the same of its keys, and fill_value.

    The tokens from start + length to `end` are not computed. The caller fills them with fill_value: 0 behind
    the last sequence, NaN in place of a bad one, whose length is 0. It has bad bounds, of queries or of keys,
    or is causal with more queries than keys.
    """
    if cu_seqlens_ptr is None:
        q_start, q_len = b.to(tl.int64) * L, L
        k_start, k_len = q_start, q_len
        if key_strides is not None:
            k_start, k_len = b.to(tl.int64) * K, K
        return q_start, q_len, q_start, k_start, k_len, k_start, 0.0
    else:
        q_start, q_len, q_end, legal = bounds(cu_seqlens_ptr, b, last, L, T)
        k_start, k_len, k_end = q_start, q_len, q_end
        if key_strides is not None:
            k_start, k_len, k_end, k_legal = bounds(cu_seqlens_k_ptr, b, last, K, S)
            legal = legal & k_legal
            if CAUSAL:
                legal = legal & (q_len <= k_len)
        q_len, k_len = tl.where(legal, q_len, 0).to(tl.int32), tl.where(legal, k_len, 0).to(tl.int32)
        return q_start, q_len, q_end, k_start, k_len, k_end, tl.where(legal, 0.0, float("nan"))


@triton.jit
def visible_keys(key_mask_ptr, b, start_n, k_len, BLOCK_N: tl.constexpr):
    """Return which of the keys from position start_n on queries may see, ``[BLOCK_N]``.

    Only a padded batch has a mask, of k_len keys per sequence.
    """
    offs_n = start_n + tl.arange(0, BLOCK_N)
    visible = offs_n < k_len
    if key_mask_ptr is not None:
        mask_ptr = key_mask_ptr + b.to(tl.int64) * k_len
        visible = visible & (tl.load(mask_ptr + offs_n, mask=visible, other=0) != 0)
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
def scores(q, k, scale, position, start_n, CAUSAL: tl.constexpr):
    """Return scale * q k^T in units of log 2, -inf for a key later than the query, ``[BLOCK_M, BLOCK_N]``.

    `position` is that of the first query among the keys, `start_n` that of the first key.
    """
    s = dot(q, k.T, tl.zeros((q.shape[0], k.shape[0]), tl.float32)) * (scale * LOG2E)
    if CAUSAL:
        offs_m, offs_n = position + tl.arange(0, q.shape[0]), start_n + tl.arange(0, k.shape[0])
        s = tl.where(offs_n[None, :] <= offs_m[:, None], s, float("-inf"))
    return s
