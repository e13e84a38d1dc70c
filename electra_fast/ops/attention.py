"""Bidirectional attention over padded or packed sequences."""

import math

import torch
from torch import Tensor

from electra_fast import reference
from electra_fast.ops import _check as check
from electra_fast.ops._register import Kernels, operator, public
from electra_fast.ops._transforms import distinct, once_differentiable
from electra_fast.philox import drop
from electra_fast.reference import attention_rows, attention_scores, default_scale, wide

# What follows q, k, v in every operator of this family.
SITE = (
    "Tensor? key_mask, Tensor? cu_seqlens, SymInt max_seqlen, bool causal, float scale, float dropout, "
    "Tensor? rng, SymInt stream"
)


def _unpack(cu_seqlens, max_seqlen, key_mask, *tensors):
    """Return (tensors padded to [B, L, …], key_mask, t, what takes a result apart again)."""
    if cu_seqlens is None:
        return tensors, key_mask, None, lambda y: y
    t, key_mask, b, l = reference.padding("attention", cu_seqlens, max_seqlen, len(tensors[0]))
    return [x[t] for x in tensors], key_mask, t, lambda y: y[b, l]


def default_fwd(q, k, v, key_mask, cu_seqlens, max_seqlen, causal, scale, dropout, rng, stream):
    (q, k, v), key_mask, t, pack = _unpack(cu_seqlens, max_seqlen, key_mask, q, k, v)
    s, visible = attention_scores(q, k, key_mask, causal, scale)
    p = drop(s.softmax(-1).masked_fill_(~visible, 0), dropout, rng, stream, attention_rows(q, t))
    o = torch.einsum("bhlm,bmhd->blhd", p, wide(v)).to(q.dtype)
    return pack(o).contiguous(), pack(s.logsumexp(-1).transpose(1, 2)).contiguous()


def default_bwd(do, q, k, v, o, lse, key_mask, cu_seqlens, max_seqlen, causal, scale, dropout, rng, stream):
    """With P = softmax(S) and Z the dropped P: dV = Z^T dO, dP = drop(dO V^T), dS = P (dP - rowsum(dO O)).

    A kernel takes exp(S - lse) for P and needs no second sum; here nothing is saved by its rounding.
    """
    tensors = (q, k, v, do, o)
    (q, k, v, do, o), key_mask, t, pack = _unpack(cu_seqlens, max_seqlen, key_mask, *tensors)
    if t is not None:  # what pads must add nothing
        do = do * key_mask[..., None, None]
    q, k, v, do, o = (wide(x) for x in (q, k, v, do, o))
    s, visible = attention_scores(q, k, key_mask, causal, scale)
    p = s.softmax(-1).masked_fill_(~visible, 0)
    site = (dropout, rng, stream, attention_rows(q, t))
    dv = torch.einsum("bhlm,blhd->bmhd", drop(p, *site), do)
    dp = drop(torch.einsum("blhd,bmhd->bhlm", do, v), *site)
    ds = p * (dp - (do * o).sum(-1).transpose(1, 2)[..., None]) * scale
    dq = torch.einsum("bhlm,bmhd->blhd", ds, k)
    dk = torch.einsum("bhlm,blhd->bmhd", ds, q)
    return tuple(pack(g).to(like.dtype).contiguous() for g, like in zip((dq, dk, dv), tensors, strict=False))


def fake_fwd(q, *_):
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=wide)


_fwd = operator(
    f"attention_fwd(Tensor q, Tensor k, Tensor v, {SITE}) -> (Tensor, Tensor)",
    default=default_fwd,
    fake=fake_fwd,
    triton="attention:attention_fwd",
)
_bwd = operator(
    f"attention_bwd(Tensor do, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, {SITE}) "
    "-> (Tensor, Tensor, Tensor)",
    default=default_bwd,
    triton="attention:attention_bwd",
    fake=lambda do, q, k, v, *_: tuple(x.new_empty(x.shape) for x in (q, k, v)),
)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kernels, q, k, v, key_mask, cu_seqlens, max_seqlen, causal, scale, dropout, rng, stream):
        o, lse = kernels.fwd(q, k, v, key_mask, cu_seqlens, max_seqlen, causal, scale, dropout, rng, stream)
        ctx.save_for_backward(q, k, v, o, lse, key_mask, cu_seqlens, rng)
        ctx.kernels, ctx.site = kernels, (max_seqlen, causal, scale, dropout, stream)
        ctx.set_materialize_grads(False)
        return o

    @staticmethod
    @once_differentiable("attention")
    def backward(ctx, do):
        if do is None:
            return (None,) * len(ctx.needs_input_grad)
        *saved, rng = ctx.saved_tensors
        max_seqlen, causal, scale, dropout, stream = ctx.site
        gradients = ctx.kernels.bwd(do, *saved, max_seqlen, causal, scale, dropout, rng, stream)
        return None, *gradients, None, None, None, None, None, None, None, None


def check_site(op, q, token_axes, key_mask, cu_seqlens, max_seqlen, scale, dropout, rng, stream):
    """Refuse what does not fit the tokens of q, its axes but the last `token_axes`; return max_seqlen."""
    tokens = q.shape[: q.dim() - token_axes]
    if cu_seqlens is not None:
        check.packed(op, q, cu_seqlens, key_mask, max_seqlen, token_axes + 1)
    else:
        if len(tokens) != 2:
            raise ValueError(
                f"{op}: a padded batch must have axes [B, L] before the heads, got shape {list(q.shape)}"
            )
        check.optional(op, "key_mask", key_mask, check.BOOL, tokens, q)
        max_seqlen = tokens[1]
    check.dropout(op, dropout, rng, stream, q)
    if scale is not None and not -math.inf < scale < math.inf:
        raise ValueError(f"{op}: scale must be finite, got {scale}")
    return max_seqlen


@public(_fwd, _bwd)
def attention(
    kernels: Kernels,
    q: Tensor,
    k: Tensor,
    v: Tensor,
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
    """Return dropout(softmax(scale * q k^T)) v over the visible keys of each sequence (Vaswani et al. 2017).

    A query that sees no key gives 0, and its gradient is 0.

    Args:
        q, k, v: ``[B, L, H, D]`` padded or ``[T, H, D]`` packed, one float dtype; cast to the autocast dtype
            if enabled.
        key_mask: bool ``[B, L]``, True = real, anywhere in the sequence; None: all are.
        cu_seqlens: int32 or int64 ``[B + 1]``, from 0 to T; the batch is packed.
        max_seqlen: the longest sequence of a packed batch, or more.
        causal: a query sees no later key.
        scale: finite; None is ``D ** -0.5``.
        dropout: probability in [0, 1) that an attention probability becomes 0; above 0 it needs `rng`.
        rng: int64 ``[2]`` = (seed, step).
        stream: the number of this dropout site, in [0, 2^32).

    Returns:
        shape and dtype of q.

    Raises:
        TypeError, ValueError: an argument breaks these rules, with its name.
    """
    check.tensor("attention", "q", q, check.FLOATS)
    check.tensor("attention", "k", k, (q.dtype,), q.shape, q)
    check.tensor("attention", "v", v, (q.dtype,), q.shape, q)
    site = (key_mask, cu_seqlens, max_seqlen, scale, dropout, rng, stream)
    max_seqlen = check_site("attention", q, 2, *site)
    q, k, v = distinct(*reference.autocast(q, k, v))
    key_mask, cu_seqlens, rng = check.contiguous(key_mask, cu_seqlens, rng)
    scale = default_scale(q) if scale is None else scale
    return _Attention.apply(
        kernels, q, k, v, key_mask, cu_seqlens, max_seqlen, causal, scale, dropout, rng, stream
    )
