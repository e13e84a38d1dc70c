"""Backward of `attention`: all of a sequence in one tile, or one kernel for dQ and one for dK and dV."""

import triton
import triton.language as tl

from electra_fast.kernels._attention_tile import (
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
def _p_and_dp(do, q, k, v, lse, scale, rows, start_m, start_n, dropout, CAUSAL: tl.constexpr):
    """Return P, drop(P) * (1 - p) and drop(dO V^T) of one tile, each ``[BLOCK_M, BLOCK_N]``.

    As in forward, a row is a query: so dropout's mask needs no transpose, and P and dS do. An invisible key
    was loaded as 0. Its P has no meaning, but is finite and adds nothing to dQ.
    """
    s = scores(q, k, scale, start_m, start_n, CAUSAL) - (lse * LOG2E)[:, None]
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
def _z_and_ds(do, q, k, v, lse, delta, scale, rows, start_m, start_n, dropout, CAUSAL: tl.constexpr):
    """Return drop(P) * (1 - p) and dS / scale of one tile, each ``[BLOCK_M, BLOCK_N]``."""
    p, z, dp = _p_and_dp(do, q, k, v, lse, scale, rows, start_m, start_n, dropout, CAUSAL)
    return rounded(z, do.dtype), rounded(p * (dp - delta[:, None]), q.dtype)


@triton.jit(do_not_specialize=["L", "T", "threshold", "dropout_stream"])
def attention_bwd_tile(
    do_ptr,  # [.., H, D], contiguous
    q_ptr,  # [.., H, D] by `strides`, as k and v
    k_ptr,
    v_ptr,
    o_ptr,  # [.., H, D], contiguous
    dq_ptr,  # [.., H, D] by `d_strides` out, as dk and dv
    dk_ptr,
    dv_ptr,
    lse_ptr,  # [.., H] f32
    key_mask_ptr,  # [B, L] uint8, or None: every key is visible
    cu_seqlens_ptr,  # [B + 1], or None for a padded batch
    rng_ptr,  # [2] i64: seed, step; or None without dropout
    strides,
    d_strides,
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
    b, h, _, last = program(L, H, BLOCK_N)
    seq_start, seq_len, fill_end, fill_value = sequence(cu_seqlens_ptr, b, last, L, T)
    if cu_seqlens_ptr is not None:
        fill_offset = head_offset(d_strides, b, seq_start + seq_len, h)
        fill_len = fill_end - seq_start - seq_len
        fill_rows(dq_ptr, fill_offset, d_strides[1], fill_len, fill_value, BLOCK_M, D, BLOCK_D)
        fill_rows(dk_ptr, fill_offset, d_strides[1], fill_len, fill_value, BLOCK_M, D, BLOCK_D)
        fill_rows(dv_ptr, fill_offset, d_strides[1], fill_len, fill_value, BLOCK_M, D, BLOCK_D)
        if seq_len == 0:
            return
    offs_r = tl.arange(0, BLOCK_M)
    in_m = offs_r < seq_len
    visible = visible_keys(key_mask_ptr, b, 0, seq_len, L, BLOCK_N)
    row = seq_start * H + h  # first of the tile's rows in [T * H], which are H apart
    offset = head_offset(strides, b, seq_start, h)
    q = load_tile(q_ptr, offset, strides[1], in_m, D, BLOCK_D)
    k = load_tile(k_ptr, offset, strides[1], visible, D, BLOCK_D)
    v = load_tile(v_ptr, offset, strides[1], visible, D, BLOCK_D)
    do = load_tile(do_ptr, row * D, H * D, in_m, D, BLOCK_D)
    o = load_tile(o_ptr, row * D, H * D, in_m, D, BLOCK_D)
    lse = tl.load(lse_ptr + row + offs_r * H, mask=in_m, other=float("inf"))
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), axis=1)

    dropout = (rng_ptr, dropout_stream, threshold, keep_scale)
    z, ds = _z_and_ds(do, q, k, v, lse, delta, scale, row + offs_r * H, 0, 0, dropout, CAUSAL)
    zero = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = dot(z.T, do, zero)
    dk = dot(ds.T, q, zero)
    dq = dot(ds, k, tl.zeros((BLOCK_M, BLOCK_D), tl.float32))
    in_n = tl.arange(0, BLOCK_N) < seq_len
    d_offset = head_offset(d_strides, b, seq_start, h)
    store_tile(dq_ptr, d_offset, d_strides[1], in_m, dq * scale, D, BLOCK_D)
    dk = tl.where(visible[:, None], dk * scale, 0.0)
    store_tile(dk_ptr, d_offset, d_strides[1], in_n, dk, D, BLOCK_D)
    dv = tl.where(visible[:, None], dv * keep_scale, 0.0)
    store_tile(dv_ptr, d_offset, d_strides[1], in_n, dv, D, BLOCK_D)


@triton.jit(do_not_specialize=["L", "T", "threshold", "dropout_stream"])
def attention_bwd_dq(
    do_ptr, q_ptr, k_ptr, v_ptr, o_ptr, dq_ptr, lse_ptr, delta_ptr, key_mask_ptr, cu_seqlens_ptr, rng_ptr,
    strides, d_strides, L, T, H, scale, threshold, keep_scale, dropout_stream, CAUSAL: tl.constexpr,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dQ of a block of queries, by a loop over keys; delta [.., H] f32 out: rowsum(dO O) = rowsum(P dP)."""
    b, h, start_m, last = program(L, H, BLOCK_M)
    seq_start, seq_len, fill_end, fill_value = sequence(cu_seqlens_ptr, b, last, L, T)
    if cu_seqlens_ptr is not None:
        if start_m == 0:
            fill_offset = head_offset(d_strides, b, seq_start + seq_len, h)
            fill_len = fill_end - seq_start - seq_len
            fill_rows(dq_ptr, fill_offset, d_strides[1], fill_len, fill_value, BLOCK_M, D, BLOCK_D)
        if start_m >= seq_len:
            return
    dropout = (rng_ptr, dropout_stream, threshold, keep_scale)
    offs_r = tl.arange(0, BLOCK_M)
    in_m = start_m + offs_r < seq_len
    row = (seq_start + start_m) * H + h
    q = load_tile(q_ptr, head_offset(strides, b, seq_start + start_m, h), strides[1], in_m, D, BLOCK_D)
    do = load_tile(do_ptr, row * D, H * D, in_m, D, BLOCK_D)
    o = load_tile(o_ptr, row * D, H * D, in_m, D, BLOCK_D)
    lse = tl.load(lse_ptr + row + offs_r * H, mask=in_m, other=float("inf"))
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), axis=1)
    end_n = tl.minimum(seq_len, start_m + BLOCK_M) if CAUSAL else seq_len
    if q_ptr.dtype.element_ty == tl.float32:
        # If one key has nearly all of P, dP - delta must cancel to the last digit. That needs rowsum(P dP).
        delta = tl.zeros((BLOCK_M,), tl.float32)
        l_i = tl.zeros((BLOCK_M,), tl.float32)
        for start_n in range(0, end_n, BLOCK_N):
            visible = visible_keys(key_mask_ptr, b, start_n, seq_len, L, BLOCK_N)
            offset_n = head_offset(strides, b, seq_start + start_n, h)
            k = load_tile(k_ptr, offset_n, strides[1], visible, D, BLOCK_D)
            v = load_tile(v_ptr, offset_n, strides[1], visible, D, BLOCK_D)
            p, _, dp = _p_and_dp(do, q, k, v, lse, scale, row + offs_r * H, start_m, start_n, dropout, CAUSAL)
            p = tl.where(visible[None, :], p, 0.0)
            delta += tl.sum(p * dp, axis=1)
            l_i += tl.sum(p, axis=1)
        delta = delta / tl.where(l_i == 0, 1.0, l_i)
    tl.store(delta_ptr + row + offs_r * H, delta, mask=in_m)

    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start_n in tl.range(0, end_n, BLOCK_N, disable_licm=True):  # 150 registers instead of 172
        visible = visible_keys(key_mask_ptr, b, start_n, seq_len, L, BLOCK_N)
        offset_n = head_offset(strides, b, seq_start + start_n, h)
        k = load_tile(k_ptr, offset_n, strides[1], visible, D, BLOCK_D)
        v = load_tile(v_ptr, offset_n, strides[1], visible, D, BLOCK_D)
        _, ds = _z_and_ds(do, q, k, v, lse, delta, scale, row + offs_r * H, start_m, start_n, dropout, CAUSAL)
        dq = dot(ds, k, dq)
    d_offset = head_offset(d_strides, b, seq_start + start_m, h)
    store_tile(dq_ptr, d_offset, d_strides[1], in_m, dq * scale, D, BLOCK_D)


@triton.jit(do_not_specialize=["L", "T", "threshold", "dropout_stream"])
def attention_bwd_dkdv(
    do_ptr, q_ptr, k_ptr, v_ptr, dk_ptr, dv_ptr, lse_ptr, delta_ptr, key_mask_ptr, cu_seqlens_ptr, rng_ptr,
    strides, d_strides, L, T, H, scale, threshold, keep_scale, dropout_stream, CAUSAL: tl.constexpr,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dK and dV of a block of keys, by a loop over queries, with the delta of `attention_bwd_dq`."""
    b, h, start_n, last = program(L, H, BLOCK_N)
    seq_start, seq_len, fill_end, fill_value = sequence(cu_seqlens_ptr, b, last, L, T)
    if cu_seqlens_ptr is not None:
        if start_n == 0:
            fill_offset = head_offset(d_strides, b, seq_start + seq_len, h)
            fill_len = fill_end - seq_start - seq_len
            fill_rows(dk_ptr, fill_offset, d_strides[1], fill_len, fill_value, BLOCK_N, D, BLOCK_D)
            fill_rows(dv_ptr, fill_offset, d_strides[1], fill_len, fill_value, BLOCK_N, D, BLOCK_D)
        if start_n >= seq_len:
            return
    visible = visible_keys(key_mask_ptr, b, start_n, seq_len, L, BLOCK_N)
    offset_n = head_offset(strides, b, seq_start + start_n, h)
    k = load_tile(k_ptr, offset_n, strides[1], visible, D, BLOCK_D)
    v = load_tile(v_ptr, offset_n, strides[1], visible, D, BLOCK_D)
    offs_r = tl.arange(0, BLOCK_M)
    dropout = (rng_ptr, dropout_stream, threshold, keep_scale)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for start_m in range(start_n // BLOCK_M * BLOCK_M if CAUSAL else 0, seq_len, BLOCK_M):
        row = (seq_start + start_m) * H + h
        in_m = start_m + offs_r < seq_len
        q = load_tile(q_ptr, head_offset(strides, b, seq_start + start_m, h), strides[1], in_m, D, BLOCK_D)
        do = load_tile(do_ptr, row * D, H * D, in_m, D, BLOCK_D)
        lse = tl.load(lse_ptr + row + offs_r * H, mask=in_m, other=float("inf"))
        delta = tl.load(delta_ptr + row + offs_r * H, mask=in_m, other=0.0)
        z, ds = _z_and_ds(do, q, k, v, lse, delta, scale, row + offs_r * H, start_m, start_n, dropout, CAUSAL)
        dv = dot(z.T, do, dv)
        dk = dot(ds.T, q, dk)
    in_n = start_n + tl.arange(0, BLOCK_N) < seq_len
    d_offset = head_offset(d_strides, b, seq_start + start_n, h)
    dk = tl.where(visible[:, None], dk * scale, 0.0)
    store_tile(dk_ptr, d_offset, d_strides[1], in_n, dk, D, BLOCK_D)
    dv = tl.where(visible[:, None], dv * keep_scale, 0.0)
    store_tile(dv_ptr, d_offset, d_strides[1], in_n, dv, D, BLOCK_D)
