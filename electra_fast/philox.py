"""Counter-based random numbers: every decision is an integer function of (seed, step, stream, index).

`rng` is int64 ``[2]`` = (seed, step) on the tensors' device: a captured CUDA graph draws new numbers when the
step is changed in place. The counter has 32 bits of the step, so step 2^32 draws what step 0 draws.
Philox4x32 (Salmon et al. 2011) with the seed as its key maps the counter (c0, row, step, stream) to four
words, in 10 rounds for masking and sampling and 7 for dropout. This file defines the numbers; the kernels
compute the same words faster.
"""

import math

import torch
from torch import Tensor

MASKING, SAMPLING = 0, 1  # streams; the uses of dropout are numbered from 2


def philox(rng: Tensor, c0: Tensor, row: Tensor, stream: int, rounds: int = 10) -> tuple[Tensor, ...]:
    """Return the four words of Philox4x32 at counter (c0, row, step, stream), uint32 values in int64.

    `rng` is int64 ``[2]`` = (seed, step). The key is the seed's low and high half (Salmon et al. 2011).
    """
    low = 0xFFFFFFFF
    k0, k1 = rng[0] & low, (rng[0] >> 32) & low
    c0, c1, c2, c3 = c0 & low, row & low, rng[1] & low, torch.full_like(rng[1], stream & low)
    for _ in range(rounds):
        # An int64 product wraps around; its bits are those of the uint64 product.
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (b >> 32 & low) ^ c1 ^ k0, b & low, (a >> 32 & low) ^ c3 ^ k1, a & low
        k0, k1 = k0 + 0x9E3779B9 & low, k1 + 0xBB67AE85 & low
    return c0, c1, c2, c3


def uniforms(rng: Tensor, M: int) -> Tensor:
    """Return one float64 uniform in [0, 1) with 53 bits per masked slot, ``[M]``."""
    m = torch.arange(M, device=rng.device)
    w0, w1, _, _ = philox(rng, torch.zeros_like(m), m, SAMPLING)
    return ((w0 >> 5) * 2**26 + (w1 >> 6)).double() * 2.0**-53


def coins(rng: Tensor, N: int, p: float) -> Tensor:
    """Return bool ``[N]``, each True with probability p, from a word that `uniforms` does not use."""
    n = torch.arange(N, device=rng.device)
    return philox(rng, torch.zeros_like(n), n, SAMPLING)[2] < round(p * 2**32)


def keep_mask(rng: Tensor, stream: int, rows: Tensor, columns: int, p: float) -> Tensor:
    """Return dropout's bool mask ``[*rows.shape, columns]``, True where the element is kept.

    Element (row, column) uses 16 bits of call (column // 32) * 4 + (column % 8) // 2: the low half of word
    (column // 8) % 4 for an even column, else the high half. So in the layout of tensor cores each thread
    computes the calls of its own elements.
    """
    calls = torch.arange(-(-columns // 32) * 4, device=rows.device)
    words = torch.stack(philox(rng, calls, rows[..., None], stream, rounds=7), dim=-1)
    bits = torch.stack([words & 0xFFFF, words >> 16], dim=-1)  # [*rows, span, call of 4, word, half]
    bits = bits.unflatten(-3, (-1, 4)).transpose(-3, -2).flatten(-4)  # (span, word, call, half) is the column
    return bits[..., :columns] >= round(p * 65536)


def drop(x: Tensor, p: float, rng: Tensor | None, stream: int, rows: Tensor | None = None) -> Tensor:
    """Return x with dropout p; rows = None numbers the rows of x in order."""
    if p == 0:
        return x
    if rows is None:
        rows = torch.arange(math.prod(x.shape[:-1]), device=x.device).view(x.shape[:-1])
    return x.masked_fill(~keep_mask(rng, stream, rows, x.shape[-1], p), 0) / (1 - p)
