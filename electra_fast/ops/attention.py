"""Bidirectional attention over padded or packed sequences."""

import math

import torch
from torch import Tensor

from electra_fast.dtypes import autocast, wide, wide_dtype
from electra_fast.errors import must
from electra_fast.ops import _check as check
from electra_fast.ops._operators import operator
from electra_fast.ops._public import Kernels, public
from electra_fast.ops._transforms import distinct, once_differentiable
from electra_fast.packing import padding
from electra_fast.philox import drop
from electra_fast.reference import attention_rows, attention_scores, default_scale

# The arguments after q, k and v, in every operator of `attention` and `attention_qkv`.
OPTIONS = (
    "Tensor? key_mask, Tensor? cu_seqlens, SymInt max_seqlen, bool causal, float scale, float dropout, "
    "Tensor? rng, SymInt stream"
)


def _unpack(cu_seqlens, max_seqlen, key_mask, *tensors):
    """Return (tensors padded to [B, L, …], key_mask, t, a function that packs a result again)."""
    if cu_seqlens is None:
        return tensors, key_mask, None, lambda y: y
    t, key_mask, b, l = padding("attention", cu_seqlens, max_seqlen, len(tensors[0]))
    return [x[t] for x in tensors], key_mask, t, lambda y: y[b, l]


def default_fwd(q, k, v, key_mask, cu_seqlens, max_seqlen, causal, scale, dropout, rng, stream):
    (q, k, v), key_mask, t, pack = _unpack(cu_seqlens, max_seqlen, key_mask, q, k, v)
    s, visible = attention_scores(q, k, key_mask, causal, scale)
    p = drop(s.softmax(-1).masked_fill_(~visible, 0), dropout, rng, stream, attention_rows(q, t))
    o = torch.einsum("bhlm,bmhd->blhd", p, wide(v)).to(q.dtype)
    return pack(o).contiguous(), pack(s.logsumexp(-1).transpose(1, 2)).contiguous()


def default_bwd(do, q, k, v, o, lse, key_mask, cu_seqlens, max_seqlen, causal, scale, dropout, rng, stream):
    """With P = softmax(S) and Z = drop(P): dV = Z^T dO, dP = drop(dO V^T), dS = P (dP - rowsum(dO O)).

    Kernels compute P as exp(S - lse) to save a sum. Here the softmax is exact instead.
    """
    tensors = (q, k, v, do, o)
    (q, k, v, do, o), key_mask, t, pack = _unpack(cu_seqlens, max_seqlen, key_mask, *tensors)
    if t is not None:  # padding must not contribute
        do = do * key_mask[..., None, None]
    q, k, v, do, o = (wide(x) for x in (q, k, v, do, o))
    s, visible = attention_scores(q, k, key_mask, causal, scale)
    p = s.softmax(-1).masked_fill_(~visible, 0)
    dropout = (dropout, rng, stream, attention_rows(q, t))
    dv = torch.einsum("bhlm,blhd->bmhd", drop(p, *dropout), do)
    dp = drop(torch.einsum("blhd,bmhd->bhlm", do, v), *dropout)
    ds = p * (dp - (do * o).sum(-1).transpose(1, 2)[..., None]) * scale
    dq = torch.einsum("bhlm,bmhd->blhd", ds, k)
    dk = torch.einsum("bhlm,blhd->bmhd", ds, q)
    return tuple(pack(g).to(like.dtype).contiguous() for g, like in zip((dq, dk, dv), tensors, strict=False))


def fake_fwd(q, *_):
    return q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=wide_dtype(q))


_fwd = operator(
    f"attention_fwd(Tensor q, Tensor k, Tensor v, {OPTIONS}) -> (Tensor, Tensor)",
    default=default_fwd,
    fake=fake_fwd,
    triton="attention:attention_fwd",
)
_bwd = operator(
    f"attention_bwd(Tensor do, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, {OPTIONS}) "
    "-> (Tensor, Tensor, Tensor)",
    default=default_bwd,
    triton="attention:attention_bwd",
    fake=lambda do, q, k, v, *_: tuple(x.new_empty(x.shape) for x in (q, k, v)),
)


def attention_function(op: str) -> type[torch.autograd.Function]:
    """Return the autograd function of `attention` (tensors q, k, v) or `attention_qkv` (one tensor)."""

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx, kernels, *args):
            o, lse = kernels.fwd(*args)
            *tensors, key_mask, cu_seqlens, max_seqlen, causal, scale, dropout, rng, stream = args
            ctx.save_for_backward(*tensors, o, lse, key_mask, cu_seqlens, rng)
            ctx.kernels, ctx.options = kernels, (max_seqlen, causal, scale, dropout)
            ctx.stream, ctx.fused_qkv = stream, len(tensors) == 1
            ctx.set_materialize_grads(False)
            return o

        @staticmethod
        @once_differentiable(op)
        def backward(ctx, do):
            if do is None:
                return (None,) * len(ctx.needs_input_grad)
            *saved, rng = ctx.saved_tensors
            gradients = ctx.kernels.bwd(do, *saved, *ctx.options, rng, ctx.stream)
            return None, *((gradients,) if ctx.fused_qkv else gradients), *(None,) * 8

    return Attention


_Attention = attention_function("attention")


def check_options(op, q, head_axes, key_mask, cu_seqlens, max_seqlen, scale, dropout, rng, stream):
    """Check the options against the tokens of q, its axes before the last `head_axes`; return max_seqlen."""
    tokens = q.shape[: q.dim() - head_axes]
    if cu_seqlens is not None:
        check.packed(op, q, cu_seqlens, key_mask, max_seqlen, head_axes + 1)
    else:
        if len(tokens) != 2:
            rule = "have axes [B, L] before the heads"
            raise ValueError(must(f"{op}: a padded batch", rule, f"shape {list(q.shape)}"))
        check.optional(op, "key_mask", key_mask, check.BOOL, tokens, q)
        max_seqlen = tokens[1]
    check.dropout(op, dropout, rng, stream, q)
    if scale is not None and not -math.inf < scale < math.inf:
        raise ValueError(must(f"{op}: scale", "be finite", scale))
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

    The result and the gradient of a query without visible keys are 0.

    Args:
        q, k, v: ``[B, L, H, D]`` padded or ``[T, H, D]`` packed, of one float dtype; cast to the autocast
            dtype if enabled.
        key_mask: bool ``[B, L]``, True = visible, at any positions; None: every key is visible.
        cu_seqlens: int32 or int64 ``[B + 1]``, from 0 to T, of a packed batch.
        max_seqlen: the longest sequence of a packed batch, or more.
        causal: keys after a query are not visible to it.
        scale: finite; None: ``D ** -0.5``.
        dropout: probability in [0, 1) that an attention probability becomes 0; `rng` is needed if above 0.
        rng: int64 ``[2]`` = (seed, step).
        stream: the number of this use of dropout, in [0, 2^32).

    Returns:
        shape and dtype of q.

    Raises:
        TypeError, ValueError: an argument breaks these rules; the message names it.
    """
    check.tensor("attention", "q", q, check.FLOATS)
    check.tensor("attention", "k", k, (q.dtype,), q.shape, q)
    check.tensor("attention", "v", v, (q.dtype,), q.shape, q)
    options = (key_mask, cu_seqlens, max_seqlen, scale, dropout, rng, stream)
    max_seqlen = check_options("attention", q, 2, *options)
    q, k, v = distinct(*autocast(q, k, v))
    key_mask, cu_seqlens, rng = check.contiguous(key_mask, cu_seqlens, rng)
    scale = default_scale(q) if scale is None else scale
    return _Attention.apply(
        kernels, q, k, v, key_mask, cu_seqlens, max_seqlen, causal, scale, dropout, rng, stream
    )
