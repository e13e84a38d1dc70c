"""The sweep of `mlm_head`: tiles of logits, and what is kept of them."""

import triton
import triton.language as tl

from electra_fast.kernels._common import dot

LOG2E = tl.constexpr(1.4426950408889634)  # of differences alone: the largest logits have no such multiple


@triton.jit(do_not_specialize=["M"])
def mlm_head_used(
    weights_ptr,  # [M] f32
    index_ptr,  # [M] i32 out: the used slots, rising
    count_ptr,  # [] i32 out: how many
    unit_ptr,  # [M] f32 out: the weights over the largest one, if that is below 1
    scale_ptr,  # [] f32 out: 1 / sum of these, 0 for 0
    samples_ptr,  # [M] out: 0 in unused slots
    lse_ptr,  # [M] f32 out: the same
    M,
    BLOCK: tl.constexpr,
):
    count = tl.zeros((), tl.int32)
    total = tl.zeros((), tl.float64)
    most = tl.zeros((), tl.float32)
    for first in range(0, M, BLOCK):
        m = first + tl.arange(0, BLOCK)
        w = tl.load(weights_ptr + m, mask=m < M, other=0.0)
        used = w != 0
        tl.store(index_ptr + count + tl.cumsum(used.to(tl.int32), axis=0) - 1, m, mask=used)
        unused = (m < M) & (w == 0)
        tl.store(samples_ptr + m, tl.zeros((BLOCK,), samples_ptr.dtype.element_ty), mask=unused)
        tl.store(lse_ptr + m, tl.zeros((BLOCK,), tl.float32), mask=unused)
        count += tl.sum(used.to(tl.int32), axis=0)
        total += tl.sum(w.to(tl.float64), axis=0)
        most = tl.maximum(most, tl.max(tl.abs(w), axis=0))
    # The reciprocal of a sum below 3e-39 would be infinite.
    most = tl.where(most > 0, tl.minimum(most, 1.0), 1.0)
    for first in range(0, M, BLOCK):
        m = first + tl.arange(0, BLOCK)
        w = tl.load(weights_ptr + m, mask=m < M, other=0.0)
        tl.store(unit_ptr + m, tl.div_rn(w, most), mask=m < M)
    tl.store(count_ptr, count)
    tl.store(scale_ptr, tl.where(total == 0, 0.0, most / tl.where(total == 0, 1.0, total)).to(tl.float32))


@triton.jit
def load_rows(x_ptr, index_ptr, r, in_r, e0, E: tl.constexpr, BLOCK_E: tl.constexpr):
    """Load columns e0.. of x at the used slots r, 0 outside."""
    slot = tl.load(index_ptr + r, mask=in_r, other=0).to(tl.int64)
    e = e0 + tl.arange(0, BLOCK_E)
    return tl.load(x_ptr + slot[:, None] * E + e[None, :], mask=in_r[:, None] & (e < E)[None, :], other=0.0)


@triton.jit
def load_tokens(table_ptr, v0, e0, V, E: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_E: tl.constexpr):
    """Load columns e0.. of the table's rows v0.., 0 outside. A scalar base keeps the offsets in 32 bits."""
    v, e = tl.arange(0, BLOCK_V), e0 + tl.arange(0, BLOCK_E)
    inside = (v0 + v < V)[:, None] & (e < E)[None, :]
    return tl.load(table_ptr + v0.to(tl.int64) * E + v[:, None] * E + e[None, :], mask=inside, other=0.0)


@triton.jit
def load_bias(bias_ptr, v, V):
    return tl.load(bias_ptr + v, mask=v < V, other=float("-inf")).to(tl.float32)


@triton.jit
def finite(x):
    """Return x, or 0 for -inf: what is subtracted from a logit of -inf must not make it NaN."""
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
    tempered_ptr,  # [R, blocks] f32 out: the same at the temperature, or None where it is 1
    kept_ptr,  # [R, stride] out, dtype of x: those exponentials, or None
    inverse_temperature,
    first,  # of the used slots that this launch takes
    tiles,  # that a program takes
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
        x = load_rows(x_ptr, index_ptr, first + row, in_r, 0, E, BLOCK_E)
    for t in range(tiles):
        v0 = (tl.program_id(1) * tiles + t) * BLOCK_V
        acc = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
        if BLOCK_E >= E:
            acc = dot(x, load_tokens(table_ptr, v0, 0, V, E, BLOCK_V, BLOCK_E).T, acc)
        else:
            for e0 in range(0, E, BLOCK_E):
                part = load_rows(x_ptr, index_ptr, first + row, in_r, e0, E, BLOCK_E)
                acc = dot(part, load_tokens(table_ptr, v0, e0, V, E, BLOCK_V, BLOCK_E).T, acc)
        v = v0 + tl.arange(0, BLOCK_V)
        logits = acc + load_bias(bias_ptr, v, V)[None, :]
        logits = logits.reshape(BLOCK_M, BLOCK_V // SUB, SUB)
        maximum = tl.max(logits, axis=2)
        down = (logits - finite(maximum)[:, :, None]) * LOG2E
        e = tl.exp2(down)

        block = v0 // SUB + tl.arange(0, BLOCK_V // SUB)
        at = row.to(tl.int64)[:, None] * blocks + block[None, :]
        inside = in_r[:, None] & (block < blocks)[None, :]
        tl.store(maxima_ptr + at, maximum, mask=inside)
        tl.store(sums_ptr + at, tl.sum(e, axis=2), mask=inside)
        if tempered_ptr is not None:
            tl.store(tempered_ptr + at, tl.sum(tl.exp2(down * inverse_temperature), axis=2), mask=inside)
        if kept_ptr is not None:
            place = row.to(tl.int64)[:, None] * stride + v[None, :]
            kept = e.reshape(BLOCK_M, BLOCK_V).to(kept_ptr.dtype.element_ty)
            tl.store(kept_ptr + place, kept, mask=in_r[:, None] & (v < stride)[None, :])
