"""Backward of `attention`: all of a sequence in one tile, or one kernel for dQ and one for dK and dV."""

import triton
import triton.language as tl

from electra_fast.kernels._attention_tile import (
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
def _p_and_dp(do, q, k, v, lse, scale, rows, position, start_n, dropout, CAUSAL: tl.constexpr):
    """Return P, drop(P) * (1 - p) and drop(dO V^T) of one tile, each ``[BLOCK_M, BLOCK_N]``.

    As in forward, a row is a query: so dropout's mask needs no transpose, and P and dS do. An invisible key
    was loaded as 0. Its P has no meaning, but is finite and adds nothing to dQ.
    """
    s = scores(q, k, scale, position, start_n, CAUSAL) - (lse * LOG2E)[:, None]
    p = tl.exp2(tl.minimum(s, 0.0))
    dp = dot(do, v.T, tl.zeros((q.shape[0], k.shape[0]), tl.float32))
    z = p
    rng_ptr, dropout_stream, threshold, keep_scale = dropout
    if rng_ptr is not None:
        kept = keep(rng_ptr, dropout_stream, rows, start_n, threshold, k.shape[0])
        z = tl.where(kept, p, 0.0)
        dp = tl.where(kept, dp * keep_scale, 0.0)
    return p, z, dp


@triton.jit
def _z_and_ds(do, q, k, v, lse, delta, scale, rows, position, start_n, dropout, CAUSAL: tl.constexpr):
    """Return drop(P) * (1 - p) and dS / scale of one tile, each ``[BLOCK_M, BLOCK_N]``."""
    p, z, dp = _p_and_dp(do, q, k, v, lse, scale, rows, position, start_n, dropout, CAUSAL)
    return rounded(z, do.dtype), rounded(p * (dp - delta[:, None]), q.dtype)


@triton.jit(do_not_specialize=["L", "T", "K", "S", "threshold", "dropout_stream"])
def attention_bwd_tile(
    do_ptr,  # [.., H, D], contiguous
    q_ptr,  # [.., H, D] by `strides`
    k_ptr,  # [.., H, D] by `key_strides`, as v
    v_ptr,
    o_ptr,  # [.., H, D], contiguous
    dq_ptr,  # [.., H, D] by `d_strides` out, as dk and dv
    dk_ptr,
    dv_ptr,
    lse_ptr,  # [.., H] f32
    key_mask_ptr,  # [B, K] uint8, or None: every key is visible
    cu_seqlens_ptr,  # [B + 1], or None for a padded batch
    cu_seqlens_k_ptr,  # [B + 1] of the keys of a packed batch
    rng_ptr,  # [2] i64: seed, step; or None without dropout
    strides,
    key_strides,  # or None: those of q, and the keys are of the same tokens
    d_strides,
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
    b, h, _, last = program(L, H, BLOCK_M)
    q_start, q_len, q_end, k_start, k_len, k_end, fill_value = sequences(
        cu_seqlens_ptr, cu_seqlens_k_ptr, key_strides, b, last, L, T, K, S, CAUSAL
    )
    if cu_seqlens_ptr is not None:
        q_fill, fill_len = head_offset(d_strides, b, q_start + q_len, h), q_end - q_start - q_len
        fill_rows(dq_ptr, q_fill, d_strides[1], fill_len, fill_value, BLOCK_M, D, BLOCK_D)
        k_fill, fill_len = head_offset(d_strides, b, k_start + k_len, h), k_end - k_start - k_len
        fill_rows(dk_ptr, k_fill, d_strides[1], fill_len, fill_value, BLOCK_M, D, BLOCK_D)
        fill_rows(dv_ptr, k_fill, d_strides[1], fill_len, fill_value, BLOCK_M, D, BLOCK_D)
        if tl.maximum(q_len, k_len) == 0:
            return
    k_strides = strides if key_strides is None else key_strides
    offs_r = tl.arange(0, BLOCK_M)
    in_m = offs_r < q_len
    visible = visible_keys(key_mask_ptr, b, 0, k_len, BLOCK_N)
    row = q_start * H + h  # first of the tile's rows in [T * H], which are H apart
    offset_n = head_offset(k_strides, b, k_start, h)
    q = load_tile(q_ptr, head_offset(strides, b, q_start, h), strides[1], in_m, D, BLOCK_D)
    k = load_tile(k_ptr, offset_n, k_strides[1], visible, D, BLOCK_D)
    v = load_tile(v_ptr, offset_n, k_strides[1], visible, D, BLOCK_D)
    do = load_tile(do_ptr, row * D, H * D, in_m, D, BLOCK_D)
    o = load_tile(o_ptr, row * D, H * D, in_m, D, BLOCK_D)
    lse = tl.load(lse_ptr + row + offs_r * H, mask=in_m, other=float("inf"))
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), axis=1)

    dropout = (rng_ptr, dropout_stream, threshold, keep_scale)
    position = k_len - q_len  # of the first query among the keys, if causal
    z, ds = _z_and_ds(do, q, k, v, lse, delta, scale, row + offs_r * H, position, 0, dropout, CAUSAL)
    zero = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = dot(z.T, do, zero)
    dk = dot(ds.T, q, zero)
    dq = dot(ds, k, tl.zeros((BLOCK_M, BLOCK_D), tl.float32))
    in_n = tl.arange(0, BLOCK_N) < k_len
    dq_offset = head_offset(d_strides, b, q_start, h)
    store_tile(dq_ptr, dq_offset, d_strides[1], in_m, dq * scale, D, BLOCK_D)
    d_offset = head_offset(d_strides, b, k_start, h)
    dk = tl.where(visible[:, None], dk * scale, 0.0)
    store_tile(dk_ptr, d_offset, d_strides[1], in_n, dk, D, BLOCK_D)
    dv = tl.where(visible[:, None], dv * keep_scale, 0.0)
    store_tile(dv_ptr, d_offset, d_strides[1], in_n, dv, D, BLOCK_D)


@triton.jit(do_not_specialize=["L", "T", "K", "S", "threshold", "dropout_stream"])
def attention_bwd_dq(
    do_ptr, q_ptr, k_ptr, v_ptr, o_ptr, dq_ptr, lse_ptr, delta_ptr, key_mask_ptr, cu_seqlens_ptr,
    cu_seqlens_k_ptr, rng_ptr, strides, key_strides, d_strides, L, T, K, S, H, scale, threshold, keep_scale,
    dropout_stream, CAUSAL: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dQ of a block of queries, by a loop over keys; delta [.., H] f32 out: rowsum(dO O) = rowsum(P dP)."""
    b, h, start_m, last = program(L, H, BLOCK_M)
    q_start, q_len, q_end, k_start, k_len, _k_end, fill_value = sequences(
        cu_seqlens_ptr, cu_seqlens_k_ptr, key_strides, b, last, L, T, K, S, CAUSAL
    )
    if cu_seqlens_ptr is not None:
        if start_m == 0:
            q_fill, fill_len = head_offset(d_strides, b, q_start + q_len, h), q_end - q_start - q_len
            fill_rows(dq_ptr, q_fill, d_strides[1], fill_len, fill_value, BLOCK_M, D, BLOCK_D)
        if start_m >= q_len:
            return
    dropout = (rng_ptr, dropout_stream, threshold, keep_scale)
    k_strides = strides if key_strides is None else key_strides
    offs_r = tl.arange(0, BLOCK_M)
    in_m = start_m + offs_r < q_len
    row = (q_start + start_m) * H + h
    rows = row + offs_r * H
    q = load_tile(q_ptr, head_offset(strides, b, q_start + start_m, h), strides[1], in_m, D, BLOCK_D)
    do = load_tile(do_ptr, row * D, H * D, in_m, D, BLOCK_D)
    o = load_tile(o_ptr, row * D, H * D, in_m, D, BLOCK_D)
    lse = tl.load(lse_ptr + row + offs_r * H, mask=in_m, other=float("inf"))
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), axis=1)
    position = start_m + k_len - q_len  # of the first query among the keys, if causal
    end_n = tl.minimum(k_len, position + BLOCK_M) if CAUSAL else k_len
    if q_ptr.dtype.element_ty == tl.float32:
        # If one key has nearly all of P, dP - delta must cancel to the last digit. That needs rowsum(P dP).
        delta = tl.zeros((BLOCK_M,), tl.float32)
        l_i = tl.zeros((BLOCK_M,), tl.float32)
        for start_n in range(0, end_n, BLOCK_N):
            visible = visible_keys(key_mask_ptr, b, start_n, k_len, BLOCK_N)
            offset_n = head_offset(k_strides, b, k_start + start_n, h)
            k = load_tile(k_ptr, offset_n, k_strides[1], visible, D, BLOCK_D)
            v = load_tile(v_ptr, offset_n, k_strides[1], visible, D, BLOCK_D)
            p, _, dp = _p_and_dp(do, q, k, v, lse, scale, rows, position, start_n, dropout, CAUSAL)
            p = tl.where(visible[None, :], p, 0.0)
            delta += tl.sum(p * dp, axis=1)
            l_i += tl.sum(p, axis=1)
        delta = delta / tl.where(l_i == 0, 1.0, l_i)
    tl.store(delta_ptr + row + offs_r * H, delta, mask=in_m)

    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start_n in tl.range(0, end_n, BLOCK_N, disable_licm=True):  # 150 registers instead of 172
        visible = visible_keys(key_mask_ptr, b, start_n, k_len, BLOCK_N)
        offset_n = head_offset(k_strides, b, k_start + start_n, h)
        k = load_tile(k_ptr, offset_n, k_strides[1], visible, D, BLOCK_D)
        v = load_tile(v_ptr, offset_n, k_strides[1], visible, D, BLOCK_D)
        _, ds = _z_and_ds(do, q, k, v, lse, delta, scale, rows, position, start_n, dropout, CAUSAL)
        dq = dot(ds, k, dq)
    d_offset = head_offset(d_strides, b, q_start + start_m, h)
    store_tile(dq_ptr, d_offset, d_strides[1], in_m, dq * scale, D, BLOCK_D)


@triton.jit(do_not_specialize=["L", "T", "K", "S", "threshold", "dropout_stream"])
def attention_bwd_dkdv(
    do_ptr, q_ptr, k_ptr, v_ptr, dk_ptr, dv_ptr, lse_ptr, delta_ptr, key_mask_ptr, cu_seqlens_ptr,
    cu_seqlens_k_ptr, rng_ptr, strides, key_strides, d_strides, L, T, K, S, H, scale, threshold, keep_scale,
    dropout_stream, CAUSAL: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dK and dV of a block of keys, by a loop over queries, with the delta of `attention_bwd_dq`."""
    b, h, start_n, last = program(L if key_strides is None else K, H, BLOCK_N)
    q_start, q_len, _q_end, k_start, k_len, k_end, fill_value = sequences(
        cu_seqlens_ptr, cu_seqlens_k_ptr, key_strides, b, last, L, T, K, S, CAUSAL
    )
    if cu_seqlens_ptr is not None:
        if start_n == 0:
            k_fill, fill_len = head_offset(d_strides, b, k_start + k_len, h), k_end - k_start - k_len
            fill_rows(dk_ptr, k_fill, d_strides[1], fill_len, fill_value, BLOCK_N, D, BLOCK_D)
            fill_rows(dv_ptr, k_fill, d_strides[1], fill_len, fill_value, BLOCK_N, D, BLOCK_D)
        if start_n >= k_len:
            return
    k_strides = strides if key_strides is None else key_strides
    visible = visible_keys(key_mask_ptr, b, start_n, k_len, BLOCK_N)
    offset_n = head_offset(k_strides, b, k_start + start_n, h)
    k = load_tile(k_ptr, offset_n, k_strides[1], visible, D, BLOCK_D)
    v = load_tile(v_ptr, offset_n, k_strides[1], visible, D, BLOCK_D)
    offs_r = tl.arange(0, BLOCK_M)
    dropout = (rng_ptr, dropout_stream, threshold, keep_scale)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    ahead = k_len - q_len  # keys before the first query's, if causal
    first_m = tl.maximum(start_n - ahead, 0) // BLOCK_M * BLOCK_M if CAUSAL else 0
    for start_m in range(first_m, q_len, BLOCK_M):
        row = (q_start + start_m) * H + h
        in_m = start_m + offs_r < q_len
        q = load_tile(q_ptr, head_offset(strides, b, q_start + start_m, h), strides[1], in_m, D, BLOCK_D)
        do = load_tile(do_ptr, row * D, H * D, in_m, D, BLOCK_D)
        lse = tl.load(lse_ptr + row + offs_r * H, mask=in_m, other=float("inf"))
        delta = tl.load(delta_ptr + row + offs_r * H, mask=in_m, other=0.0)
        rows, position = row + offs_r * H, start_m + ahead
        z, ds = _z_and_ds(do, q, k, v, lse, delta, scale, rows, position, start_n, dropout, CAUSAL)
        dv = dot(z.T, do, dv)
        dk = dot(ds.T, q, dk)
    in_n = start_n + tl.arange(0, BLOCK_N) < k_len
    d_offset = head_offset(d_strides, b, k_start + start_n, h)
    dk = tl.where(visible[:, None], dk * scale, 0.0)
    store_tile(dk_ptr, d_offset, d_strides[1], in_n, dk, D, BLOCK_D)
    dv = tl.where(visible[:, None], dv * keep_scale, 0.0)
    store_tile(dv_ptr, d_offset, d_strides[1], in_n, dv, D, BLOCK_D)
