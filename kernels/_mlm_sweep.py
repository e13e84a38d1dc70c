"""The sweep of `mlm_head`: used slots, tiles of logits, and maximum and sum of each block of tokens."""

import triton
import triton.language as tl

from electra_fast.kernels._common import LOG2E, dot


@triton.jit(do_not_specialize=["M"])
def mlm_head_used(
    weights_ptr,  # [M] f32
    index_ptr,  # [M] i32 out: the used slots, ascending
    count_ptr,  # [] i32 out: their number
    unit_ptr,  # [M] f32 out: the weights, divided by the largest if that is below 1
    scale_ptr,  # [] f32 out: 1 / sum of these, 0 if the sum is 0
    samples_ptr,  # [M] out: 0 in unused slots
    lse_ptr,  # [M] f32 out: 0 in unused slots
    M,
    BLOCK: tl.constexpr,
):
    count = tl.zeros((), tl.int32)
    total = tl.zeros((), tl.float64)
    largest = tl.zeros((), tl.float32)
    for m0 in range(0, M, BLOCK):
        offs_m = m0 + tl.arange(0, BLOCK)
        w = tl.load(weights_ptr + offs_m, mask=offs_m < M, other=0.0)
        used = w != 0
        tl.store(index_ptr + count + tl.cumsum(used.to(tl.int32), axis=0) - 1, offs_m, mask=used)
        unused = (offs_m < M) & (w == 0)
        tl.store(samples_ptr + offs_m, tl.zeros((BLOCK,), samples_ptr.dtype.element_ty), mask=unused)
        tl.store(lse_ptr + offs_m, tl.zeros((BLOCK,), tl.float32), mask=unused)
        count += tl.sum(used.to(tl.int32), axis=0)
        total += tl.sum(w.to(tl.float64), axis=0)
        largest = tl.maximum(largest, tl.max(tl.abs(w), axis=0))
    # Without this division the reciprocal of a sum below 3e-39 would be infinite.
    divisor = tl.where(largest > 0, tl.minimum(largest, 1.0), 1.0)
    for m0 in range(0, M, BLOCK):
        offs_m = m0 + tl.arange(0, BLOCK)
        w = tl.load(weights_ptr + offs_m, mask=offs_m < M, other=0.0)
        tl.store(unit_ptr + offs_m, tl.div_rn(w, divisor), mask=offs_m < M)
    tl.store(count_ptr, count)
    tl.store(scale_ptr, tl.where(total == 0, 0.0, divisor / tl.where(total == 0, 1.0, total)).to(tl.float32))


@triton.jit
def load_slots(x_ptr, index_ptr, offs_r, in_r, e0, E: tl.constexpr, BLOCK_E: tl.constexpr):
    """Load columns e0.. of x at the used slots `offs_r`, 0 outside, ``[BLOCK_M, BLOCK_E]``."""
    slot = tl.load(index_ptr + offs_r, mask=in_r, other=0).to(tl.int64)
    offs_e = e0 + tl.arange(0, BLOCK_E)
    mask = in_r[:, None] & (offs_e < E)[None, :]
    return tl.load(x_ptr + slot[:, None] * E + offs_e[None, :], mask=mask, other=0.0)


@triton.jit
def load_tokens(table_ptr, v0, e0, V, E: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_E: tl.constexpr):
    """Load columns e0.. of the table's rows v0.., 0 outside, ``[BLOCK_V, BLOCK_E]``."""
    offs_v, offs_e = tl.arange(0, BLOCK_V), e0 + tl.arange(0, BLOCK_E)
    mask = (v0 + offs_v < V)[:, None] & (offs_e < E)[None, :]
    base_ptr = table_ptr + v0.to(tl.int64) * E  # a scalar base keeps the offsets in 32 bits
    return tl.load(base_ptr + offs_v[:, None] * E + offs_e[None, :], mask=mask, other=0.0)


@triton.jit
def load_bias(bias_ptr, v0, V, BLOCK_V: tl.constexpr):
    """Load the bias of tokens v0.. in float32, -inf outside the vocabulary, ``[BLOCK_V]``."""
    offs_v = v0 + tl.arange(0, BLOCK_V)
    return tl.load(bias_ptr + offs_v, mask=offs_v < V, other=float("-inf")).to(tl.float32)


@triton.jit
def whole_logits(x, tokens, bias_ptr, v0, V):
    """Return the logits of slots x and tokens v0.., both with all their columns, ``[BLOCK_M, BLOCK_V]``."""
    acc = dot(x, tokens.T, tl.zeros((x.shape[0], tokens.shape[0]), tl.float32))
    return acc + load_bias(bias_ptr, v0, V, tokens.shape[0])[None, :]


@triton.jit
def finite(x):
    """Return x, or 0 for -inf: a logit of -inf minus -inf would be NaN."""
    return tl.where(x == float("-inf"), 0.0, x)


@triton.jit(do_not_specialize=["first", "tiles"])
def mlm_head_sweep(
    x_ptr,  # [M, E]
    table_ptr,  # [V, E]
    bias_ptr,  # [V]
    index_ptr,  # [M] i32
    count_ptr,  # [] i32
    maxima_ptr,  # [R, blocks] f32 out
    sums_ptr,  # [R, blocks] f32 out: of exponentials relative to their maximum
    tempered_ptr,  # [R, blocks] f32 out: the same at the temperature, or None if that is 1
    kept_ptr,  # [R, stride] out, dtype of x: these exponentials, or None
    inverse_temperature,
    first,  # the first used slot of this launch
    tiles,  # per program
    V,
    blocks,
    stride,
    E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_E: tl.constexpr,
    SUB: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    count = tl.load(count_ptr)
    if first + tl.program_id(0) * BLOCK_M >= count:
        return
    in_r = first + row < count
    if BLOCK_E >= E:
        x = load_slots(x_ptr, index_ptr, first + row, in_r, 0, E, BLOCK_E)
    for i in range(tiles):
        v0 = (tl.program_id(1) * tiles + i) * BLOCK_V
        if BLOCK_E >= E:
            tokens = load_tokens(table_ptr, v0, 0, V, E, BLOCK_V, BLOCK_E)
            logits = whole_logits(x, tokens, bias_ptr, v0, V)
        else:
            acc = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
            for e0 in range(0, E, BLOCK_E):
                part = load_slots(x_ptr, index_ptr, first + row, in_r, e0, E, BLOCK_E)
                acc = dot(part, load_tokens(table_ptr, v0, e0, V, E, BLOCK_V, BLOCK_E).T, acc)
            logits = acc + load_bias(bias_ptr, v0, V, BLOCK_V)[None, :]
        logits = logits.reshape(BLOCK_M, BLOCK_V // SUB, SUB)
        maximum = tl.max(logits, axis=2)  # [BLOCK_M, BLOCK_V // SUB]
        shifted = (logits - finite(maximum)[:, :, None]) * LOG2E
        e = tl.exp2(shifted)

        block = v0 // SUB + tl.arange(0, BLOCK_V // SUB)
        offs = row.to(tl.int64)[:, None] * blocks + block[None, :]
        mask = in_r[:, None] & (block < blocks)[None, :]
        tl.store(maxima_ptr + offs, maximum, mask=mask)
        tl.store(sums_ptr + offs, tl.sum(e, axis=2), mask=mask)
        if tempered_ptr is not None:
            tl.store(tempered_ptr + offs, tl.sum(tl.exp2(shifted * inverse_temperature), axis=2), mask=mask)
        if kept_ptr is not None:
            offs_v = v0 + tl.arange(0, BLOCK_V)
            offs = row.to(tl.int64)[:, None] * stride + offs_v[None, :]
            kept = e.reshape(BLOCK_M, BLOCK_V).to(kept_ptr.dtype.element_ty)
            tl.store(kept_ptr + offs, kept, mask=in_r[:, None] & (offs_v < stride)[None, :])
