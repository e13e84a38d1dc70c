"""Attention over padded or packed sequences: to the same tokens, or to those of other sequences."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from electra_fast.dtypes import autocast, wide, wide_dtype
from electra_fast.errors import must
from electra_fast.ops import _check as check
from electra_fast.ops._operators import operator
from electra_fast.ops._public import Kernels, public
from electra_fast.ops._transforms import distinct, once_differentiable
from electra_fast.packing import AttentionPadding, attention_padding
from electra_fast.philox import drop
from electra_fast.reference import attention_rows, attention_scores, default_scale

# The arguments after q, k and v, in every operator of `attention` and `attention_qkv`.
OPTIONS = (
    "Tensor? key_mask, Tensor? cu_seqlens, SymInt max_seqlen, bool causal, float scale, float dropout, "
    "Tensor? rng, SymInt stream"
)
# Those of `attention` that follow them. Without bounds of their own, packed keys are those of the queries.
KEY_OPTIONS = "Tensor? cu_seqlens_k, SymInt max_seqlen_k"
TENSOR_OPTIONS = (0, 1, 6, 8)  # their numbers among both: key_mask, cu_seqlens, rng, cu_seqlens_k


class _Padded(NamedTuple):
    """The tensors of a call as ``[B, L, …]``, whether they were packed or not."""

    queries: list[Tensor]
    keys: list[Tensor]
    key_mask: Tensor | None
    ahead: int | Tensor | None  # see `attention_scores`
    padding: AttentionPadding | None

    @classmethod
    def of(cls, queries, keys, key_mask, cu_seqlens, max_seqlen, causal, cu_seqlens_k, max_seqlen_k):
        if cu_seqlens is None:
            ahead = keys[0].shape[1] - queries[0].shape[1] if causal else None
            return cls(queries, keys, key_mask, ahead, None)
        tokens, bounds = (len(queries[0]), len(keys[0])), (cu_seqlens, max_seqlen, cu_seqlens_k, max_seqlen_k)
        pad = attention_padding(*tokens, *bounds, causal)
        queries, keys = [x[pad.queries.t] for x in queries], [x[pad.keys.t] for x in keys]
        return cls(queries, keys, pad.keys.mask, pad.ahead, pad)

    def rows(self) -> Tensor:
        return attention_rows(self.queries[0], self.padding and self.padding.queries.t)

    def pack_queries(self, y: Tensor) -> Tensor:
        return (y if self.padding is None else y[self.padding.queries[2:]]).contiguous()

    def pack_keys(self, y: Tensor) -> Tensor:
        return (y if self.padding is None else y[self.padding.keys[2:]]).contiguous()


def default_fwd(
    q, k, v, key_mask, cu_seqlens, max_seqlen, causal, scale, dropout, rng, stream,
    cu_seqlens_k=None, max_seqlen_k=None,
):  # fmt: skip
    layout = (key_mask, cu_seqlens, max_seqlen, causal, cu_seqlens_k, max_seqlen_k)
    padded = _Padded.of([q], [k, v], *layout)
    (q,), (k, v) = padded.queries, padded.keys
    s, visible = attention_scores(q, k, padded.key_mask, padded.ahead, scale)
    p = drop(s.softmax(-1).masked_fill_(~visible, 0), dropout, rng, stream, padded.rows())
    o = torch.einsum("bhlm,bmhd->blhd", p, wide(v)).to(q.dtype)
    return padded.pack_queries(o), padded.pack_queries(s.logsumexp(-1).transpose(1, 2))


def default_bwd(
    do, q, k, v, o, lse, key_mask, cu_seqlens, max_seqlen, causal, scale, dropout, rng, stream,
    cu_seqlens_k=None, max_seqlen_k=None,
):  # fmt: skip
    """With P = softmax(S) and Z = drop(P): dV = Z^T dO, dP = drop(dO V^T), dS = P (dP - rowsum(dO O)).

    Kernels compute P as exp(S - lse) to save a sum. Here the softmax is exact instead.
    """
    layout = (key_mask, cu_seqlens, max_seqlen, causal, cu_seqlens_k, max_seqlen_k)
    padded = _Padded.of([q, do, o], [k, v], *layout)
    if padded.padding is not None:  # padding must not contribute
        padded.queries[1] *= padded.padding.queries.mask[..., None, None]
    dtypes = (q.dtype, k.dtype, v.dtype)
    (q, do, o), (k, v) = ([wide(x) for x in tensors] for tensors in padded[:2])
    s, visible = attention_scores(q, k, padded.key_mask, padded.ahead, scale)
    p = s.softmax(-1).masked_fill_(~visible, 0)
    dropout = (dropout, rng, stream, padded.rows())
    dv = torch.einsum("bhlm,blhd->bmhd", drop(p, *dropout), do)
    dp = drop(torch.einsum("blhd,bmhd->bhlm", do, v), *dropout)
    ds = p * (dp - (do * o).sum(-1).transpose(1, 2)[..., None]) * scale
    dq = torch.einsum("bhlm,bmhd->blhd", ds, k)
    dk = torch.einsum("bhlm,blhd->bmhd", ds, q)
    gradients = (padded.pack_queries(dq), padded.pack_keys(dk), padded.pack_keys(dv))
    return tuple(g.to(dtype) for g, dtype in zip(gradients, dtypes, strict=True))


def fake_fwd(q, *_):
    return q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=wide_dtype(q))


_fwd = operator(
    f"attention_fwd(Tensor q, Tensor k, Tensor v, {OPTIONS}, {KEY_OPTIONS}) -> (Tensor, Tensor)",
    default=default_fwd,
    fake=fake_fwd,
    triton="attention:attention_fwd",
)
_bwd = operator(
    f"attention_bwd(Tensor do, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, {OPTIONS}, {KEY_OPTIONS}) "
    "-> (Tensor, Tensor, Tensor)",
    default=default_bwd,
    triton="attention:attention_bwd",
    fake=lambda do, q, k, v, *_: tuple(x.new_empty(x.shape) for x in (q, k, v)),
)


def attention_function(op: str, inputs: int) -> type[torch.autograd.Function]:
    """Return the autograd function of `attention` (3 inputs) or `attention_qkv` (1 input)."""

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx, kernels, *args):
            o, lse = kernels.fwd(*args)
            tensors, options = args[:inputs], list(args[inputs:])
            ctx.places = [i for i in TENSOR_OPTIONS if i < len(options)]
            ctx.save_for_backward(*tensors, o, lse, *(options[i] for i in ctx.places))
            for i in ctx.places:
                options[i] = None
            ctx.kernels, ctx.options = kernels, options
            ctx.set_materialize_grads(False)
            return o

        @staticmethod
        @once_differentiable(op)
        def backward(ctx, do):
            if do is None:
                return (None,) * len(ctx.needs_input_grad)
            saved, options = ctx.saved_tensors, list(ctx.options)
            for i, x in zip(ctx.places, saved[inputs + 2 :], strict=True):
                options[i] = x
            gradients = ctx.kernels.bwd(do, *saved[: inputs + 2], *options)
            return None, *((gradients,) if inputs == 1 else gradients), *(None,) * len(options)

    return Attention


_Attention = attention_function("attention", inputs=3)


def check_options(
    op, q, head_axes, key_mask, cu_seqlens, max_seqlen, scale, dropout, rng, stream, keys=None
):  # fmt: skip
    """Check the options against the tokens of q, its axes before the last `head_axes`; return max_seqlen.

    `keys` is the number of keys per sequence of a padded batch, None: that of queries.
    """
    tokens = q.shape[: q.dim() - head_axes]
    if cu_seqlens is not None:
        check.packed(op, q, cu_seqlens, key_mask, max_seqlen, head_axes + 1)
    else:
        if len(tokens) != 2:
            rule = "have axes [B, L] before the heads"
            raise ValueError(must(f"{op}: a padded batch", rule, f"shape {list(q.shape)}"))
        keys = tokens[1] if keys is None else keys
        check.optional(op, "key_mask", key_mask, check.BOOL, (tokens[0], keys), q)
        max_seqlen = tokens[1]
    check.dropout(op, dropout, rng, stream, q)
    if scale is not None and not -math.inf < scale < math.inf:
        raise ValueError(must(f"{op}: scale", "be finite", scale))
    return max_seqlen


def _check_keys(q, k, cu_seqlens, max_seqlen, causal, cu_seqlens_k, max_seqlen_k) -> int:
    """Check the shape and the layout of k; return the most keys of a sequence, or more."""
    check.tensor("attention", "k", k, (q.dtype,), (*q.shape[:-3], None, *q.shape[-2:]), q)
    if cu_seqlens_k is not None:
        if cu_seqlens is None:
            rule, remedy = "be given with cu_seqlens_k", "one query per sequence has the bounds 0, 1, ..., B"
            raise ValueError(must("attention: cu_seqlens", rule, None, remedy))
        check.packed("attention", k, cu_seqlens_k, None, max_seqlen_k, 3, suffix="_k")
        check.tensor("attention", "cu_seqlens_k", cu_seqlens_k, check.INTS, cu_seqlens.shape, q)
        return max_seqlen_k
    tokens, keys = q.shape[-3], k.shape[-3]
    if cu_seqlens is not None:
        if tokens != keys:
            rule, remedy = f"have the {tokens} tokens of q", "pass cu_seqlens_k and max_seqlen_k"
            raise ValueError(must("attention: k", rule, keys, remedy))
        return max_seqlen
    if causal and tokens > keys:
        rule = f"be False with more queries than keys, {tokens} and {keys}"
        raise ValueError(must("attention: causal", rule, True, "the last query is aligned with the last key"))
    return keys


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
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_k: int | None = None,
) -> Tensor:
    """Return dropout(softmax(scale * q k^T)) v over the visible keys of each sequence (Vaswani et al. 2017).

    The result and the gradient of a query without visible keys are 0. Keys and values may be those of other
    tokens: the encoder's in cross-attention, or all tokens so far, of which the queries are the last.

    Args:
        q: ``[B, L, H, D]`` padded or ``[T, H, D]`` packed, a float dtype; cast to the autocast dtype if
            enabled.
        k, v: dtype of q, ``[B, K, H, D]`` or ``[S, H, D]``.
        key_mask: bool ``[B, K]``, True = visible, at any positions; None: every key is visible.
        cu_seqlens: int32 or int64 ``[B + 1]``, from 0 to T, of a packed batch.
        max_seqlen: the longest sequence of a packed batch, or more.
        causal: keys after a query are not visible to it. The last query is aligned with the last key: query i
            of L sees key j of K if j <= i + K - L. No sequence may have more queries than keys.
        scale: finite; None: ``D ** -0.5``.
        dropout: probability in [0, 1) that an attention probability becomes 0; `rng` is needed if above 0.
        rng: int64 ``[2]`` = (seed, step).
        stream: the number of this use of dropout, in [0, 2^32).
        cu_seqlens_k: int32 or int64 ``[B + 1]``, from 0 to S, the bounds of packed keys; None: `cu_seqlens`.
        max_seqlen_k: the most keys of a sequence, or more, if `cu_seqlens_k` is given.

    Returns:
        shape and dtype of q.

    Raises:
        TypeError, ValueError: an argument breaks these rules; the message names it.
    """
    check.tensor("attention", "q", q, check.FLOATS)
    if q.dim() < 3:
        raise ValueError(
            must("attention: q", "have axes [B, L, H, D] or [T, H, D]", f"shape {list(q.shape)}")
        )
    max_seqlen_k = _check_keys(q, k, cu_seqlens, max_seqlen, causal, cu_seqlens_k, max_seqlen_k)
    check.tensor("attention", "v", v, (q.dtype,), k.shape, q)
    options = (key_mask, cu_seqlens, max_seqlen, scale, dropout, rng, stream)
    max_seqlen = check_options("attention", q, 2, *options, keys=max_seqlen_k)
    q, k, v = distinct(*autocast(q, k, v))
    key_mask, cu_seqlens, cu_seqlens_k, rng = check.contiguous(key_mask, cu_seqlens, cu_seqlens_k, rng)
    options = (causal, default_scale(q) if scale is None else scale, dropout, rng, stream)
    return _Attention.apply(
        kernels, q, k, v, key_mask, cu_seqlens, max_seqlen, *options, cu_seqlens_k, max_seqlen_k
    )
