"""`attention` of the three slices of one tensor, with one gradient tensor.

The gradient of `qkv.unbind` would be a stack, which moves 6*T*W elements per layer even if dq, dk and dv are
slices of one tensor already.
"""

import torch
from torch import Tensor

from electra_fast.dtypes import autocast
from electra_fast.errors import must
from electra_fast.ops import _check as check
from electra_fast.ops._operators import operator
from electra_fast.ops._public import Kernels, public
from electra_fast.ops.attention import (
    OPTIONS,
    attention_function,
    check_options,
    default_bwd,
    default_fwd,
    fake_fwd,
)
from electra_fast.reference import default_scale

_fwd = operator(
    f"attention_qkv_fwd(Tensor qkv, {OPTIONS}) -> (Tensor, Tensor)",
    default=lambda qkv, *options: default_fwd(*qkv.unbind(-3), *options),
    triton="attention_qkv:attention_qkv_fwd",
    fake=lambda qkv, *_: fake_fwd(qkv.select(-3, 0)),
)
_bwd = operator(
    f"attention_qkv_bwd(Tensor do, Tensor qkv, Tensor o, Tensor lse, {OPTIONS}) -> Tensor",
    default=lambda do, qkv, *rest: torch.stack(default_bwd(do, *qkv.unbind(-3), *rest), dim=-3),
    triton="attention_qkv:attention_qkv_bwd",
    fake=lambda do, qkv, *_: qkv.new_empty(qkv.shape),
)


_AttentionQKV = attention_function("attention_qkv", inputs=1)


@public(_fwd, _bwd)
def attention_qkv(
    kernels: Kernels,
    qkv: Tensor,
    *,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    causal: bool = False,
    scale: float | None = None,
    dropout: float = 0.0,
    rng: Tensor | None = None,
    stream: int = 0,
) -> Tensor:
    """Return `attention` of ``qkv[..., 0, :, :]``, ``qkv[..., 1, :, :]`` and ``qkv[..., 2, :, :]``.

    Args:
        qkv: ``[B, L, 3, H, D]`` padded or ``[T, 3, H, D]`` packed, any float dtype; cast to the autocast
            dtype if enabled.
        key_mask, cu_seqlens, max_seqlen, causal, scale, dropout, rng, stream: as for `attention`.

    Returns:
        ``[B, L, H, D]`` or ``[T, H, D]``, dtype of qkv.

    Raises:
        TypeError, ValueError: an argument breaks these rules; the message names it.
    """
    check.tensor("attention_qkv", "qkv", qkv, check.FLOATS)
    if qkv.dim() < 4 or qkv.shape[-3] != 3:
        raise ValueError(must("attention_qkv: qkv", "have shape [*, 3, H, D]", list(qkv.shape)))
    options = (key_mask, cu_seqlens, max_seqlen, scale, dropout, rng, stream)
    max_seqlen = check_options("attention_qkv", qkv, 3, *options)
    (qkv,) = autocast(qkv)
    key_mask, cu_seqlens, rng = check.contiguous(key_mask, cu_seqlens, rng)
    scale = default_scale(qkv) if scale is None else scale
    return _AttentionQKV.apply(
        kernels, qkv, key_mask, cu_seqlens, max_seqlen, causal, scale, dropout, rng, stream
    )
