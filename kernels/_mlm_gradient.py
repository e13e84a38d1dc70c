"""The gradient of `mlm_head`: d = w (softmax - onehot(target)) times the table, and times x."""

import triton
import triton.language as tl

from electra_fast.kernels._common import dot
from electra_fast.kernels._mlm_sweep import LOG2E, load_bias, load_rows, load_tokens


@triton.jit
def _load_slots(targets_ptr, weights_ptr, index_ptr, norm_ptr, r, in_r):
    """Load target, weight, maximum and log-sum of the used slots r; outside, what makes d = 0."""
    slot = tl.load(index_ptr + r, mask=in_r, other=0)
    y = tl.load(targets_ptr + slot, mask=in_r, other=-1).to(tl.int32)
    w = tl.load(weights_ptr + slot, mask=in_r, other=0.0)
    top = tl.load(norm_ptr + 2 * r, mask=in_r, other=float("inf"))
    return y, w, top, tl.load(norm_ptr + 2 * r + 1, mask=in_r, other=0.0)


@triton.jit(do_not_specialize=["tiles", "M"])
def mlm_head_dx(
    x_ptr,  # [M, E]
    table_ptr,  # [V, E]
    bias_ptr,  # [V]
    targets_ptr,  # [M]
    weights_ptr,  # [M] f32
    index_ptr,  # [M] i32
    count_ptr,  # [] i32
    norm_ptr,  # [M, 2] f32, of used slots: maximum, and log-sum in units of log 2
    partial_ptr,  # [programs, M, E] f32 out, of used slots
    tiles,
    V,
    M,
    E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    r = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    count = tl.load(count_ptr)
    if tl.program_id(0) * BLOCK_M >= count:
        return
    in_r = r < count
    y, w, top, log_total = _load_slots(targets_ptr, weights_ptr, index_ptr, norm_ptr, r, in_r)
    x = load_rows(x_ptr, index_ptr, r, in_r, 0, E, BLOCK_E)
    acc = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    for t in range(tiles):
        v0 = (tl.program_id(1) * tiles + t) * BLOCK_V
        v = v0 + tl.arange(0, BLOCK_V)
        tokens = load_tokens(table_ptr, v0, 0, V, E, BLOCK_V, BLOCK_E)
        logits = (
            dot(x, tokens.T, tl.zeros((BLOCK_M, BLOCK_V), tl.float32)) + load_bias(bias_ptr, v, V)[None, :]
        )
        p = tl.exp2((logits - top[:, None]) * LOG2E - log_total[:, None])
        d = (p - tl.where(v[None, :] == y[:, None], 1.0, 0.0)) * w[:, None]
        acc = dot(d.to(x.dtype), tokens, acc)
    e = tl.arange(0, BLOCK_E)
    place = (tl.program_id(1).to(tl.int64) * M + r)[:, None] * E + e[None, :]
    tl.store(partial_ptr + place, acc, mask=in_r[:, None] & (e < E)[None, :])


@triton.jit
def mlm_head_dtable(
    x_ptr,  # [M, E]
    table_ptr,  # [V, E]
    bias_ptr,  # [V]
    targets_ptr,  # [M]
    weights_ptr,  # [M] f32
    index_ptr,  # [M] i32
    count_ptr,  # [] i32
    scale_ptr,  # [] f32
    norm_ptr,  # [M, 2] f32, of used slots
    dtable_ptr,  # [V, E] f32 out, or None
    dbias_ptr,  # [V] f32 out
    V,
    E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    v0 = tl.program_id(0) * BLOCK_V
    v = v0 + tl.arange(0, BLOCK_V)
    tokens = load_tokens(table_ptr, v0, 0, V, E, BLOCK_V, BLOCK_E)
    bias = load_bias(bias_ptr, v, V)
    count = tl.load(count_ptr)
    acc = tl.zeros((BLOCK_V, BLOCK_E), tl.float32)
    total = tl.zeros((BLOCK_V,), tl.float32)
    for first in range(0, count, BLOCK_M):
        r = first + tl.arange(0, BLOCK_M)
        in_r = r < count
        y, w, top, log_total = _load_slots(targets_ptr, weights_ptr, index_ptr, norm_ptr, r, in_r)
        x = load_rows(x_ptr, index_ptr, r, in_r, 0, E, BLOCK_E)
        # Transposed, so that d feeds the second product as it lies.
        logits = dot(tokens, x.T, tl.zeros((BLOCK_V, BLOCK_M), tl.float32)) + bias[:, None]
        p = tl.exp2((logits - top[None, :]) * LOG2E - log_total[None, :])
        d = (p - tl.where(v[:, None] == y[None, :], 1.0, 0.0)) * w[None, :]
        total += tl.sum(d, axis=1)
        if dtable_ptr is not None:
            acc = dot(d.to(x.dtype), x, acc)
    scale = tl.load(scale_ptr)
    tl.store(dbias_ptr + v, total * scale, mask=v < V)
    if dtable_ptr is not None:
        e = tl.arange(0, BLOCK_E)
        place = v0.to(tl.int64) * E + tl.arange(0, BLOCK_V)[:, None] * E + e[None, :]
        tl.store(dtable_ptr + place, acc * scale, mask=(v < V)[:, None] & (e < E)[None, :])


@triton.jit(do_not_specialize=["first", "R"])
def mlm_head_difference(
    kept_ptr,  # [R, stride] in: exponentials relative to their block's maximum; out: d
    maxima_ptr,  # [R, blocks] f32
    targets_ptr,  # [M]
    weights_ptr,  # [M] f32
    index_ptr,  # [M] i32
    count_ptr,  # [] i32
    norm_ptr,  # [M, 2] f32, of used slots
    dbias_ptr,  # [V] f32, in and out: d summed over the slots
    first,
    R,
    V,
    blocks,
    stride,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    SUB: tl.constexpr,
):
    v = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    count = tl.load(count_ptr)
    total = tl.load(dbias_ptr + v, mask=v < V, other=0.0)
    for row0 in range(0, R, BLOCK_M):
        row = row0 + tl.arange(0, BLOCK_M)
        r = first + row
        in_r = (r < count) & (row < R)
        y, w, top, log_total = _load_slots(targets_ptr, weights_ptr, index_ptr, norm_ptr, r, in_r)
        inside = in_r[:, None] & (v < V)[None, :]
        place = row.to(tl.int64)[:, None] * stride + v[None, :]
        e = tl.load(kept_ptr + place, mask=inside, other=0.0).to(tl.float32)
        maximum = tl.load(
            maxima_ptr + row.to(tl.int64)[:, None] * blocks + v[None, :] // SUB, mask=inside, other=0.0
        )
        p = e * tl.exp2((maximum - top[:, None]) * LOG2E - log_total[:, None])
        d = (p - tl.where(v[None, :] == y[:, None], 1.0, 0.0)) * w[:, None]
        d = tl.where(inside, d, 0.0)  # slots that are not used multiply as well
        tl.store(
            kept_ptr + place, d.to(kept_ptr.dtype.element_ty), mask=(row < R)[:, None] & (v < stride)[None, :]
        )
        total += tl.sum(d, axis=0)
    tl.store(dbias_ptr + v, total, mask=v < V)


@triton.jit(do_not_specialize=["first"])
def mlm_head_gather(
    x_ptr,  # [M, E]
    index_ptr,  # [M] i32
    count_ptr,  # [] i32
    out_ptr,  # [R, E] out: rows of used slots, then 0
    first,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    r = first + tl.program_id(0)
    used = r < tl.load(count_ptr)
    slot = tl.load(index_ptr + r, mask=used, other=0).to(tl.int64)
    e = tl.arange(0, BLOCK_E)
    x = tl.load(x_ptr + slot * E + e, mask=used & (e < E), other=0.0)
    tl.store(out_ptr + tl.program_id(0).to(tl.int64) * E + e, x, mask=e < E)


@triton.jit(do_not_specialize=["first", "R", "parts"])
def mlm_head_scatter(
    partial_ptr,  # [parts, R, E] f32, of used slots
    index_ptr,  # [M] i32
    count_ptr,  # [] i32
    scale_ptr,  # [] f32
    dx_ptr,  # [M, E] f32 out
    first,
    R,
    parts,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if first + tl.program_id(0) >= tl.load(count_ptr):
        return
    slot = tl.load(index_ptr + first + tl.program_id(0)).to(tl.int64)
    e = tl.arange(0, BLOCK_E)
    acc = tl.zeros((BLOCK_E,), tl.float32)
    for part in range(parts):
        acc += tl.load(partial_ptr + (part * R.to(tl.int64) + row) * E + e, mask=e < E, other=0.0)
    tl.store(dx_ptr + slot * E + e, acc * tl.load(scale_ptr), mask=e < E)
