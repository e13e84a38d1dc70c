"""`attention` of the three slices of one tensor, with one gradient tensor.

The gradient of `qkv.unbind` is a stack that moves 6*T*W elements a layer, even where dq, dk and dv lie side
by side.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from electra_fast import reference
from electra_fast.ops import _check as check
from electra_fast.ops._register import Kernels, operator, public
from electra_fast.ops.attention import SITE, check_site, default_bwd, default_fwd, fake_fwd

_fwd = operator(
    f"attention_qkv_fwd(Tensor qkv, {SITE}) -> (Tensor, Tensor)",
    default=lambda qkv, *site: default_fwd(*qkv.unbind(-3), *site),
    triton="attention_qkv:attention_qkv_fwd",
    fake=lambda qkv, *_: fake_fwd(qkv.select(-3, 0)),
)
_bwd = operator(
    f"attention_qkv_bwd(Tensor do, Tensor qkv, Tensor o, Tensor lse, {SITE}) -> Tensor",
    default=lambda do, qkv, *rest: torch.stack(default_bwd(do, *qkv.unbind(-3), *rest), dim=-3),
    triton="attention_qkv:attention_qkv_bwd",
    fake=lambda do, qkv, *_: qkv.new_empty(qkv.shape),
)


class _AttentionQKV(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kernels, qkv, key_mask, cu_seqlens, max_seqlen, causal, scale, dropout, rng, stream):
        o, lse = kernels.fwd(qkv, key_mask, cu_seqlens, max_seqlen, causal, scale, dropout, rng, stream)
        ctx.save_for_backward(qkv, o, lse, key_mask, cu_seqlens, rng)
        ctx.kernels, ctx.site = kernels, (max_seqlen, causal, scale, dropout, stream)
        ctx.set_materialize_grads(False)
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx, do):
        if do is None:
            return (None,) * len(ctx.needs_input_grad)
        *saved, rng = ctx.saved_tensors
        max_seqlen, causal, scale, dropout, stream = ctx.site
        dqkv = ctx.kernels.bwd(do, *saved, max_seqlen, causal, scale, dropout, rng, stream)
        return None, dqkv, None, None, None, None, None, None, None, None


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
        TypeError, ValueError: an argument breaks these rules, with its name.
    """
    check.tensor("attention_qkv", "qkv", qkv, check.FLOATS)
    if qkv.dim() < 4 or qkv.shape[-3] != 3:
        raise ValueError(f"attention_qkv: qkv must have shape [*, 3, H, D], got {list(qkv.shape)}")
    max_seqlen = check_site("attention_qkv", qkv, 3, key_mask, cu_seqlens, max_seqlen, dropout, rng)
    (qkv,) = reference.autocast(qkv)
    key_mask, cu_seqlens, rng = check.contiguous(key_mask, cu_seqlens, rng)
    scale = reference.default_scale(qkv) if scale is None else scale
    return _AttentionQKV.apply(
        kernels, qkv, key_mask, cu_seqlens, max_seqlen, causal, scale, dropout, rng, stream
    )
