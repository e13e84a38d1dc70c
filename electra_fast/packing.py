"""Packed batches: the tokens ``[T]`` of several sequences end to end, with bounds ``cu_seqlens [B + 1]``."""

from typing import NamedTuple

import torch
from torch import Tensor

from electra_fast.errors import must
from electra_fast.ids import require


def sequence_of(
    op: str, cu_seqlens: Tensor, T: int, max_seqlen: int | None = None, suffix: str = ""
) -> Tensor:
    """Return the sequence ``[T]`` to which each packed token belongs. On the CPU the bounds are checked.

    `suffix` ends the names of both arguments in errors.
    """
    if cu_seqlens.device.type == "cpu":
        lengths = cu_seqlens.diff()
        require(
            (cu_seqlens[0] == 0) & (cu_seqlens[-1] == T) & (lengths >= 0).all(),
            lambda: ValueError(
                must(f"{op}: cu_seqlens{suffix}", f"rise from 0 to the {T} tokens", cu_seqlens.tolist())
            ),
            f"{op}: cu_seqlens{suffix} must rise from 0 to the number of tokens",
        )
        if max_seqlen is not None:
            require(
                (lengths.long() <= max_seqlen).all(),  # int32 may not hold max_seqlen
                lambda: ValueError(
                    must(f"{op}: max_seqlen{suffix}", f"be at least {lengths.max().item()}", max_seqlen)
                ),
                f"{op}: max_seqlen{suffix} must be at least the length of the longest sequence",
            )
    t = torch.arange(T, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.bucketize(t, cu_seqlens[1:].contiguous(), right=True)


def token_positions(ids: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """Return the position of each token in its sequence, shape of ids."""
    position = torch.arange(ids.shape[-1], device=ids.device)
    if cu_seqlens is not None:
        position = position - cu_seqlens[sequence_of("embed", cu_seqlens, ids.numel())]
    return position.expand_as(ids)


class Padding(NamedTuple):
    """Indices of a packed batch: ``x[t]`` pads it to ``[B, L]``, ``y[b, l]`` packs it again."""

    t: Tensor  # int64 [B, L], any token where there is none
    mask: Tensor  # bool [B, L], False where there is no token
    b: Tensor  # [T]
    l: Tensor  # [T]


def padding(op: str, cu_seqlens: Tensor, max_seqlen: int, T: int, suffix: str = "") -> Padding:
    b = sequence_of(op, cu_seqlens, T, max_seqlen, suffix)
    longest = min(max_seqlen, T)  # so that a large max_seqlen costs nothing, and an empty batch has no index
    t = cu_seqlens[:-1, None].long() + torch.arange(longest, device=cu_seqlens.device)
    l = torch.arange(T, device=b.device) - cu_seqlens[b]
    return Padding(t.clamp(max=T - 1), t < cu_seqlens[1:, None], b, l)


class AttentionPadding(NamedTuple):
    queries: Padding
    keys: Padding
    ahead: Tensor | None  # [B], number of keys minus number of queries, if attention is causal


def attention_padding(
    T: int,
    K: int,
    cu_seqlens: Tensor,
    max_seqlen: int,
    cu_seqlens_k: Tensor | None,
    max_seqlen_k: int | None,
    causal: bool,
) -> AttentionPadding:
    """Return the padding of T packed queries and of their K keys, for definitions in plain PyTorch.

    Raises:
        ValueError: on the CPU, bounds are bad, or a causal sequence has more queries than keys.
    """
    queries = keys = padding("attention", cu_seqlens, max_seqlen, T)
    ahead = torch.zeros_like(cu_seqlens[1:]) if causal else None
    if cu_seqlens_k is not None:
        keys = padding("attention", cu_seqlens_k, max_seqlen_k, K, suffix="_k")
        ahead = cu_seqlens_k.diff() - cu_seqlens.diff() if causal else None
    if causal and cu_seqlens.device.type == "cpu":
        rule = "be False if a sequence has more queries than keys"
        require(
            (ahead >= 0).all(),
            lambda: ValueError(
                must("attention: causal", rule, f"True; keys minus queries: {ahead.tolist()}")
            ),
            f"attention: causal must {rule}",
        )
    return AttentionPadding(queries, keys, ahead)
