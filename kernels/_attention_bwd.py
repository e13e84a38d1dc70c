"""Backward of `attention`: one program a sequence and head, each product once and nothing atomic."""

import triton
import triton.language as tl

from electra_fast.kernels._attention_tile import (
    LOG2E,
    fill,
    load,
    place,
    program,
    scores,
    sequence,
    store,
    visible,
)
from electra_fast.kernels._common import dot, keep, rounded


@triton.jit
def _products(do, q, k, v, lse, scale, row, first_l, first_m, dropout, CAUSAL: tl.constexpr):
    """Return one tile's P, drop(P) * (1 - p) and drop(dO V^T).

    The scores lie as in forward, a query a row: so dropout's mask needs no transpose, and P and dS do. A key
    that is not seen was loaded as 0. Its P means nothing, but is a number and adds nothing to dQ.
    """
    s = scores(q, k, scale, first_l, first_m, CAUSAL) - (lse * LOG2E)[:, None]
    p = tl.exp2(tl.minimum(s, 0.0))
    dp = dot(do, v.T, tl.zeros((q.shape[0], k.shape[0]), tl.float32))
    z = p
    rng_ptr, site, threshold, kept_scale = dropout
    if rng_ptr is not None:
        kept = keep(rng_ptr, site, row, first_m, threshold, k.shape[0])
        z = tl.where(kept, p, 0.0)
        dp = tl.where(kept, dp * kept_scale, 0.0)
    return p, z, dp


@triton.jit
def _differences(do, q, k, v, lse, delta, scale, row, first_l, first_m, dropout, CAUSAL: tl.constexpr):
    """Return one tile's drop(P) * (1 - p) and dS / scale."""
    p, z, dp = _products(do, q, k, v, lse, scale, row, first_l, first_m, dropout, CAUSAL)
    return rounded(z, do.dtype), rounded(p * (dp - delta[:, None]), q.dtype)


@triton.jit(do_not_specialize=["L", "T", "threshold", "site"])
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
    mask_ptr,  # [B, L] uint8, or None: every key is seen
    cu_ptr,  # [B + 1], or None for a padded batch
    rng_ptr,  # [2] i64: seed, step; or None without dropout
    strides,
    d_strides,
    L,  # tokens of a padded sequence, of a packed one at most
    T,
    H,
    scale,
    threshold,
    kept_scale,
    site,
    CAUSAL: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    b, h, _, last = program(L, H, BLOCK_N)
    t, n, stop, rest = sequence(cu_ptr, b, last, L, T)
    if cu_ptr is not None:
        at, rows = place(d_strides, b, t + n, h), stop - t - n
        fill(dq_ptr, at, d_strides[1], rows, rest, BLOCK_M, D, BLOCK_D)
        fill(dk_ptr, at, d_strides[1], rows, rest, BLOCK_M, D, BLOCK_D)
        fill(dv_ptr, at, d_strides[1], rows, rest, BLOCK_M, D, BLOCK_D)
        if n == 0:
            return
    i = tl.arange(0, BLOCK_M)
    inside, seen, row, at = i < n, visible(mask_ptr, b, 0, n, L, BLOCK_N), t * H + h, place(strides, b, t, h)
    q = load(q_ptr, at, strides[1], inside, D, BLOCK_D)
    k = load(k_ptr, at, strides[1], seen, D, BLOCK_D)
    v = load(v_ptr, at, strides[1], seen, D, BLOCK_D)
    do = load(do_ptr, row * D, H * D, inside, D, BLOCK_D)
    o = load(o_ptr, row * D, H * D, inside, D, BLOCK_D)
    lse = tl.load(lse_ptr + row + i * H, mask=inside, other=float("inf"))
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), axis=1)

    dropout = (rng_ptr, site, threshold, kept_scale)
    z, ds = _differences(do, q, k, v, lse, delta, scale, row + i * H, 0, 0, dropout, CAUSAL)
    zero = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv, dk, dq = dot(z.T, do, zero), dot(ds.T, q, zero), dot(ds, k, tl.zeros((BLOCK_M, BLOCK_D), tl.float32))
    keys, at = tl.arange(0, BLOCK_N) < n, place(d_strides, b, t, h)
    store(dq_ptr, at, d_strides[1], inside, dq * scale, D, BLOCK_D)
    store(dk_ptr, at, d_strides[1], keys, tl.where(seen[:, None], dk * scale, 0.0), D, BLOCK_D)
    store(dv_ptr, at, d_strides[1], keys, tl.where(seen[:, None], dv * kept_scale, 0.0), D, BLOCK_D)


@triton.jit(do_not_specialize=["L", "T", "threshold", "site"])
def attention_bwd_dq(
    do_ptr,  # as in attention_bwd_tile
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    dq_ptr,
    lse_ptr,
    delta_ptr,  # [.., H] f32 out: rowsum(dO O) = rowsum(P dP)
    mask_ptr,
    cu_ptr,
    rng_ptr,
    strides,
    d_strides,
    L,
    T,
    H,
    scale,
    threshold,
    kept_scale,
    site,
    CAUSAL: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    b, h, first_l, last = program(L, H, BLOCK_M)
    t, n, stop, rest = sequence(cu_ptr, b, last, L, T)
    if cu_ptr is not None:
        if first_l == 0:
            fill(dq_ptr, place(d_strides, b, t + n, h), d_strides[1], stop - t - n, rest, BLOCK_M, D, BLOCK_D)
        if first_l >= n:
            return
    i, dropout = tl.arange(0, BLOCK_M), (rng_ptr, site, threshold, kept_scale)
    inside, row = first_l + i < n, (t + first_l) * H + h
    q = load(q_ptr, place(strides, b, t + first_l, h), strides[1], inside, D, BLOCK_D)
    do = load(do_ptr, row * D, H * D, inside, D, BLOCK_D)
    o = load(o_ptr, row * D, H * D, inside, D, BLOCK_D)
    lse = tl.load(lse_ptr + row + i * H, mask=inside, other=float("inf"))
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), axis=1)
    end = tl.minimum(n, first_l + BLOCK_M) if CAUSAL else n
    if q_ptr.dtype.element_ty == tl.float32:
        # Where a row is nearly one key, dP - rowsum(P dP) cancels to the last digit; rowsum(dO O) does not.
        delta, total = tl.zeros((BLOCK_M,), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
        for first in range(0, end, BLOCK_N):
            seen, at = visible(mask_ptr, b, first, n, L, BLOCK_N), place(strides, b, t + first, h)
            k = load(k_ptr, at, strides[1], seen, D, BLOCK_D)
            v = load(v_ptr, at, strides[1], seen, D, BLOCK_D)
            p, _, dp = _products(do, q, k, v, lse, scale, row + i * H, first_l, first, dropout, CAUSAL)
            p = tl.where(seen[None, :], p, 0.0)
            delta, total = delta + tl.sum(p * dp, axis=1), total + tl.sum(p, axis=1)
        delta = delta / tl.where(total == 0, 1.0, total)
    tl.store(delta_ptr + row + i * H, delta, mask=inside)

    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for first in tl.range(0, end, BLOCK_N, disable_licm=True):  # 150 registers for 172
        seen, at = visible(mask_ptr, b, first, n, L, BLOCK_N), place(strides, b, t + first, h)
        k = load(k_ptr, at, strides[1], seen, D, BLOCK_D)
        v = load(v_ptr, at, strides[1], seen, D, BLOCK_D)
        _, ds = _differences(do, q, k, v, lse, delta, scale, row + i * H, first_l, first, dropout, CAUSAL)
        dq = dot(ds, k, dq)
    store(dq_ptr, place(d_strides, b, t + first_l, h), d_strides[1], inside, dq * scale, D, BLOCK_D)


@triton.jit(do_not_specialize=["L", "T", "threshold", "site"])
def attention_bwd_dkdv(
    do_ptr,  # as in attention_bwd_tile
    q_ptr,
    k_ptr,
    v_ptr,
    dk_ptr,
    dv_ptr,
    lse_ptr,
    delta_ptr,  # [.., H] f32, of attention_bwd_dq
    mask_ptr,
    cu_ptr,
    rng_ptr,
    strides,
    d_strides,
    L,
    T,
    H,
    scale,
    threshold,
    kept_scale,
    site,
    CAUSAL: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    b, h, first_m, last = program(L, H, BLOCK_N)
    t, n, stop, rest = sequence(cu_ptr, b, last, L, T)
    if cu_ptr is not None:
        if first_m == 0:
            at, rows = place(d_strides, b, t + n, h), stop - t - n
            fill(dk_ptr, at, d_strides[1], rows, rest, BLOCK_N, D, BLOCK_D)
            fill(dv_ptr, at, d_strides[1], rows, rest, BLOCK_N, D, BLOCK_D)
        if first_m >= n:
            return
    seen, at = visible(mask_ptr, b, first_m, n, L, BLOCK_N), place(strides, b, t + first_m, h)
    k = load(k_ptr, at, strides[1], seen, D, BLOCK_D)
    v = load(v_ptr, at, strides[1], seen, D, BLOCK_D)
    i, dropout = tl.arange(0, BLOCK_M), (rng_ptr, site, threshold, kept_scale)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for first in range(first_m // BLOCK_M * BLOCK_M if CAUSAL else 0, n, BLOCK_M):
        row, inside = (t + first) * H + h, first + i < n
        q = load(q_ptr, place(strides, b, t + first, h), strides[1], inside, D, BLOCK_D)
        do = load(do_ptr, row * D, H * D, inside, D, BLOCK_D)
        lse = tl.load(lse_ptr + row + i * H, mask=inside, other=float("inf"))
        delta = tl.load(delta_ptr + row + i * H, mask=inside, other=0.0)
        z, ds = _differences(do, q, k, v, lse, delta, scale, row + i * H, first, first_m, dropout, CAUSAL)
        dv, dk = dot(z.T, do, dv), dot(ds.T, q, dk)
    inside, at = first_m + tl.arange(0, BLOCK_N) < n, place(d_strides, b, t + first_m, h)
    store(dk_ptr, at, d_strides[1], inside, tl.where(seen[:, None], dk * scale, 0.0), D, BLOCK_D)
    store(dv_ptr, at, d_strides[1], inside, tl.where(seen[:, None], dv * kept_scale, 0.0), D, BLOCK_D)
