"""The same values in other memory layouts. A kernel that ignores strides or offsets then reads NaN."""

import math

import torch
from torch import Tensor


def with_layout_of(x: Tensor, like: Tensor) -> Tensor:
    """Return the values of x, of any dtype, in fresh memory with the strides and the offset of `like`.

    x must be equal along an axis of stride 0. Memory between the elements, and behind them as far as a
    contiguous tensor would reach, holds NaN, or 1 in an integer tensor, which is a legal id.
    """
    last = sum((n - 1) * stride for n, stride in zip(x.shape, like.stride(), strict=True))
    size = like.storage_offset() + max(last + 1, x.numel(), 1)
    memory = torch.full((size,), math.nan if x.is_floating_point() else 1, dtype=x.dtype, device=x.device)
    result = memory.as_strided(x.shape, like.stride(), like.storage_offset())
    # An axis of stride 0 is one place in memory, which PyTorch lets be written only once.
    once = tuple(slice(1) if stride == 0 else slice(None) for stride in like.stride())
    result[once].copy_(x[once])
    return result


def copied(x: Tensor, dtype: torch.dtype | None = None, device: str | None = None) -> Tensor:
    """Return a copy of x, in another dtype or on another device if given, with its strides and offset."""
    if x.is_contiguous() and x.storage_offset() == 0:
        return x.detach().to(device=device, dtype=dtype, copy=True)
    return with_layout_of(x.detach().to(device=device, dtype=dtype), x)


def strided(x: Tensor) -> Tensor:
    """Every second element of memory."""
    return with_layout_of(x, x.new_empty((*x.shape, 2))[..., 0])


def expanded(x: Tensor) -> Tensor:
    """The last entry of the first axis, everywhere on this axis with stride 0."""
    last = x[-1:].expand_as(x)
    return with_layout_of(last, last)


def offset(x: Tensor) -> Tensor:
    """Contiguous from the second element of memory on: no vector load is aligned."""
    return with_layout_of(x, x.new_empty(x.numel() + 1)[1:].view_as(x))


def transposed(x: Tensor) -> Tensor:
    """The first and the last axis in each other's place in memory."""
    return with_layout_of(x, x.new_empty(x.shape).transpose(0, -1).contiguous().transpose(0, -1))


LAYOUTS = {"strided": strided, "expanded": expanded, "offset": offset, "transposed": transposed}
