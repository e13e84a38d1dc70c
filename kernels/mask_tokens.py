"""Choose the masked positions of each sequence and write [MASK] there, with one program per sequence.

Of the c candidates, the k with the smallest Philox words are masked; in a tie the lower position wins. The
k-th smallest word is found bit by bit from the top, by 32 counts over a row in registers: at 128 positions
one warp and no barrier. A sort needs more than twice the instructions, and counting each pair spills from
256 positions on.

k = min(c, max(1, (n P + 2^31) >> 32)) for n real tokens and the rate P in 32-bit fixed point is the same on
every backend. A float32 product would round n * 0.15 wrongly at n = 190, 350, 390, …
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from electra_fast.kernels._common import next_power_of_2
from electra_fast.kernels._launch import launch

MAX_BLOCK = 8192


@triton.jit
def _smallest(key, candidate, k):
    """Return which candidates have the k smallest uint32 keys; in a tie the lower position wins."""
    kth = tl.full((), 0, tl.uint32)
    bit = tl.full((), 1 << 31, tl.uint32)
    for _ in range(32):  # the largest value with fewer than k keys below it is the k-th smallest key
        below = tl.sum((key < (kth | bit)).to(tl.int32), axis=0)
        kth = tl.where(below < k, kth | bit, kth)
        bit = bit >> 1
    below = key < kth
    tie = candidate & (key == kth)
    room = k - tl.sum(below.to(tl.int32), axis=0)
    return below | (tie & (tl.cumsum(tie.to(tl.int32), axis=0) <= room))


@triton.jit(do_not_specialize=["T", "M"])  # they change with every packed batch and must not recompile
def _mask_tokens(
    ids_ptr,  # [T]
    candidates_ptr,  # [T] uint8, not 0 if the token may be masked
    rng_ptr,  # [2] i64: seed, step
    key_mask_ptr,  # [T] uint8, not 0 if the token is real, or None
    cu_seqlens_ptr,  # [B + 1], or None for B rows of L tokens and N slots
    out_ptr,  # [T] out, dtype of ids
    positions_ptr,  # [M] out, dtype of ids
    targets_ptr,  # [M] out, dtype of ids
    weights_ptr,  # [M] f32 out
    mask_id,
    mask_rate,
    keep_rate,
    T,
    L,
    M,
    N,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    P = tl.zeros((), tl.int64) + mask_rate
    if cu_seqlens_ptr is None:
        start = b * L
        before = start
        end = start + L
        slot = b * N
        next_slot = slot + N
    else:
        start = tl.load(cu_seqlens_ptr + b).to(tl.int64)
        before = tl.load(cu_seqlens_ptr + tl.maximum(b - 1, 0)).to(tl.int64)
        end = tl.load(cu_seqlens_ptr + b + 1).to(tl.int64)
        slot = ((P * start) >> 32) + b
        next_slot = ((P * end) >> 32) + b + 1

    # The host cannot check these bounds without a synchronisation. If they are bad, nothing is written, and
    # the slots keep the launcher's NaN.
    legal = (start >= 0) & (before <= start) & (start <= end) & (end <= T) & (end - start <= BLOCK)
    seq_len = tl.where(legal, end - start, 0).to(tl.int32)
    slots = tl.where(legal, tl.minimum(next_slot, M) - slot, 0).to(tl.int32)

    # Scalar bases and 32-bit offsets: one 64-bit offset per token would double the registers.
    offs_l = tl.arange(0, BLOCK)
    in_l = offs_l < seq_len
    candidate = tl.load(candidates_ptr + start + offs_l, mask=in_l, other=0) != 0  # [BLOCK]
    if key_mask_ptr is None:
        n = seq_len
    else:
        real = tl.load(key_mask_ptr + start + offs_l, mask=in_l, other=0) != 0
        candidate = candidate & real
        n = tl.sum(real.to(tl.int32), axis=0)

    c = tl.sum(candidate.to(tl.int32), axis=0)
    half = tl.full((), 1 << 31, tl.int64)
    k = tl.minimum(c, tl.maximum((n.to(tl.int64) * P + half) >> 32, 1).to(tl.int32))
    step = tl.load(rng_ptr + 1).to(tl.uint32)
    offs_t = start.to(tl.uint32) + offs_l.to(tl.uint32)
    w0, w1, _, _ = tl.philox(tl.load(rng_ptr), 0, offs_t, step, 0)  # stream 0: masking
    hide = w1.to(tl.int64) >= keep_rate  # 64 bits: keep_rate may be 2^32
    w0 = tl.where(candidate, w0, 0xFFFFFFFF)
    chosen = _smallest(w0, candidate, k)

    offs_m = tl.cumsum(chosen.to(tl.int32), axis=0) - 1
    in_m = chosen & (offs_m < slots)
    index = positions_ptr.dtype.element_ty
    tl.store(positions_ptr + slot + offs_m, (start + offs_l).to(index), mask=in_m)
    tl.store(weights_ptr + slot + offs_m, tl.full((BLOCK,), 1.0, tl.float32), mask=in_m)
    x = tl.load(ids_ptr + start + offs_l, mask=in_l, other=0)  # not earlier: the search needs the registers
    tl.store(targets_ptr + slot + offs_m, x, mask=in_m)
    tl.store(out_ptr + start + offs_l, tl.where(chosen & hide, mask_id, x).to(index), mask=in_l)

    for m0 in range(k, slots, BLOCK):  # the unused slots
        offs_m = m0 + offs_l
        tl.store(positions_ptr + slot + offs_m, tl.zeros((BLOCK,), index), mask=offs_m < slots)
        tl.store(targets_ptr + slot + offs_m, tl.zeros((BLOCK,), index), mask=offs_m < slots)
        tl.store(weights_ptr + slot + offs_m, tl.zeros((BLOCK,), tl.float32), mask=offs_m < slots)


def mask_tokens(
    ids, candidates, rng, key_mask, cu_seqlens, max_seqlen: int, mask_id: int, mask_rate: int, keep_rate: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch one program per sequence on contiguous tensors; return (ids, positions, targets, weights)."""
    T = ids.numel()
    if cu_seqlens is None:
        B, L = ids.shape
        N = max(1, (L * mask_rate + 2**31) >> 32)
        M = B * N
    else:
        B, L, N = cu_seqlens.numel() - 1, 0, 0
        M = ((mask_rate * T) >> 32) + B
    M = M if T > 0 else 0
    if max_seqlen > MAX_BLOCK:  # it may be larger than every sequence
        max_seqlen = min(max_seqlen, T)
    BLOCK = next_power_of_2(max(max_seqlen, 16))
    if BLOCK > MAX_BLOCK:
        raise NotImplementedError(
            f"mask_tokens: a sequence must have at most {MAX_BLOCK} tokens for the Triton kernel, "
            f"got {max_seqlen}; use electra_fast.reference.mask_tokens"
        )
    if cu_seqlens is None:
        out, positions, targets = torch.empty_like(ids), ids.new_empty(M), ids.new_empty(M)
        weights = ids.new_empty(M, dtype=torch.float32)
    else:  # bad bounds leave slots unwritten: prefill them so that the loss is NaN and every index legal
        out, positions, targets = ids.clone(), ids.new_zeros(M), ids.new_zeros(M)
        weights = ids.new_full((M,), float("nan"), dtype=torch.float32)
    if T > 0:
        candidates, key_mask = (None if m is None else m.view(torch.uint8) for m in (candidates, key_mask))
        warps = max(1, min(BLOCK // 128, 8), BLOCK // 256)  # more than 8 tokens per thread would spill
        launch(
            _mask_tokens, (B,), ids, candidates, rng, key_mask, cu_seqlens, out, positions, targets, weights,
            mask_id, mask_rate, keep_rate, T, L, M, N, BLOCK=BLOCK, num_warps=warps,
        )  # fmt: skip
    return out, positions, targets, weights
