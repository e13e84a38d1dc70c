"""The draw of `mlm_head`: from maxima and sums of blocks of tokens to log-sum-exp, sample and loss."""

import triton
import triton.language as tl

from electra_fast.kernels._mlm_sweep import LOG2E, finite, load_bias, load_tokens

LN2 = tl.constexpr(0.6931471805599453)
NONE = tl.constexpr(2**30)  # an index that none reaches


@triton.jit
def _look(
    x_ptr, table_ptr, bias_ptr, slot, block, V, E: tl.constexpr, SUB: tl.constexpr, BLOCK_E: tl.constexpr
):
    """Return one slot's logits of a block of SUB tokens, -inf outside the vocabulary."""
    acc = tl.zeros((SUB,), tl.float32)
    for e0 in range(0, E, BLOCK_E):
        e = e0 + tl.arange(0, BLOCK_E)
        x = tl.load(x_ptr + slot * E + e, mask=e < E, other=0.0).to(tl.float32)
        w = load_tokens(table_ptr, block * SUB, e0, V, E, SUB, BLOCK_E).to(tl.float32)
        acc += tl.sum(x[None, :] * w, axis=1)
    return acc + load_bias(bias_ptr, block * SUB + tl.arange(0, SUB), V)


@triton.jit
def _exponential(logit, top, inverse_temperature):
    """Return exp((logit - top) / temperature), and 0 for a logit of -inf, whatever top is."""
    return tl.exp2((logit - finite(top)) * LOG2E * inverse_temperature)


@triton.jit
def _uniform(rng_ptr, slot):
    """Return one float64 uniform in [0, 1) with 53 bits."""
    step = tl.load(rng_ptr + 1).to(tl.uint32)
    w0, w1, _, _ = tl.philox(tl.load(rng_ptr), 0, slot.to(tl.uint32), step, 1)
    high, low = (w0 >> 5).to(tl.float64), (w1 >> 6).to(tl.float64)
    return (high * 67108864.0 + low) * (1.0 / 9007199254740992.0)


@triton.jit
def _blocks(maxima_ptr, sums_ptr, j, blocks, barred, rest_maximum, rest_sum):
    """Load maxima and sums of the blocks j; the block `barred` has another maximum and sum."""
    maximum = tl.load(maxima_ptr + j, mask=j < blocks, other=float("-inf"))
    s = tl.load(sums_ptr + j, mask=j < blocks, other=0.0)
    return tl.where(j == barred, rest_maximum, maximum), tl.where(j == barred, rest_sum, s)


@triton.jit
def _total(
    maxima_ptr, sums_ptr, blocks, barred, rest_maximum, rest_sum, inverse_temperature, BLOCK: tl.constexpr
):
    """Return the largest maximum and the float64 sum of the blocks' masses relative to it."""
    top = tl.full((), float("-inf"), tl.float32)
    for j0 in range(0, blocks, BLOCK):
        j = j0 + tl.arange(0, BLOCK)
        maximum, _ = _blocks(maxima_ptr, sums_ptr, j, blocks, barred, rest_maximum, rest_sum)
        top = tl.maximum(top, tl.max(maximum, axis=0))
    total = tl.zeros((), tl.float64)
    for j0 in range(0, blocks, BLOCK):
        j = j0 + tl.arange(0, BLOCK)
        maximum, s = _blocks(maxima_ptr, sums_ptr, j, blocks, barred, rest_maximum, rest_sum)
        z = s * _exponential(maximum, top, inverse_temperature)
        total += tl.sum(z.to(tl.float64), axis=0)
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
    tempered_ptr,  # [R, blocks] f32, or None where the temperature is 1
    samples_ptr,  # [M] out, dtype of targets
    lse_ptr,  # [M] f32 out
    # [M, 2] f32 out, of used slots: the two terms of lse, the second in units of log 2 and NaN where the
    # target is no token. Of their rounded sum a peaked row's gradient would be the rounding.
    norm_ptr,
    nll_ptr,  # [M] f32 out, of used slots
    leads_ptr,  # [M] f32 out, of used slots: 1 where the target is the arg-max
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
    token = tl.arange(0, SUB)
    is_y = block_y * SUB + token == y

    looked = _look(x_ptr, table_ptr, bias_ptr, slot, block_y, V, E, SUB, BLOCK_E)
    target = tl.sum(tl.where(is_y, looked, 0.0), axis=0)
    beaten = (looked > target) | ((looked == target) & (block_y * SUB + token < y))
    leads = tl.sum(beaten.to(tl.int32), axis=0) == 0
    top, total = _total(maxima_ptr, sums_ptr, blocks, -1, 0.0, 0.0, 1.0, BLOCK)
    for j0 in range(0, block_y, BLOCK):
        j = j0 + tl.arange(0, BLOCK)
        maximum = tl.load(maxima_ptr + j, mask=j < block_y, other=float("-inf"))
        leads = leads & (tl.max((maximum >= top).to(tl.int32), axis=0) == 0)
    leads = leads & (tl.load(maxima_ptr + block_y) == top)

    log_total = tl.log2(total.to(tl.float32))
    tl.store(lse_ptr + slot, top + log_total * LN2)
    tl.store(norm_ptr + 2 * r, top)
    tl.store(norm_ptr + 2 * r + 1, tl.where(legal, log_total, float("nan")))
    # The two looks differ in order, hence in rounding: from the maximum to itself the distance is 0.
    distance = tl.where(leads, 0.0, top - target)
    tl.store(nll_ptr + r, tl.where(legal, distance + log_total * LN2, float("nan")))
    tl.store(leads_ptr + r, leads.to(tl.float32))

    # The draw is at the temperature, and without the target where it is barred.
    barred = -1
    rest_maximum = 0.0
    rest_sum = 0.0
    if tempered_ptr is not None:
        sums_ptr = tempered_ptr + tl.program_id(0).to(tl.int64) * blocks
    if DISALLOW:
        barred = block_y
        looked = tl.where(is_y, float("-inf"), looked)
        rest_maximum = tl.max(looked, axis=0)
        rest_sum = tl.sum(_exponential(looked, rest_maximum, inverse_temperature), axis=0)
    if DISALLOW or tempered_ptr is not None:
        top, total = _total(
            maxima_ptr, sums_ptr, blocks, barred, rest_maximum, rest_sum, inverse_temperature, BLOCK
        )

    # The first block at which the cumulated masses pass u; if rounding leaves none, the last with a mass.
    threshold = _uniform(rng_ptr, slot) * total
    passed = tl.zeros((), tl.float64)
    before = tl.zeros((), tl.float64)
    mass = tl.zeros((), tl.float64)
    chosen = tl.zeros((), tl.int32)
    for j0 in range(0, blocks, BLOCK):
        j = j0 + tl.arange(0, BLOCK)
        maximum, s = _blocks(maxima_ptr, sums_ptr, j, blocks, barred, rest_maximum, rest_sum)
        z = (s * _exponential(maximum, top, inverse_temperature)).to(tl.float64)
        up_to = passed + tl.cumsum(z, axis=0)
        hit = tl.min(tl.where((up_to > threshold) & (z > 0), j, NONE), axis=0)
        here = tl.where(hit < NONE, hit, tl.max(tl.where(z > 0, j, -1), axis=0))
        move = (here >= 0) & (passed <= threshold)
        chosen = tl.where(move, here, chosen)
        before = tl.where(move, tl.sum(tl.where(j == here, up_to - z, 0.0), axis=0), before)
        mass = tl.where(move, tl.sum(tl.where(j == here, z, 0.0), axis=0), mass)
        passed += tl.sum(z, axis=0)

    # In the block's own scale, where the largest term is 1, however the second look rounded it.
    looked = _look(x_ptr, table_ptr, bias_ptr, slot, chosen, V, E, SUB, BLOCK_E)
    if DISALLOW:
        looked = tl.where(chosen * SUB + token == y, float("-inf"), looked)
    e = _exponential(looked, tl.max(looked, axis=0), inverse_temperature).to(tl.float64)
    goal = (threshold - before) / mass * tl.sum(e, axis=0)
    hit = tl.min(tl.where((tl.cumsum(e, axis=0) > goal) & (e > 0), token, NONE), axis=0)
    last = tl.maximum(tl.max(tl.where(e > 0, token, -1), axis=0), 0)  # a row of NaN draws token 0
    sample = chosen * SUB + tl.where(hit < NONE, hit, last)
    tl.store(samples_ptr + slot, sample.to(samples_ptr.dtype.element_ty))


@triton.jit
def mlm_head_loss(
    weights_ptr,  # [M] f32
    index_ptr,  # [M] i32
    count_ptr,  # [] i32
    nll_ptr,  # [M] f32, of used slots
    leads_ptr,  # [M] f32, of used slots: 1 where the target is the arg-max
    loss_ptr,  # [] f32 out
    correct_ptr,  # [] f32 out
    BLOCK: tl.constexpr,
):
    count = tl.load(count_ptr)
    loss = tl.zeros((), tl.float64)
    correct = tl.zeros((), tl.float64)
    total = tl.zeros((), tl.float64)
    for first in range(0, count, BLOCK):
        r = first + tl.arange(0, BLOCK)
        slot = tl.load(index_ptr + r, mask=r < count, other=0)
        w = tl.load(weights_ptr + slot, mask=r < count, other=0.0).to(tl.float64)
        loss += tl.sum(w * tl.load(nll_ptr + r, mask=r < count, other=0.0), axis=0)
        correct += tl.sum(w * tl.load(leads_ptr + r, mask=r < count, other=0.0), axis=0)
        total += tl.sum(w, axis=0)
    tl.store(loss_ptr, (loss / tl.where(total == 0, 1.0, total)).to(tl.float32))
    tl.store(correct_ptr, correct.to(tl.float32))
