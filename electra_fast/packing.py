"""Packed batches: the tokens ``[T]`` of several sequences end to end, with bounds ``cu_seqlens [B + 1]``."""

import torch
from torch import Tensor

from electra_fast.errors import must
from electra_fast.ids import require


def sequence_of(op: str, cu_seqlens: Tensor, T: int, max_seqlen: int | None = None) -> Tensor:
    """Return the sequence ``[T]`` to which each packed token belongs. On the CPU the bounds are checked."""
    if cu_seqlens.device.type == "cpu":
        lengths = cu_seqlens.diff()
        require(
            (cu_seqlens[0] == 0) & (cu_seqlens[-1] == T) & (lengths >= 0).all(),
            lambda: ValueError(
                must(f"{op}: cu_seqlens", f"rise from 0 to the {T} tokens", cu_seqlens.tolist())
            ),
            f"{op}: cu_seqlens must rise from 0 to the number of tokens",
        )
        if max_seqlen is not None:
            require(
                (lengths.long() <= max_seqlen).all(),  # int32 may not hold max_seqlen
                lambda: ValueError(
                    must(f"{op}: max_seqlen", f"be at least {lengths.max().item()}", max_seqlen)
                ),
                f"{op}: max_seqlen must be at least the length of the longest sequence",
            )
    t = torch.arange(T, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.bucketize(t, cu_seqlens[1:].contiguous(), right=True)


def token_positions(ids: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """Return the position of each token in its sequence, shape of ids."""
    position = torch.arange(ids.shape[-1], device=ids.device)
    if cu_seqlens is not None:
        position = position - cu_seqlens[sequence_of("embed", cu_seqlens, ids.numel())]
    return position.expand_as(ids)


def padding(op: str, cu_seqlens: Tensor, max_seqlen: int, T: int) -> tuple[Tensor, ...]:
    """Return (t, key_mask, b, l): ``x[t]`` pads a packed batch to ``[B, L]``, ``y[b, l]`` packs it again."""
    b = sequence_of(op, cu_seqlens, T, max_seqlen)
    longest = min(max_seqlen, T)  # so that a large max_seqlen costs nothing, and an empty batch has no index
    t = cu_seqlens[:-1, None].long() + torch.arange(longest, device=cu_seqlens.device)
    l = torch.arange(T, device=b.device) - cu_seqlens[b]
    return t.clamp(max=T - 1), t < cu_seqlens[1:, None], b, l
