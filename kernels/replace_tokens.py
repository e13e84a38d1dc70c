"""Write the samples to the masked positions and mark the tokens that changed.

Two launches: a copy of T tokens, then a scatter of M slots. In one launch a scatter could come before another
program's copy, and programs that look for their own slots would read all M of them T / BLOCK times.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from electra_fast.kernels._common import cdiv
from electra_fast.kernels._launch import launch

BLOCK = 1024


@triton.jit(do_not_specialize=["T"])  # T changes with every packed batch and must not recompile
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
    position = tl.load(positions_ptr + offs_m, mask=in_m, other=0).to(tl.int64)
    used = in_m & (tl.load(weights_ptr + offs_m, mask=in_m, other=0.0) != 0)
    used = used & (position >= 0) & (position < T)  # a bad position is never dereferenced
    sample = tl.load(samples_ptr + offs_m, mask=used, other=0)
    original = tl.load(ids_ptr + position, mask=used, other=0)

    tl.store(out_ptr + position, sample, mask=used)
    tl.store(replaced_ptr + position, (sample != original).to(tl.uint8), mask=used)


def replace_tokens(ids: Tensor, positions: Tensor, samples: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Launch both kernels on contiguous tensors; return (ids, replaced), both of the shape of ids."""
    T, M = ids.numel(), positions.numel()
    out, replaced = torch.empty_like(ids), torch.empty_like(ids, dtype=torch.bool)
    flags = replaced.view(torch.uint8)
    if T > 0:
        launch(_copy, (cdiv(T, BLOCK),), ids, out, flags, T, BLOCK=BLOCK, num_warps=4)
    if T > 0 and M > 0:
        grid = (cdiv(M, BLOCK),)
        launch(
            _replace_tokens, grid, ids, positions, samples, weights, out, flags, T, M, BLOCK=BLOCK,
            num_warps=4,
        )  # fmt: skip
    return out, replaced
