"""The same values in other memory layouts. A kernel that ignores strides or offsets reads NaN then."""

import math

import torch
from torch import Tensor


def with_layout_of(x: Tensor, like: Tensor) -> Tensor:
    """Return the values of x in new memory with the strides and the offset of `like`.

    x must be constant along an axis of stride 0. The memory between the elements, and after them up to the
    size of a contiguous tensor, is NaN, or 1 in an integer tensor, which is a legal id.
    """
    last = sum((n - 1) * stride for n, stride in zip(x.shape, like.stride(), strict=True))
    size = like.storage_offset() + max(last + 1, x.numel(), 1)
    memory = torch.full((size,), math.nan if x.is_floating_point() else 1, dtype=x.dtype, device=x.device)
    result = memory.as_strided(x.shape, like.stride(), like.storage_offset())
    # An axis of stride 0 is one element in memory, which PyTorch allows to be written only once.
    once = tuple(slice(1) if stride == 0 else slice(None) for stride in like.stride())
    result[once].copy_(x[once])
    return result


def copied(x: Tensor, dtype: torch.dtype | None = None, device: str | None = None) -> Tensor:
    """Return a copy of x with its strides and offset, optionally in another dtype or on another device."""
    if x.is_contiguous() and x.storage_offset() == 0:
        return x.detach().to(device=device, dtype=dtype, copy=True)
    return with_layout_of(x.detach().to(device=device, dtype=dtype), x)


def strided(x: Tensor) -> Tensor:
    """Return x in every second element of memory."""
    return with_layout_of(x, x.new_empty((*x.shape, 2))[..., 0])


def expanded(x: Tensor) -> Tensor:
    """Return the last entry of the first axis, repeated along this axis with stride 0."""
    last = x[-1:].expand_as(x) if x.dim() else x
    return with_layout_of(last, last)


def offset(x: Tensor) -> Tensor:
    """Return x contiguous from the second element of memory on, so that no vector load is aligned."""
    return with_layout_of(x, x.new_empty(x.numel() + 1)[1:].view_as(x))


def transposed(x: Tensor) -> Tensor:
    """Return x with the first and the last axis exchanged in memory."""
    return with_layout_of(x, x.new_empty(x.shape).transpose(0, -1).contiguous().transpose(0, -1))


LAYOUTS = {"strided": strided, "expanded": expanded, "offset": offset, "transposed": transposed}
