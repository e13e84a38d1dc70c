"""Forward of `attention`: all keys in one tile, or an online softmax over blocks of keys."""

import triton
import triton.language as tl

from electra_fast.kernels._attention_tile import (
    LOWEST,
    fill_rows,
    head_offset,
    load_tile,
    program,
    scores,
    sequence,
    store_tile,
    visible_keys,
)
from electra_fast.kernels._common import LOG2E, dot, keep, rounded


@triton.jit
def _finish(o_ptr, lse_ptr, acc, m_i, l_i, keep_scale, row, in_m, H, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store acc / l_i and the log-sum-exp.

    For a query that sees no key they are 0 and inf, so that backward's exp(s - lse) is 0.
    """
    divisor = tl.where(l_i == 0, 1.0, l_i)
    store_tile(o_ptr, row * D, H * D, in_m, acc * (keep_scale / divisor)[:, None], D, BLOCK_D)
    lse = tl.where(l_i == 0, float("inf"), (m_i + tl.log2(divisor)) / LOG2E)
    tl.store(lse_ptr + row + tl.arange(0, acc.shape[0]) * H, lse, mask=in_m)


@triton.jit(do_not_specialize=["L", "T", "threshold", "dropout_stream"])
def attention_fwd_tile(
    q_ptr,  # [.., H, D] by `strides`, as k and v
    k_ptr,
    v_ptr,
    o_ptr,  # [.., H, D] out, contiguous
    lse_ptr,  # [.., H] f32 out
    key_mask_ptr,  # [B, L] uint8, or None: every key is visible
    cu_seqlens_ptr,  # [B + 1], or None for a padded batch
    rng_ptr,  # [2] i64: seed, step; or None without dropout
    strides,
    L,  # length of a padded sequence, maximal length of a packed one
    T,
    H,
    scale,
    threshold,
    keep_scale,
    dropout_stream,
    CAUSAL: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    b, h, start_m, last = program(L, H, BLOCK_M)
    seq_start, seq_len, fill_end, fill_value = sequence(cu_seqlens_ptr, b, last, L, T)
    if cu_seqlens_ptr is not None:
        if start_m == 0:
            offset = ((seq_start + seq_len) * H + h) * D
            fill_rows(o_ptr, offset, H * D, fill_end - seq_start - seq_len, fill_value, BLOCK_M, D, BLOCK_D)
        if start_m >= seq_len:
            return
    offs_r = tl.arange(0, BLOCK_M)
    in_m = start_m + offs_r < seq_len
    row = (seq_start + start_m) * H + h  # first of the tile's rows in [T * H], which are H apart
    offset_n = head_offset(strides, b, seq_start, h)
    visible = visible_keys(key_mask_ptr, b, 0, seq_len, L, BLOCK_N)
    q = load_tile(q_ptr, head_offset(strides, b, seq_start + start_m, h), strides[1], in_m, D, BLOCK_D)
    k = load_tile(k_ptr, offset_n, strides[1], visible, D, BLOCK_D)
    v = load_tile(v_ptr, offset_n, strides[1], visible, D, BLOCK_D)

    s = scores(q, k, scale, start_m, 0, CAUSAL) + tl.where(visible, 0.0, float("-inf"))[None, :]
    m_i = tl.maximum(tl.max(s, axis=1), LOWEST)
    p = tl.exp2(s - m_i[:, None])  # [BLOCK_M, BLOCK_N]
    l_i = tl.sum(p, axis=1)
    if rng_ptr is not None:
        p = tl.where(keep(rng_ptr, dropout_stream, row + offs_r * H, 0, threshold, BLOCK_N), p, 0.0)
    acc = dot(rounded(p, v.dtype), v, tl.zeros((BLOCK_M, BLOCK_D), tl.float32))
    _finish(o_ptr, lse_ptr, acc, m_i, l_i, keep_scale, row, in_m, H, D, BLOCK_D)


@triton.jit(do_not_specialize=["L", "T", "threshold", "dropout_stream"])
def attention_fwd_loop(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, key_mask_ptr, cu_seqlens_ptr, rng_ptr, strides, L, T, H, scale,
    threshold, keep_scale, dropout_stream, CAUSAL: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """As `attention_fwd_tile`, by an online softmax over blocks of keys."""
    b, h, start_m, last = program(L, H, BLOCK_M)
    seq_start, seq_len, fill_end, fill_value = sequence(cu_seqlens_ptr, b, last, L, T)
    if cu_seqlens_ptr is not None:
        if start_m == 0:
            offset = ((seq_start + seq_len) * H + h) * D
            fill_rows(o_ptr, offset, H * D, fill_end - seq_start - seq_len, fill_value, BLOCK_M, D, BLOCK_D)
        if start_m >= seq_len:
            return
    offs_r = tl.arange(0, BLOCK_M)
    in_m = start_m + offs_r < seq_len
    row = (seq_start + start_m) * H + h
    q = load_tile(q_ptr, head_offset(strides, b, seq_start + start_m, h), strides[1], in_m, D, BLOCK_D)
    m_i = tl.full((BLOCK_M,), LOWEST, tl.float32)
    l_i = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start_n in range(0, tl.minimum(seq_len, start_m + BLOCK_M) if CAUSAL else seq_len, BLOCK_N):
        visible = visible_keys(key_mask_ptr, b, start_n, seq_len, L, BLOCK_N)
        offset_n = head_offset(strides, b, seq_start + start_n, h)
        k = load_tile(k_ptr, offset_n, strides[1], visible, D, BLOCK_D)
        s = scores(q, k, scale, start_m, start_n, CAUSAL) + tl.where(visible, 0.0, float("-inf"))[None, :]
        m_new = tl.maximum(m_i, tl.max(s, axis=1))
        p = tl.exp2(s - m_new[:, None])  # [BLOCK_M, BLOCK_N]
        alpha = tl.exp2(m_i - m_new)
        l_i = l_i * alpha + tl.sum(p, axis=1)
        if rng_ptr is not None:
            p = tl.where(keep(rng_ptr, dropout_stream, row + offs_r * H, start_n, threshold, BLOCK_N), p, 0.0)
        v = load_tile(v_ptr, offset_n, strides[1], visible, D, BLOCK_D)
        acc = dot(rounded(p, v.dtype), v, acc * alpha[:, None])
        m_i = m_new
    _finish(o_ptr, lse_ptr, acc, m_i, l_i, keep_scale, row, in_m, H, D, BLOCK_D)
