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
    sequences,
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


@triton.jit(do_not_specialize=["L", "T", "K", "S", "threshold", "dropout_stream"])
def attention_fwd_tile(
    q_ptr,  # [.., H, D] by `strides`
    k_ptr,  # [.., H, D] by `key_strides`, as v
    v_ptr,
    o_ptr,  # [.., H, D] out, contiguous
    lse_ptr,  # [.., H] f32 out
    key_mask_ptr,  # [B, K] uint8, or None: every key is visible
    cu_seqlens_ptr,  # [B + 1], or None for a padded batch
    cu_seqlens_k_ptr,  # [B + 1] of the keys of a packed batch
    rng_ptr,  # [2] i64: seed, step; or None without dropout
    strides,
    key_strides,  # or None: those of q, and the keys are of the same tokens
    L,  # queries of a padded sequence, the most of a packed one
    T,  # queries in total
    K,  # as L, of keys
    S,  # as T, of keys
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
    q_start, q_len, q_end, k_start, k_len, _k_end, fill_value = sequences(
        cu_seqlens_ptr, cu_seqlens_k_ptr, key_strides, b, last, L, T, K, S, CAUSAL
    )
    if cu_seqlens_ptr is not None:
        if start_m == 0:
            offset = ((q_start + q_len) * H + h) * D
            fill_rows(o_ptr, offset, H * D, q_end - q_start - q_len, fill_value, BLOCK_M, D, BLOCK_D)
        if start_m >= q_len:
            return
    k_strides = strides if key_strides is None else key_strides
    offs_r = tl.arange(0, BLOCK_M)
    in_m = start_m + offs_r < q_len
    row = (q_start + start_m) * H + h  # first of the tile's rows in [T * H], which are H apart
    offset_n = head_offset(k_strides, b, k_start, h)
    visible = visible_keys(key_mask_ptr, b, 0, k_len, BLOCK_N)
    q = load_tile(q_ptr, head_offset(strides, b, q_start + start_m, h), strides[1], in_m, D, BLOCK_D)
    k = load_tile(k_ptr, offset_n, k_strides[1], visible, D, BLOCK_D)
    v = load_tile(v_ptr, offset_n, k_strides[1], visible, D, BLOCK_D)

    position = start_m + k_len - q_len  # of the first query among the keys, if causal
    s = scores(q, k, scale, position, 0, CAUSAL) + tl.where(visible, 0.0, float("-inf"))[None, :]
    m_i = tl.maximum(tl.max(s, axis=1), LOWEST)
    p = tl.exp2(s - m_i[:, None])  # [BLOCK_M, BLOCK_N]
    l_i = tl.sum(p, axis=1)
    if rng_ptr is not None:
        p = tl.where(keep(rng_ptr, dropout_stream, row + offs_r * H, 0, threshold, BLOCK_N), p, 0.0)
    acc = dot(rounded(p, v.dtype), v, tl.zeros((BLOCK_M, BLOCK_D), tl.float32))
    _finish(o_ptr, lse_ptr, acc, m_i, l_i, keep_scale, row, in_m, H, D, BLOCK_D)


@triton.jit(do_not_specialize=["L", "T", "K", "S", "threshold", "dropout_stream"])
def attention_fwd_loop(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, key_mask_ptr, cu_seqlens_ptr, cu_seqlens_k_ptr, rng_ptr, strides,
    key_strides, L, T, K, S, H, scale, threshold, keep_scale, dropout_stream, CAUSAL: tl.constexpr,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """As `attention_fwd_tile`, by an online softmax over blocks of keys."""
    b, h, start_m, last = program(L, H, BLOCK_M)
    q_start, q_len, q_end, k_start, k_len, _k_end, fill_value = sequences(
        cu_seqlens_ptr, cu_seqlens_k_ptr, key_strides, b, last, L, T, K, S, CAUSAL
    )
    if cu_seqlens_ptr is not None:
        if start_m == 0:
            offset = ((q_start + q_len) * H + h) * D
            fill_rows(o_ptr, offset, H * D, q_end - q_start - q_len, fill_value, BLOCK_M, D, BLOCK_D)
        if start_m >= q_len:
            return
    k_strides = strides if key_strides is None else key_strides
    offs_r = tl.arange(0, BLOCK_M)
    in_m = start_m + offs_r < q_len
    row = (q_start + start_m) * H + h
    q = load_tile(q_ptr, head_offset(strides, b, q_start + start_m, h), strides[1], in_m, D, BLOCK_D)
    m_i = tl.full((BLOCK_M,), LOWEST, tl.float32)
    l_i = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    position = start_m + k_len - q_len  # of the first query among the keys, if causal
    for start_n in range(0, tl.minimum(k_len, position + BLOCK_M) if CAUSAL else k_len, BLOCK_N):
        visible = visible_keys(key_mask_ptr, b, start_n, k_len, BLOCK_N)
        offset_n = head_offset(k_strides, b, k_start + start_n, h)
        k = load_tile(k_ptr, offset_n, k_strides[1], visible, D, BLOCK_D)
        s = scores(q, k, scale, position, start_n, CAUSAL) + tl.where(visible, 0.0, float("-inf"))[None, :]
        m_new = tl.maximum(m_i, tl.max(s, axis=1))
        p = tl.exp2(s - m_new[:, None])  # [BLOCK_M, BLOCK_N]
        alpha = tl.exp2(m_i - m_new)
        l_i = l_i * alpha + tl.sum(p, axis=1)
        if rng_ptr is not None:
            p = tl.where(keep(rng_ptr, dropout_stream, row + offs_r * H, start_n, threshold, BLOCK_N), p, 0.0)
        v = load_tile(v_ptr, offset_n, k_strides[1], visible, D, BLOCK_D)
        acc = dot(rounded(p, v.dtype), v, acc * alpha[:, None])
        m_i = m_new
    _finish(o_ptr, lse_ptr, acc, m_i, l_i, keep_scale, row, in_m, H, D, BLOCK_D)
