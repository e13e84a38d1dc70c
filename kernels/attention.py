"""Bidirectional attention over short sequences, padded or packed (Vaswani et al. 2017, eq. 1).

    S = scale Q K^T      P = softmax(S) over the keys that a query sees      O = drop(P) V

Nothing of the size of S leaves a program. If all keys fit into one tile, a program computes one maximum and
one sum; for longer sequences, a running maximum and sum over blocks of keys (Milakov and Gimelshein 2018). P
and dS are multiplied in the tensors' dtype, all sums are float32. Backward computes P again from the
log-sum-exp that forward saved, and dropout's mask from its counters:

    dV = drop(P)^T dO      dS = P (drop(dO V^T) - rowsum(dO O))      dQ = scale dS K      dK = scale dS^T Q

In one tile the three gradients need five products. Longer sequences need seven: one kernel loops over keys
for dQ, another over queries for dK and dV. With five, dQ would be summed in memory, in float32. No sum
depends on the order in which programs end.
"""

import torch
from torch import Tensor

from electra_fast.kernels._attention_bwd import attention_bwd_dkdv, attention_bwd_dq, attention_bwd_tile
from electra_fast.kernels._attention_fwd import attention_fwd_loop, attention_fwd_tile
from electra_fast.kernels._attention_tile import strides
from electra_fast.kernels._common import (
    architecture,
    cdiv,
    dropout_arguments,
    next_power_of_2,
    refuse_float64,
)
from electra_fast.kernels._launch import launch

# (BLOCK_M, BLOCK_N, warps, stages), chosen by registers on sm_80, 86, 90, 100 and 120 (benchmarks/static):
# only the last of DQ and of DKDV spill, at most 64 bytes. None is timed yet; benchmarks.harness.tune does it.

# All keys of a sequence in one tile, by the maximal length; for 16-bit dtypes and up to 64 columns.
TILE_FWD = {64: (64, 64, 4, 1), 128: (64, 128, 4, 1)}
FEW_TILE = {64: (16, 64, 4, 1), 128: (16, 128, 4, 1)}  # for at most 16 queries of more keys
TILE_BWD = {64: (64, 64, 4, 1), 128: (128, 128, 8, 1)}
# Blocks of keys: 16-bit dtypes up to 64 and up to 128 columns, then float32 up to 64 and up to 128.
FWD = [(128, 64, 8, 2), (64, 64, 8, 2), (32, 32, 8, 2), (16, 32, 8, 1)]
FEW = [(16, 64, 4, 2), (16, 64, 4, 2), (16, 32, 4, 2), (16, 32, 8, 1)]
DQ = [(64, 64, 4, 2), (64, 32, 8, 2), (32, 32, 8, 1), (16, 32, 8, 1)]
DKDV = [(64, 64, 4, 2), (32, 64, 8, 2), (16, 32, 8, 1), (16, 32, 8, 1)]
# sm_80, 86 and 120 hold a product's operands in registers, which TILE_BWD[128] and DKDV[0] would exceed.
SMALL_DKDV = {0: (64, 32, 4, 2)}


class _Call:
    """The kernel arguments that all launches of one call share, and the launch itself."""

    def __init__(
        self, q, k, v, key_mask, cu_seqlens, max_seqlen, causal, scale, dropout, rng, stream,
        cu_seqlens_k=None, max_seqlen_k=None,
    ):  # fmt: skip
        H, D = q.shape[-2:]
        refuse_float64("attention", "q, k and v", q)
        if D > 128:
            raise NotImplementedError(
                f"attention: head_dim must be at most 128 for the Triton kernel, got {D}; "
                "use electra_fast.reference.attention"
            )
        T, S, packed = q.shape[:-2].numel(), k.shape[:-2].numel(), cu_seqlens is not None
        self.L = max(min(max_seqlen, T), 1)
        self.K = self.L if max_seqlen_k is None else max(min(max_seqlen_k, S), 1)
        self.heads = H * (len(cu_seqlens) - 1 if packed else len(q))
        # If any axis is empty, no kernel may run. Packed sequences may all have no key.
        self.empty = self.heads == 0 or q.numel() == 0 or (k.numel() == 0 and not packed)
        BLOCK_D = next_power_of_2(max(D, 16))
        # Other rows are loaded in small pieces, whose addresses need as many registers as more columns.
        wide = BLOCK_D > 64 or D % 16 > 0
        self.column = 2 * (q.dtype == torch.float32) + wide
        (q,), (k, v) = of_equal_strides(q), of_equal_strides(k, v)
        own = cu_seqlens_k is not None or q.shape != k.shape or q.stride() != k.stride()
        if own and packed and cu_seqlens_k is None:
            cu_seqlens_k = cu_seqlens
        rng, *drop = dropout_arguments(dropout, rng, stream)
        self.qkv, self.strides = (q, k, v), (strides(q), strides(k) if own else None)
        self.masks = (None if key_mask is None else key_mask.view(torch.uint8), cu_seqlens, cu_seqlens_k, rng)
        self.numbers = (self.L, T, self.K, S, H, scale, *drop)
        self.constants = {"CAUSAL": causal, "D": D, "BLOCK_D": BLOCK_D}

    def tile(self, shapes: dict, longest: int) -> tuple[int, ...] | None:
        """Return the launch shape whose tile has `longest` positions or more, None if there is none."""
        fitting = [shape for most, shape in shapes.items() if longest <= most]
        return fitting[0] if fitting and self.column == 0 else None

    def launch(self, kernel, shape: tuple[int, ...], *tensors, strides, block: str = "BLOCK_M") -> None:
        """Run one program per sequence, head and block of queries (or of keys, with `block` = "BLOCK_N").

        `tensors` are the kernel's arguments before the masks, and `strides` those after them.
        """
        named = dict(zip(("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"), shape, strict=True))
        grid = (self.heads * cdiv(self.L if block == "BLOCK_M" else self.K, named[block]),)
        launch(kernel, grid, *tensors, *self.masks, *strides, *self.numbers, **self.constants, **named)


def of_equal_strides(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors, copied if their strides differ or do not suit the kernels."""
    far = tensors[0].stride(-3) >= 2**24  # 128 rows would exceed 32-bit offsets
    if far or tensors[0].stride(-1) != 1 or len({x.stride() for x in tensors}) > 1:
        return tuple(x.contiguous() for x in tensors)
    return tensors


def contiguous_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def attention_fwd(q: Tensor, k: Tensor, v: Tensor, *options) -> tuple[Tensor, Tensor]:
    """Launch the forward kernel, with `options` as in `_Call`; return (o like q, lse [.., H] float32)."""
    call = _Call(q, k, v, *options)
    o, lse = contiguous_like(q), q.new_empty(*q.shape[:-1], dtype=torch.float32)
    if call.empty:
        return o.zero_(), lse.fill_(torch.inf)
    tiles, loops = (FEW_TILE, FEW) if call.L <= 16 < call.K else (TILE_FWD, FWD)
    tile = call.tile(tiles, call.K)
    kernel = attention_fwd_tile if tile else attention_fwd_loop
    call.launch(kernel, tile or loops[call.column], *call.qkv, o, lse, strides=call.strides)
    return o, lse


def attention_gradients(
    gradients, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, *options
) -> None:
    """Launch the backward kernels, which write `gradients`: dq, dk and dv, tensors of equal strides."""
    call = _Call(q, k, v, *options)
    dq, dk, dv = gradients
    if call.empty:
        for x in gradients:
            x.zero_()
        return
    read, both = (do.contiguous(), *call.qkv), {"strides": (*call.strides, strides(dq))}
    large, longest = architecture() in (90, 100), max(call.L, call.K)
    tile = call.tile(TILE_BWD, longest) if large or longest <= 64 else None
    if tile:
        call.launch(attention_bwd_tile, tile, *read, o, dq, dk, dv, lse, **both)
    else:
        delta = torch.empty_like(lse)
        call.launch(attention_bwd_dq, DQ[call.column], *read, o, dq, lse, delta, **both)
        shape = DKDV[call.column] if large else SMALL_DKDV.get(call.column, DKDV[call.column])
        call.launch(attention_bwd_dkdv, shape, *read, dk, dv, lse, delta, **both, block="BLOCK_N")


def attention_bwd(do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, *options):
    """Return the gradients of q, k and v."""
    gradients = tuple(contiguous_like(x) for x in (q, k, v))
    attention_gradients(gradients, do, q, k, v, o, lse, *options)
    return gradients
