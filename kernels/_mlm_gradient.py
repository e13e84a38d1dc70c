"""The gradient of `mlm_head`: d = w (softmax - onehot(target)) times the table, and times x."""

import triton
import triton.language as tl

from electra_fast.kernels._common import LOG2E, dot
from electra_fast.kernels._mlm_sweep import load_bias, load_slots, load_tokens, whole_logits


@triton.jit
def _load_facts(targets_ptr, weights_ptr, index_ptr, norm_ptr, offs_r, in_r):
    """Load target, weight, maximum and log-sum of used slots; outside of them, values that make d = 0."""
    slot = tl.load(index_ptr + offs_r, mask=in_r, other=0)
    y = tl.load(targets_ptr + slot, mask=in_r, other=-1).to(tl.int32)
    w = tl.load(weights_ptr + slot, mask=in_r, other=0.0)
    top = tl.load(norm_ptr + 2 * offs_r, mask=in_r, other=float("inf"))
    log_sum = tl.load(norm_ptr + 2 * offs_r + 1, mask=in_r, other=0.0)
    return y, w, top, log_sum


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
    offs_r = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    count = tl.load(count_ptr)
    if tl.program_id(0) * BLOCK_M >= count:
        return
    in_r = offs_r < count
    y, w, top, log_sum = _load_facts(targets_ptr, weights_ptr, index_ptr, norm_ptr, offs_r, in_r)
    x = load_slots(x_ptr, index_ptr, offs_r, in_r, 0, E, BLOCK_E)
    acc = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    for i in range(tiles):
        v0 = (tl.program_id(1) * tiles + i) * BLOCK_V
        offs_v = v0 + tl.arange(0, BLOCK_V)
        tokens = load_tokens(table_ptr, v0, 0, V, E, BLOCK_V, BLOCK_E)
        logits = whole_logits(x, tokens, bias_ptr, v0, V)  # [BLOCK_M, BLOCK_V]
        p = tl.exp2((logits - top[:, None]) * LOG2E - log_sum[:, None])
        d = (p - tl.where(offs_v[None, :] == y[:, None], 1.0, 0.0)) * w[:, None]
        acc = dot(d.to(x.dtype), tokens, acc)
    offs_e = tl.arange(0, BLOCK_E)
    offs = (tl.program_id(1).to(tl.int64) * M + offs_r)[:, None] * E + offs_e[None, :]
    tl.store(partial_ptr + offs, acc, mask=in_r[:, None] & (offs_e < E)[None, :])


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
    offs_v = v0 + tl.arange(0, BLOCK_V)
    tokens = load_tokens(table_ptr, v0, 0, V, E, BLOCK_V, BLOCK_E)
    bias = load_bias(bias_ptr, v0, V, BLOCK_V)
    count = tl.load(count_ptr)
    acc = tl.zeros((BLOCK_V, BLOCK_E), tl.float32)
    dbias = tl.zeros((BLOCK_V,), tl.float32)
    for r0 in range(0, count, BLOCK_M):
        offs_r = r0 + tl.arange(0, BLOCK_M)
        in_r = offs_r < count
        y, w, top, log_sum = _load_facts(targets_ptr, weights_ptr, index_ptr, norm_ptr, offs_r, in_r)
        x = load_slots(x_ptr, index_ptr, offs_r, in_r, 0, E, BLOCK_E)
        # Transposed, [BLOCK_V, BLOCK_M], so that d is an operand of the second product as it is.
        logits = dot(tokens, x.T, tl.zeros((BLOCK_V, BLOCK_M), tl.float32)) + bias[:, None]
        p = tl.exp2((logits - top[None, :]) * LOG2E - log_sum[None, :])
        d = (p - tl.where(offs_v[:, None] == y[None, :], 1.0, 0.0)) * w[None, :]
        dbias += tl.sum(d, axis=1)
        if dtable_ptr is not None:
            acc = dot(d.to(x.dtype), x, acc)
    scale = tl.load(scale_ptr)
    tl.store(dbias_ptr + offs_v, dbias * scale, mask=offs_v < V)
    if dtable_ptr is not None:
        offs_e = tl.arange(0, BLOCK_E)
        offs = v0.to(tl.int64) * E + tl.arange(0, BLOCK_V)[:, None] * E + offs_e[None, :]
        tl.store(dtable_ptr + offs, acc * scale, mask=(offs_v < V)[:, None] & (offs_e < E)[None, :])


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
    offs_v = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    count = tl.load(count_ptr)
    dbias = tl.load(dbias_ptr + offs_v, mask=offs_v < V, other=0.0)
    for row0 in range(0, R, BLOCK_M):
        row = row0 + tl.arange(0, BLOCK_M)
        offs_r = first + row
        in_r = (offs_r < count) & (row < R)
        y, w, top, log_sum = _load_facts(targets_ptr, weights_ptr, index_ptr, norm_ptr, offs_r, in_r)
        mask = in_r[:, None] & (offs_v < V)[None, :]
        offs = row.to(tl.int64)[:, None] * stride + offs_v[None, :]
        e = tl.load(kept_ptr + offs, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_V]
        block_ptr = maxima_ptr + row.to(tl.int64)[:, None] * blocks + offs_v[None, :] // SUB
        maximum = tl.load(block_ptr, mask=mask, other=0.0)
        p = e * tl.exp2((maximum - top[:, None]) * LOG2E - log_sum[:, None])
        d = (p - tl.where(offs_v[None, :] == y[:, None], 1.0, 0.0)) * w[:, None]
        d = tl.where(mask, d, 0.0)  # cuBLAS multiplies the rows of unused slots too
        d_ptr = kept_ptr + offs
        tl.store(d_ptr, d.to(d_ptr.dtype.element_ty), mask=(row < R)[:, None] & (offs_v < stride)[None, :])
        dbias += tl.sum(d, axis=0)
    tl.store(dbias_ptr + offs_v, dbias, mask=offs_v < V)


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
    offs_e = tl.arange(0, BLOCK_E)
    x = tl.load(x_ptr + slot * E + offs_e, mask=used & (offs_e < E), other=0.0)
    tl.store(out_ptr + tl.program_id(0).to(tl.int64) * E + offs_e, x, mask=offs_e < E)


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
    offs_e = tl.arange(0, BLOCK_E)
    in_e = offs_e < E
    acc = tl.zeros((BLOCK_E,), tl.float32)
    for part in range(parts):
        acc += tl.load(partial_ptr + (part * R.to(tl.int64) + row) * E + offs_e, mask=in_e, other=0.0)
    tl.store(dx_ptr + slot * E + offs_e, acc * tl.load(scale_ptr), mask=in_e)
