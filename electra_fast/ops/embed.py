"""The embedding that both towers share: word + position + type, LayerNorm, dropout."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from electra_fast import reference
from electra_fast.ops import _check as check
from electra_fast.ops._register import Kernels, operator, public
from electra_fast.philox import drop

OP = "embed"


def _default_fwd(
    ids, types, places, word, position, type, weight, bias, cu_seqlens, eps, dropout, rng, stream, dtype
):
    x = reference.embedding_sum(ids, types, places, word, position, type, cu_seqlens)
    y, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], weight.to(x.dtype), bias.to(x.dtype), eps)
    return drop(y, dropout, rng, stream).to(dtype), mean[..., 0], rstd[..., 0]


def _default_bwd(
    dy, ids, types, places, word, position, type, weight, mean, rstd, cu_seqlens, dropout, rng, stream
):
    places = reference.places(ids, cu_seqlens) if places is None else places
    types = torch.zeros_like(ids) if types is None else types
    x = reference.embedding_sum(ids, types, places, word, position, type, cu_seqlens)
    dy = drop(reference.wide(dy), dropout, rng, stream)
    w, stats = weight.to(x.dtype), (mean[..., None], rstd[..., None])
    dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
        dy, x, x.shape[-1:], *stats, w, w, [True] * 3
    )

    def table_gradient(table, at):
        return torch.ops.aten.embedding_dense_backward(dx, at.long(), len(table), -1, False).to(table.dtype)

    tables = ((word, ids), (position, places), (type, types))
    return *(table_gradient(*t) for t in tables), dweight.to(weight.dtype), dbias.to(weight.dtype)


def _fake_fwd(ids, types, places, word, *rest):
    *_, dtype = rest
    wide = torch.float64 if word.dtype == torch.float64 else torch.float32
    y = word.new_empty((*ids.shape, word.shape[1]), dtype=dtype)
    return y, word.new_empty(ids.shape, dtype=wide), word.new_empty(ids.shape, dtype=wide)


def _fake_bwd(dy, ids, types, places, word, position, type, weight, *rest):
    return tuple(torch.empty_like(t) for t in (word, position, type, weight, weight))


_fwd = operator(
    "embed_fwd(Tensor ids, Tensor? type_ids, Tensor? position_ids, Tensor word, Tensor position, "
    "Tensor type, Tensor weight, Tensor bias, Tensor? cu_seqlens, float eps, float dropout, Tensor? rng, "
    "int stream, ScalarType dtype) -> (Tensor, Tensor, Tensor)",
    default=_default_fwd,
    fake=_fake_fwd,
)
_bwd = operator(
    "embed_bwd(Tensor dy, Tensor ids, Tensor? type_ids, Tensor? position_ids, Tensor word, Tensor position, "
    "Tensor type, Tensor weight, Tensor mean, Tensor rstd, Tensor? cu_seqlens, float dropout, Tensor? rng, "
    "int stream) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    default=_default_bwd,
    fake=_fake_bwd,
)


class _Embed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kernels, *args):
        y, mean, rstd = kernels.fwd(*args)
        *looked_up, _, cu_seqlens, _, dropout, rng, stream, _ = args  # without bias, eps, dtype
        ctx.save_for_backward(*looked_up, mean, rstd, cu_seqlens, rng)
        ctx.kernels, ctx.dropout, ctx.stream = kernels, dropout, stream
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        *saved, rng = ctx.saved_tensors
        gradients = ctx.kernels.bwd(dy.contiguous(), *saved, ctx.dropout, rng, ctx.stream)
        return None, None, None, None, *gradients, None, None, None, None, None, None


@public(_fwd, _bwd)
def embed(
    kernels: Kernels,
    ids: Tensor,
    type_ids: Tensor | None,
    position_ids: Tensor | None,
    word: Tensor,
    position: Tensor,
    type: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    *,
    eps: float,
    dropout: float = 0.0,
    rng: Tensor | None = None,
    stream: int = 0,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Return dropout(LayerNorm(word[id] + position[place] + type[type id])).

    Args:
        ids: ``[B, L]`` padded or ``[T]`` packed, int32 or int64.
        type_ids: shape of ids, int32 or int64; None: all 0.
        position_ids: shape of ids, int32 or int64; None: the place in the sequence.
        word, position, type: tables ``[V, E]``, ``[max positions, E]``, ``[types, E]``, of one float dtype.
        norm_weight, norm_bias: ``[E]``, float32 or the tables' dtype.
        eps: added to LayerNorm's variance.
        dropout: probability in [0, 1) that an element becomes 0; above 0 it needs `rng`.
        rng: int64 ``[2]`` = (seed, step).
        stream: the number of this dropout site.
        cu_seqlens: int32 or int64 ``[B + 1]``, from 0 to T; the batch is packed.

    Returns:
        ``[B, L, E]`` or ``[T, E]`` in the autocast dtype where autocast is enabled, else in the tables'.

    Raises:
        TypeError, ValueError: an argument breaks these rules. IndexError: an id outside its table, on the
            CPU; on
        CUDA its row becomes NaN.
    """
    check.tensor(OP, "ids", ids, check.INTS)
    check.optional(OP, "type_ids", type_ids, check.INTS, ids.shape, ids)
    check.optional(OP, "position_ids", position_ids, check.INTS, ids.shape, ids)
    check.tensor(OP, "word", word, check.FLOATS, (None, None), ids)
    E = word.shape[1]
    check.tensor(OP, "position", position, (word.dtype,), (None, E), ids)
    check.tensor(OP, "type", type, (word.dtype,), (None, E), ids)
    check.tensor(OP, "norm_weight", norm_weight, (torch.float32, word.dtype), (E,), ids)
    check.tensor(OP, "norm_bias", norm_bias, (norm_weight.dtype,), (E,), ids)
    check.dropout(OP, dropout, rng, ids)
    if cu_seqlens is not None:
        check.packed(OP, ids, cu_seqlens, None, ids.numel())
        cu_seqlens = cu_seqlens.contiguous()
    if position_ids is None and cu_seqlens is None and ids.shape[-1] > position.shape[0]:
        raise ValueError(
            f"embed: ids must have at most {position.shape[0]} positions a sequence, got {ids.shape[-1]}"
        )
    (like,) = reference.autocast(word[:0])
    return _Embed.apply(
        kernels,
        ids.contiguous(),
        type_ids,
        position_ids,
        word,
        position,
        type,
        norm_weight,
        norm_bias,
        cu_seqlens,
        eps,
        dropout,
        rng,
        stream,
        like.dtype,
    )
