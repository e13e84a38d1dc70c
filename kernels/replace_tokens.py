"""Write the samples over the masked positions and mark what changed.

Two launches, a copy of T tokens and a scatter of M slots: one kernel cannot order another program's copy
before its own scatter, and a program that looked for its slots among all M would read them T / BLOCK_T times.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit(do_not_specialize=["T"])  # it changes with every packed batch, and must not recompile
def _copy(
    ids_ptr,  # [T]
    out_ptr,  # [T] out
    replaced_ptr,  # [T] uint8 out
    T,
    BLOCK: tl.constexpr,
):
    offs_t = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    in_t = offs_t < T
    tl.store(out_ptr + offs_t, tl.load(ids_ptr + offs_t, mask=in_t), mask=in_t)
    tl.store(replaced_ptr + offs_t, tl.zeros((BLOCK,), tl.uint8), mask=in_t)


@triton.jit(do_not_specialize=["T", "M"])
def _replace_tokens(
    ids_ptr,  # [T]
    positions_ptr,  # [M]
    samples_ptr,  # [M]
    weights_ptr,  # [M] f32
    out_ptr,  # [T] in and out
    replaced_ptr,  # [T] uint8, in and out
    T,
    M,
    BLOCK: tl.constexpr,
):
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    in_m = offs_m < M
    place = tl.load(positions_ptr + offs_m, mask=in_m, other=0).to(tl.int64)
    used = in_m & (tl.load(weights_ptr + offs_m, mask=in_m, other=0.0) != 0)
    used = used & (place >= 0) & (place < T)  # a bad position is never dereferenced
    sample = tl.load(samples_ptr + offs_m, mask=used, other=0)
    original = tl.load(ids_ptr + place, mask=used, other=0)

    tl.store(out_ptr + place, sample, mask=used)
    tl.store(replaced_ptr + place, (sample != original).to(tl.uint8), mask=used)


def replace_tokens(ids: Tensor, positions: Tensor, samples: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Launch both kernels on contiguous tensors; return (ids, replaced), both of the shape of ids."""
    T, M = ids.numel(), positions.numel()
    out, replaced = torch.empty_like(ids), torch.empty_like(ids, dtype=torch.bool)
    flags = replaced.view(torch.uint8)
    if T > 0:
        _copy[(triton.cdiv(T, BLOCK),)](ids, out, flags, T, BLOCK=BLOCK, num_warps=4)
    if T > 0 and M > 0:
        grid = (triton.cdiv(M, BLOCK),)
        _replace_tokens[grid](ids, positions, samples, weights, out, flags, T, M, BLOCK=BLOCK, num_warps=4)
    return out, replaced
