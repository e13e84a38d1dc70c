"""Checks of an op's arguments. They read metadata only and no values, so they never synchronise."""

import math

import torch
from torch import Tensor

from electra_fast.errors import must

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTS = (torch.int64, torch.int32)
BOOL = (torch.bool,)
FLOAT32 = (torch.float32,)


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    names = list(dict.fromkeys(str(d).removeprefix("torch.") for d in dtypes))
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


def tensor(
    op: str,
    name: str,
    x: Tensor,
    dtypes: tuple[torch.dtype, ...],
    shape: tuple[int | None, ...] | None = None,
    like: Tensor | None = None,
) -> None:
    """Refuse x unless it is a tensor of one of `dtypes`, of `shape` (None: any size), on `like`'s device."""
    if not isinstance(x, Tensor):
        raise TypeError(must(f"{op}: {name}", "be a tensor", type(x).__name__))
    if x.dtype not in dtypes:
        raise TypeError(must(f"{op}: {name}", f"be {_names(dtypes)}", str(x.dtype).removeprefix("torch.")))
    if shape is not None and (
        x.dim() != len(shape) or any(s is not None and s != n for s, n in zip(shape, x.shape, strict=True))
    ):
        wanted = ", ".join("*" if s is None else str(s) for s in shape)
        raise ValueError(must(f"{op}: {name}", f"have shape [{wanted}]", list(x.shape)))
    if like is not None and x.device != like.device:
        raise ValueError(must(f"{op}: {name}", f"be on {like.device} as the others are", x.device))


def optional(
    op: str,
    name: str,
    x: Tensor | None,
    dtypes: tuple,
    shape: tuple | None = None,
    like: Tensor | None = None,
) -> None:
    if x is not None:
        tensor(op, name, x, dtypes, shape, like)


def rng(op: str, x: Tensor | None, like: Tensor) -> None:
    if x is None:
        rule, remedy = "be given if random numbers are drawn", "pass int64 [2] = (seed, step)"
        raise ValueError(must(f"{op}: rng", rule, None, remedy))
    tensor(op, "rng", x, (torch.int64,), (2,), like)


def contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return the tensors in contiguous memory, as the kernels read them."""
    return tuple(x if x is None else x.contiguous() for x in tensors)


def dropout(op: str, p: float, x: Tensor | None, stream: int, like: Tensor) -> None:
    if not 0 <= p < 1:
        raise ValueError(must(f"{op}: dropout", "be in [0, 1)", p))
    if not 0 <= stream < 2**32:  # it is one 32-bit word of the counter, and must not wrap
        raise ValueError(must(f"{op}: stream", "be in [0, 2^32)", stream))
    if p > 0 or x is not None:  # the dispatcher looks at the device of an unused tensor too
        rng(op, x, like)


def eps(op: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise ValueError(must(f"{op}: eps", "be at least 0 and finite", value))


def packed(
    op: str,
    tokens: Tensor,
    cu_seqlens: Tensor,
    key_mask: Tensor | None,
    max_seqlen: int | None,
    token_axes: int = 1,
    suffix: str = "",
) -> None:
    """Refuse a packed batch unless it is `tokens` [T, …], cu_seqlens [B + 1] and an int max_seqlen.

    `suffix` ends the names of both in errors.
    """
    tensor(op, f"cu_seqlens{suffix}", cu_seqlens, INTS, (None,), tokens)
    if cu_seqlens.numel() < 1:
        raise ValueError(must(f"{op}: cu_seqlens{suffix}", "have B + 1 bounds", "none"))
    if tokens.dim() != token_axes:
        raise ValueError(must(f"{op}: a packed batch", "have one token axis", f"shape {list(tokens.shape)}"))
    if key_mask is not None:
        rule = "be None in a packed batch, which has no padding"
        raise ValueError(must(f"{op}: key_mask", rule, "a tensor"))
    if not isinstance(max_seqlen, (int, torch.SymInt)) or isinstance(max_seqlen, bool):
        rule = "be an int in a packed batch"
        raise TypeError(must(f"{op}: max_seqlen{suffix}", rule, type(max_seqlen).__name__))
