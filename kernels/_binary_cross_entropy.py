"""The weighted mean of a binary cross-entropy and its confusion counts, for rtd_loss and nce_loss.

With s = -1 for a token whose label is true, s = 1 for any other, and z = s x for its logit x:

    loss_t = softplus(z_t)        d loss_t / d x_t = s_t sigmoid(z_t)

In this form no difference cancels, and an infinite logit of the right sign costs 0. One pass reads every
token once and writes five sums per block of BLOCK_T tokens; that of the loss is float64, in which even
logits of 3e38 have a finite sum. A second launch of one program adds these in float64 and in a fixed order,
so loss and counts do not depend on the order in which programs end.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import JITFunction

from electra_fast.kernels._common import cdiv
from electra_fast.kernels._launch import launch

BLOCK_T = 1024
BLOCK_P = 512  # partial sums that the second launch adds at a time


@triton.jit
def load_labels(y_ptr, w_ptr, T, BLOCK_T: tl.constexpr):
    """Return (label, w, offsets, mask) of this program's tokens, each ``[BLOCK_T]``."""
    offs_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    in_t = offs_t < T
    y = tl.load(y_ptr + offs_t, mask=in_t, other=0) != 0
    w = in_t.to(tl.float32) if w_ptr is None else tl.load(w_ptr + offs_t, mask=in_t, other=0.0)
    return y, w, offs_t, in_t


@triton.jit
def counted(x, w):
    """Return the logits x, and 0 for tokens of weight 0: they may contain anything, and 0 * NaN is NaN."""
    return tl.where(w == 0, 0.0, x)


@triton.jit
def store_sums(partial_ptr, x, y, w):
    """Store five sums of this program's tokens: of w * loss, and of w in the cells tp, fp, fn, tn."""
    z = tl.where(y, -x, x)
    e = tl.exp(-tl.abs(z))
    u = 1.0 + e
    # Kahan's log1p is accurate to the last bits for small e, where log(1 + e) loses all of them.
    log1p = tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))
    loss = tl.maximum(z, 0.0) + log1p
    loss = tl.where(z != z, z, loss)  # the GPU's maximum drops NaN

    out = partial_ptr + tl.program_id(0)
    blocks = tl.num_programs(0)
    guess = x > 0
    tl.store(out, tl.sum(w.to(tl.float64) * loss, axis=0))
    tl.store(out + blocks, tl.sum(tl.where(guess & y, w, 0.0), axis=0))
    tl.store(out + 2 * blocks, tl.sum(tl.where(guess & (y == 0), w, 0.0), axis=0))
    tl.store(out + 3 * blocks, tl.sum(tl.where((guess == 0) & y, w, 0.0), axis=0))
    tl.store(out + 4 * blocks, tl.sum(tl.where((guess == 0) & (y == 0), w, 0.0), axis=0))


@triton.jit(do_not_specialize=["blocks"])
def _binary_cross_entropy_total(
    partial_ptr,  # [5, blocks] f64
    loss_ptr,  # [] f32 out
    counts_ptr,  # [4] f32 out
    blocks,
    BLOCK_P: tl.constexpr,
):
    row = tl.arange(0, 8)[:, None]  # 5 rows, padded to a power of two
    acc = tl.zeros((8, BLOCK_P), tl.float64)
    for p0 in range(0, blocks, BLOCK_P):
        offs_p = p0 + tl.arange(0, BLOCK_P)[None, :]
        acc += tl.load(partial_ptr + row * blocks + offs_p, mask=(row < 5) & (offs_p < blocks), other=0.0)
    sums = tl.sum(acc, axis=1)

    index = tl.arange(0, 8)
    total = tl.sum(tl.where(index == 0, 0.0, sums), axis=0)
    loss = tl.sum(tl.where(index == 0, sums, 0.0), axis=0)
    tl.store(loss_ptr, (loss / tl.where(total == 0, 1.0, total)).to(tl.float32))
    tl.store(counts_ptr + index - 1, sums.to(tl.float32), mask=(index > 0) & (index < 5))


@triton.jit
def gradient(dloss_ptr, counts_ptr, x, y, w):
    """Return the gradient of the logits x; the sum of the four counts is that of the weights."""
    total = tl.sum(tl.load(counts_ptr + tl.arange(0, 4)), axis=0)
    share = w / tl.where(total == 0, 1.0, total)  # the reciprocal of a sum below 3e-39 would be infinite

    s = tl.where(y, -1.0, 1.0)
    e = tl.exp(-tl.abs(x))
    sigmoid = tl.where(s * x > 0, 1.0, e) / (1.0 + e)
    return tl.load(dloss_ptr) * share * s * sigmoid


def mean_and_counts(kernel: JITFunction, x: Tensor, *inputs: Tensor | float | None) -> tuple[Tensor, Tensor]:
    """Launch a kernel that ends in `store_sums`, and add its sums.

    Args:
        kernel: has the parameters x, inputs, partial ``[5, blocks]``, T and BLOCK_T.
        x: ``[T]``.

    Returns:
        loss [] and counts [4], both float32.
    """
    T = x.numel()
    if T == 0:
        return x.new_zeros((), dtype=torch.float32), x.new_zeros(4, dtype=torch.float32)
    blocks = cdiv(T, BLOCK_T)
    partial = x.new_empty(5, blocks, dtype=torch.float64)
    loss, counts = x.new_empty((), dtype=torch.float32), x.new_empty(4, dtype=torch.float32)
    launch(kernel, (blocks,), x, *inputs, partial, T, BLOCK_T=BLOCK_T, num_warps=4)
    launch(_binary_cross_entropy_total, (1,), partial, loss, counts, blocks, BLOCK_P=BLOCK_P, num_warps=4)
    return loss, counts
