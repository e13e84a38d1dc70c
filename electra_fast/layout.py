"""What the ops' definitions have in common: dtypes, packed and padded tokens, ids that may be bad."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """Return x in the dtype of the arithmetic."""
    return x if x.dtype == torch.float64 else x.float()


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors in the autocast dtype where autocast is enabled on their device."""
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):  # which meta tensors have no state of
        return tensors
    return tuple(x.to(torch.get_autocast_dtype(device)) for x in tensors)


def _require(legal: Tensor, error: Callable[[], Exception], rule: str) -> None:
    """Raise `error()` unless `legal`; in a compiled graph, which has no branch, the graph asserts `rule`."""
    if torch.compiler.is_compiling():
        torch._assert_async(legal, rule)
    elif not legal:
        raise error()


def sequence_of(op: str, cu_seqlens: Tensor, T: int, max_seqlen: int | None = None) -> Tensor:
    """Return the sequence ``[T]`` that each packed token belongs to. On the CPU the bounds are checked."""
    if cu_seqlens.device.type == "cpu":
        n = cu_seqlens.diff()
        _require(
            (cu_seqlens[0] == 0) & (cu_seqlens[-1] == T) & (n >= 0).all(),
            lambda: ValueError(
                f"{op}: cu_seqlens must rise from 0 to the {T} tokens, got {cu_seqlens.tolist()}"
            ),
            f"{op}: cu_seqlens must rise from 0 to the number of tokens",
        )
        if max_seqlen is not None:
            _require(
                (n.long() <= max_seqlen).all(),  # which int32 may not hold
                lambda: ValueError(f"{op}: max_seqlen must be at least {n.max().item()}, got {max_seqlen}"),
                f"{op}: max_seqlen must be at least the length of the longest sequence",
            )
    t = torch.arange(T, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.bucketize(t, cu_seqlens[1:].contiguous(), right=True)


def places(ids: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """Return each token's place in its sequence, shape of ids."""
    place = torch.arange(ids.shape[-1], device=ids.device)
    if cu_seqlens is not None:
        place = place - cu_seqlens[sequence_of("embed", cu_seqlens, ids.numel())]
    return place.expand_as(ids)


def padding(op: str, cu_seqlens: Tensor, max_seqlen: int, T: int) -> tuple[Tensor, ...]:
    """Return what pads a packed batch, ``x[t]``, and takes it apart, ``y[b, l]``: (t, key_mask, b, l)."""
    b = sequence_of(op, cu_seqlens, T, max_seqlen)
    longest = min(max_seqlen, T)  # a bound of any size costs nothing, and without tokens no index is left
    t = cu_seqlens[:-1, None].long() + torch.arange(longest, device=cu_seqlens.device)
    l = torch.arange(T, device=b.device) - cu_seqlens[b]
    return t.clamp(max=T - 1), t < cu_seqlens[1:, None], b, l


def legal_ids(op: str, name: str, ids: Tensor, size: int) -> tuple[Tensor, Tensor | None]:
    """Return (ids with the bad ones at 0, which are bad). On the CPU a bad id raises at once: (ids, None)."""
    bad = (ids < 0) | (ids >= size)
    if ids.device.type != "cpu":
        return ids.masked_fill(bad, 0), bad
    _require(
        ~bad.any(),
        lambda: IndexError(
            f"{op}: {name} must be in [0, {size}), got {ids[bad][0].item()} at {bad.nonzero()[0].tolist()}; "
            "electra_fast.check_batch finds such ids before training"
        ),
        f"{op}: {name} must be rows of its table",
    )
    return ids, None


def rows_of(op: str, name: str, table: Tensor, ids: Tensor) -> Tensor:
    ids, bad = legal_ids(op, name, ids, table.shape[0])
    rows = wide(F.embedding(ids, table))
    return rows if bad is None else rows.masked_fill(bad[..., None], math.nan)


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean over all elements, summed in float64; 0/0 = 0."""
    total = weights.sum(dtype=torch.float64)
    mean = (weights.double() * values).sum() / total.masked_fill(total == 0, 1)
    return mean.to(values.dtype)
