"""Forward of `attention`: one tile of keys, or an online softmax over blocks of them."""

import triton
import triton.language as tl

from electra_fast.kernels._attention_tile import (
    LOG2E,
    LOWEST,
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
def _finish(
    o_ptr, lse_ptr, acc, top, total, kept_scale, row, inside, H, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Store acc / total and the log-sum-exp; a query that sees no key gives 0, and exp(s - inf) = 0."""
    some = tl.where(total == 0, 1.0, total)
    store(o_ptr, row * D, H * D, inside, acc * (kept_scale / some)[:, None], D, BLOCK_D)
    lse = tl.where(total == 0, float("inf"), (top + tl.log2(some)) / LOG2E)
    tl.store(lse_ptr + row + tl.arange(0, acc.shape[0]) * H, lse, mask=inside)


@triton.jit(do_not_specialize=["L", "T", "threshold", "site"])
def attention_fwd_tile(
    q_ptr,  # [.., H, D] by `strides`, as k and v
    k_ptr,
    v_ptr,
    o_ptr,  # [.., H, D] out, contiguous
    lse_ptr,  # [.., H] f32 out
    mask_ptr,  # [B, L] uint8, or None: every key is seen
    cu_ptr,  # [B + 1], or None for a padded batch
    rng_ptr,  # [2] i64: seed, step; or None without dropout
    strides,
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
    b, h, first_l, last = program(L, H, BLOCK_M)
    t, n, stop, rest = sequence(cu_ptr, b, last, L, T)
    if cu_ptr is not None:
        if first_l == 0:
            fill(o_ptr, ((t + n) * H + h) * D, H * D, stop - t - n, rest, BLOCK_M, D, BLOCK_D)
        if first_l >= n:
            return
    i = tl.arange(0, BLOCK_M)
    inside, row, at = first_l + i < n, (t + first_l) * H + h, place(strides, b, t, h)
    seen = visible(mask_ptr, b, 0, n, L, BLOCK_N)
    q = load(q_ptr, place(strides, b, t + first_l, h), strides[1], inside, D, BLOCK_D)
    k, v = load(k_ptr, at, strides[1], seen, D, BLOCK_D), load(v_ptr, at, strides[1], seen, D, BLOCK_D)

    s = scores(q, k, scale, first_l, 0, CAUSAL) + tl.where(seen, 0.0, float("-inf"))[None, :]
    top = tl.maximum(tl.max(s, axis=1), LOWEST)
    p = tl.exp2(s - top[:, None])
    total = tl.sum(p, axis=1)
    if rng_ptr is not None:
        p = tl.where(keep(rng_ptr, site, row + i * H, 0, threshold, BLOCK_N), p, 0.0)
    acc = dot(rounded(p, v.dtype), v, tl.zeros((BLOCK_M, BLOCK_D), tl.float32))
    _finish(o_ptr, lse_ptr, acc, top, total, kept_scale, row, inside, H, D, BLOCK_D)


@triton.jit(do_not_specialize=["L", "T", "threshold", "site"])
def attention_fwd_loop(
    q_ptr,  # as in attention_fwd_tile
    k_ptr,
    v_ptr,
    o_ptr,
    lse_ptr,
    mask_ptr,
    cu_ptr,
    rng_ptr,
    strides,
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
            fill(o_ptr, ((t + n) * H + h) * D, H * D, stop - t - n, rest, BLOCK_M, D, BLOCK_D)
        if first_l >= n:
            return
    i = tl.arange(0, BLOCK_M)
    inside, row = first_l + i < n, (t + first_l) * H + h
    q = load(q_ptr, place(strides, b, t + first_l, h), strides[1], inside, D, BLOCK_D)
    top = tl.full((BLOCK_M,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for first in range(0, tl.minimum(n, first_l + BLOCK_M) if CAUSAL else n, BLOCK_N):
        seen, at = visible(mask_ptr, b, first, n, L, BLOCK_N), place(strides, b, t + first, h)
        k = load(k_ptr, at, strides[1], seen, D, BLOCK_D)
        s = scores(q, k, scale, first_l, first, CAUSAL) + tl.where(seen, 0.0, float("-inf"))[None, :]
        higher = tl.maximum(top, tl.max(s, axis=1))
        p = tl.exp2(s - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(p, axis=1)
        if rng_ptr is not None:
            p = tl.where(keep(rng_ptr, site, row + i * H, first, threshold, BLOCK_N), p, 0.0)
        v = load(v_ptr, at, strides[1], seen, D, BLOCK_D)
        acc = dot(rounded(p, v.dtype), v, acc * shrink[:, None])
        top = higher
    _finish(o_ptr, lse_ptr, acc, top, total, kept_scale, row, inside, H, D, BLOCK_D)
