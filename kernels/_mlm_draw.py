"""The draw of `mlm_head`: from maxima and sums of blocks of tokens to log-sum-exp, sample and loss."""

import triton
import triton.language as tl

from electra_fast.kernels._common import LOG2E
from electra_fast.kernels._mlm_sweep import finite, load_bias, load_tokens

LN2 = tl.constexpr(0.6931471805599453)
NONE = tl.constexpr(2**30)  # above every index


@triton.jit
def _block_logits(
    x_ptr, table_ptr, bias_ptr, slot, block, V, E: tl.constexpr, SUB: tl.constexpr, BLOCK_E: tl.constexpr
):
    """Return one slot's logits of a block of tokens, -inf outside the vocabulary, ``[SUB]``."""
    acc = tl.zeros((SUB,), tl.float32)
    for e0 in range(0, E, BLOCK_E):
        offs_e = e0 + tl.arange(0, BLOCK_E)
        x = tl.load(x_ptr + slot * E + offs_e, mask=offs_e < E, other=0.0).to(tl.float32)
        w = load_tokens(table_ptr, block * SUB, e0, V, E, SUB, BLOCK_E).to(tl.float32)
        acc += tl.sum(x[None, :] * w, axis=1)
    return acc + load_bias(bias_ptr, block * SUB, V, SUB)


@triton.jit
def _exponential(logit, maximum, inverse_temperature):
    """Return exp((logit - maximum) / temperature), and 0 for a logit of -inf, even if the maximum is -inf."""
    return tl.exp2((logit - finite(maximum)) * LOG2E * inverse_temperature)


@triton.jit
def _uniform(rng_ptr, slot):
    """Return one float64 uniform in [0, 1) with 53 bits."""
    step = tl.load(rng_ptr + 1).to(tl.uint32)
    w0, w1, _, _ = tl.philox(tl.load(rng_ptr), 0, slot.to(tl.uint32), step, 1)  # stream 1: sampling
    high, low = (w0 >> 5).to(tl.float64), (w1 >> 6).to(tl.float64)
    return (high * 67108864.0 + low) * (1.0 / 9007199254740992.0)


@triton.jit
def _load_blocks(maxima_ptr, sums_ptr, offs_b, blocks, override):
    """Load maxima and sums of the blocks `offs_b`; `override` = (block, maximum, sum) replaces one."""
    block, block_max, block_sum = override
    maximum = tl.load(maxima_ptr + offs_b, mask=offs_b < blocks, other=float("-inf"))
    s = tl.load(sums_ptr + offs_b, mask=offs_b < blocks, other=0.0)
    return tl.where(offs_b == block, block_max, maximum), tl.where(offs_b == block, block_sum, s)


@triton.jit
def _combine_blocks(maxima_ptr, sums_ptr, blocks, override, inverse_temperature, BLOCK: tl.constexpr):
    """Return the largest maximum and, in float64, the sum of all exponentials relative to it."""
    top = tl.full((), float("-inf"), tl.float32)
    for b0 in range(0, blocks, BLOCK):
        offs_b = b0 + tl.arange(0, BLOCK)
        maximum, _ = _load_blocks(maxima_ptr, sums_ptr, offs_b, blocks, override)
        top = tl.maximum(top, tl.max(maximum, axis=0))
    total = tl.zeros((), tl.float64)
    for b0 in range(0, blocks, BLOCK):
        offs_b = b0 + tl.arange(0, BLOCK)
        maximum, s = _load_blocks(maxima_ptr, sums_ptr, offs_b, blocks, override)
        mass = s * _exponential(maximum, top, inverse_temperature)
        total += tl.sum(mass.to(tl.float64), axis=0)
    return top, total


@triton.jit(do_not_specialize=["first"])
def mlm_head_draw(
    x_ptr,  # [M, E]
    table_ptr,  # [V, E]
    bias_ptr,  # [V]
    targets_ptr,  # [M]
    index_ptr,  # [M] i32
    count_ptr,  # [] i32
    rng_ptr,  # [2] i64: seed, step
    maxima_ptr,  # [R, blocks] f32
    sums_ptr,  # [R, blocks] f32
    tempered_ptr,  # [R, blocks] f32, or None if the temperature is 1
    samples_ptr,  # [M] out, dtype of targets
    lse_ptr,  # [M] f32 out
    norm_ptr,  # [M, 2] f32 out, of used slots: maximum, and log-sum in units of log 2 or NaN for a bad target
    nll_ptr,  # [M] f32 out, of used slots
    leads_ptr,  # [M] f32 out, of used slots: 1 if the target is the arg-max, else 0
    inverse_temperature,
    first,
    V,
    blocks,
    E: tl.constexpr,
    DISALLOW: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_E: tl.constexpr,
    SUB: tl.constexpr,
):
    r = first + tl.program_id(0)
    if r >= tl.load(count_ptr):
        return
    slot = tl.load(index_ptr + r).to(tl.int64)
    maxima_ptr += tl.program_id(0).to(tl.int64) * blocks
    sums_ptr += tl.program_id(0).to(tl.int64) * blocks
    y = tl.load(targets_ptr + slot).to(tl.int64)
    legal = (y >= 0) & (y < V)  # a bad target is never dereferenced
    y = tl.where(legal, y, 0).to(tl.int32)
    block_y = y // SUB
    offs_s = tl.arange(0, SUB)
    is_y = block_y * SUB + offs_s == y

    logits = _block_logits(x_ptr, table_ptr, bias_ptr, slot, block_y, V, E, SUB, BLOCK_E)
    target = tl.sum(tl.where(is_y, logits, 0.0), axis=0)
    beaten = (logits > target) | ((logits == target) & (block_y * SUB + offs_s < y))
    leads = tl.sum(beaten.to(tl.int32), axis=0) == 0
    override = (-1, 0.0, 0.0)  # no block
    top, total = _combine_blocks(maxima_ptr, sums_ptr, blocks, override, 1.0, BLOCK)
    for b0 in range(0, block_y, BLOCK):
        offs_b = b0 + tl.arange(0, BLOCK)
        maximum = tl.load(maxima_ptr + offs_b, mask=offs_b < block_y, other=float("-inf"))
        leads = leads & (tl.max((maximum >= top).to(tl.int32), axis=0) == 0)
    leads = leads & (tl.load(maxima_ptr + block_y) == top)

    # Backward needs both terms of lse: the rounding of their sum would dominate a peaked row's gradient.
    log_sum = tl.log2(total.to(tl.float32))
    tl.store(lse_ptr + slot, top + log_sum * LN2)
    tl.store(norm_ptr + 2 * r, top)
    tl.store(norm_ptr + 2 * r + 1, tl.where(legal, log_sum, float("nan")))
    # `target` and `top` were summed in different orders. If they are the same logit, their distance is 0.
    distance = tl.where(leads, 0.0, top - target)
    tl.store(nll_ptr + r, tl.where(legal, distance + log_sum * LN2, float("nan")))
    tl.store(leads_ptr + r, leads.to(tl.float32))

    # The draw is at the temperature, and excludes the target if DISALLOW.
    if tempered_ptr is not None:
        sums_ptr = tempered_ptr + tl.program_id(0).to(tl.int64) * blocks
    if DISALLOW:
        logits = tl.where(is_y, float("-inf"), logits)
        max_y = tl.max(logits, axis=0)
        override = (block_y, max_y, tl.sum(_exponential(logits, max_y, inverse_temperature), axis=0))
    if DISALLOW or tempered_ptr is not None:
        top, total = _combine_blocks(maxima_ptr, sums_ptr, blocks, override, inverse_temperature, BLOCK)

    # Choose the first block at which the cumulated masses exceed `threshold`; if rounding leaves none, the
    # last one with a mass.
    threshold = _uniform(rng_ptr, slot) * total
    passed = tl.zeros((), tl.float64)  # mass of the blocks up to b0
    before = tl.zeros((), tl.float64)  # mass of the blocks before the chosen one
    mass = tl.zeros((), tl.float64)  # mass of the chosen block
    chosen = tl.zeros((), tl.int32)
    for b0 in range(0, blocks, BLOCK):
        offs_b = b0 + tl.arange(0, BLOCK)
        maximum, s = _load_blocks(maxima_ptr, sums_ptr, offs_b, blocks, override)
        z = (s * _exponential(maximum, top, inverse_temperature)).to(tl.float64)
        up_to = passed + tl.cumsum(z, axis=0)
        hit = tl.min(tl.where((up_to > threshold) & (z > 0), offs_b, NONE), axis=0)
        here = tl.where(hit < NONE, hit, tl.max(tl.where(z > 0, offs_b, -1), axis=0))
        move = (here >= 0) & (passed <= threshold)
        chosen = tl.where(move, here, chosen)
        before = tl.where(move, tl.sum(tl.where(offs_b == here, up_to - z, 0.0), axis=0), before)
        mass = tl.where(move, tl.sum(tl.where(offs_b == here, z, 0.0), axis=0), mass)
        passed += tl.sum(z, axis=0)

    # Choose the token in the block's own scale: its largest term is 1, however these logits were rounded.
    logits = _block_logits(x_ptr, table_ptr, bias_ptr, slot, chosen, V, E, SUB, BLOCK_E)
    if DISALLOW:
        logits = tl.where(chosen * SUB + offs_s == y, float("-inf"), logits)
    e = _exponential(logits, tl.max(logits, axis=0), inverse_temperature).to(tl.float64)
    goal = (threshold - before) / mass * tl.sum(e, axis=0)
    hit = tl.min(tl.where((tl.cumsum(e, axis=0) > goal) & (e > 0), offs_s, NONE), axis=0)
    last = tl.maximum(tl.max(tl.where(e > 0, offs_s, -1), axis=0), 0)  # a row of NaN draws token 0
    sample = chosen * SUB + tl.where(hit < NONE, hit, last)
    tl.store(samples_ptr + slot, sample.to(samples_ptr.dtype.element_ty))


@triton.jit
def mlm_head_loss(
    weights_ptr,  # [M] f32
    index_ptr,  # [M] i32
    count_ptr,  # [] i32
    nll_ptr,  # [M] f32, of used slots
    leads_ptr,  # [M] f32, of used slots: 1 if the target is the arg-max, else 0
    loss_ptr,  # [] f32 out
    correct_ptr,  # [] f32 out
    BLOCK: tl.constexpr,
):
    count = tl.load(count_ptr)
    loss = tl.zeros((), tl.float64)
    correct = tl.zeros((), tl.float64)
    total = tl.zeros((), tl.float64)
    for r0 in range(0, count, BLOCK):
        offs_r = r0 + tl.arange(0, BLOCK)
        in_r = offs_r < count
        slot = tl.load(index_ptr + offs_r, mask=in_r, other=0)
        w = tl.load(weights_ptr + slot, mask=in_r, other=0.0).to(tl.float64)
        loss += tl.sum(w * tl.load(nll_ptr + offs_r, mask=in_r, other=0.0), axis=0)
        correct += tl.sum(w * tl.load(leads_ptr + offs_r, mask=in_r, other=0.0), axis=0)
        total += tl.sum(w, axis=0)
    tl.store(loss_ptr, (loss / tl.where(total == 0, 1.0, total)).to(tl.float32))
    tl.store(correct_ptr, correct.to(tl.float32))
