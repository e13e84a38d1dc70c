"""Checks of arguments, on metadata alone: nothing here looks at a value, so nothing synchronises.

One message style: "<op>: <argument> must <rule>, got <value>", and the remedy where there is one.
"""

import torch
from torch import Tensor

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
        raise TypeError(f"{op}: {name} must be a tensor, got {type(x).__name__}")
    if x.dtype not in dtypes:
        raise TypeError(f"{op}: {name} must be {_names(dtypes)}, got {str(x.dtype).removeprefix('torch.')}")
    if shape is not None and (
        x.dim() != len(shape) or any(s is not None and s != n for s, n in zip(shape, x.shape, strict=True))
    ):
        wanted = ", ".join("*" if s is None else str(s) for s in shape)
        raise ValueError(f"{op}: {name} must have shape [{wanted}], got {list(x.shape)}")
    if like is not None and x.device != like.device:
        raise ValueError(f"{op}: {name} must be on {like.device} as the others are, got {x.device}")


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
        raise ValueError(
            f"{op}: rng must be given where numbers are drawn, got None; it is int64 [2] = (seed, step)"
        )
    tensor(op, "rng", x, (torch.int64,), (2,), like)


def contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return the tensors as kernels read them: row by row, whatever their strides were."""
    return tuple(x if x is None else x.contiguous() for x in tensors)


def dropout(op: str, p: float, x: Tensor | None, like: Tensor) -> None:
    if not 0 <= p < 1:
        raise ValueError(f"{op}: dropout must be in [0, 1), got {p}")
    if p > 0:
        rng(op, x, like)


def packed(
    op: str,
    tokens: Tensor,
    cu_seqlens: Tensor,
    key_mask: Tensor | None,
    max_seqlen: int | None,
    token_axes: int = 1,
) -> None:
    """Refuse a packed batch that is not `tokens` [T, …], cu_seqlens [B + 1] and an int max_seqlen."""
    tensor(op, "cu_seqlens", cu_seqlens, INTS, (None,), tokens)
    if cu_seqlens.numel() < 1:
        raise ValueError(f"{op}: cu_seqlens must hold B + 1 bounds, got none")
    if tokens.dim() != token_axes:
        raise ValueError(f"{op}: a packed batch must have one token axis, got shape {list(tokens.shape)}")
    if key_mask is not None:
        raise ValueError(f"{op}: key_mask must be None in a packed batch, which has no padding, got a tensor")
    if not isinstance(max_seqlen, int) or isinstance(max_seqlen, bool):
        raise TypeError(f"{op}: max_seqlen must be an int in a packed batch, got {type(max_seqlen).__name__}")
