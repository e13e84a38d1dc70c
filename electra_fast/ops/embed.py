"""The embedding that both towers share: word + position + type, LayerNorm, dropout."""

import torch
from torch import Tensor

from electra_fast import reference
from electra_fast.dtypes import autocast, wide, wide_dtype
from electra_fast.errors import must
from electra_fast.ops import _check as check
from electra_fast.ops._operators import operator
from electra_fast.ops._public import Kernels, public
from electra_fast.ops._transforms import once_differentiable
from electra_fast.packing import token_positions
from electra_fast.philox import drop
from electra_fast.reference import Embedded

OP = "embed"


def _default_fwd(
    ids, type_ids, position_ids, word, position, type, weight, bias, eps, dropout, rng, stream, dtype
):
    x = reference.embedding_sum(ids, type_ids, position_ids, word, position, type)
    y, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], weight.to(x.dtype), bias.to(x.dtype), eps)
    return drop(y, dropout, rng, stream).to(dtype), mean[..., 0], rstd[..., 0]


def _default_bwd(
    dy, ids, type_ids, position_ids, word, position, type, weight, mean, rstd, dropout, rng, stream,
    dword, want_word,
):  # fmt: skip
    """With h = (x - mean) rstd and g = w drop(dy): dx = rstd (g - avg(g) - h avg(g h)), summed by id."""
    x = reference.embedding_sum(ids, type_ids, position_ids, word, position, type)
    dy = drop(wide(dy), dropout, rng, stream)
    w, stats = weight.to(x.dtype), (mean[..., None], rstd[..., None])
    dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
        dy, x, x.shape[-1:], *stats, w, w, [True] * 3
    )

    def table_gradient(table, rows, initial=None):
        # An extra row collects bad ids, which only a GPU lets pass.
        rows = rows.long().masked_fill((rows < 0) | (rows >= len(table)), len(table))
        sums = torch.ops.aten.embedding_dense_backward(dx, rows, len(table) + 1, -1, False)[:-1]
        return (sums if initial is None else sums.add_(initial)).to(table.dtype)

    return (
        table_gradient(word, ids, dword) if want_word else word.new_empty(0),
        table_gradient(position, token_positions(ids) if position_ids is None else position_ids),
        table_gradient(type, torch.zeros_like(ids) if type_ids is None else type_ids),
        dweight.to(weight.dtype),
        dbias.to(weight.dtype),
    )


def _fake_fwd(ids, type_ids, position_ids, word, *rest):
    *_, dtype = rest
    y = word.new_empty((*ids.shape, word.shape[1]), dtype=dtype)
    mean, rstd = (word.new_empty(ids.shape, dtype=wide_dtype(word)) for _ in range(2))
    return y, mean, rstd


def _fake_bwd(dy, ids, type_ids, position_ids, word, position, type, weight, *rest):
    *_, want_word = rest
    dword = torch.empty_like(word) if want_word else word.new_empty(0)
    return dword, *(torch.empty_like(t) for t in (position, type, weight, weight))


_fwd = operator(
    "embed_fwd(Tensor ids, Tensor? type_ids, Tensor? position_ids, Tensor word, Tensor position, "
    "Tensor type, Tensor weight, Tensor bias, float eps, float dropout, Tensor? rng, SymInt stream, "
    "ScalarType dtype) -> (Tensor, Tensor, Tensor)",
    default=_default_fwd,
    fake=_fake_fwd,
    triton="embed:embed_fwd",
)
# `dword` is the table's gradient from its other uses; the gradient of this lookup is added to it.
_bwd = operator(
    "embed_bwd(Tensor dy, Tensor ids, Tensor? type_ids, Tensor? position_ids, Tensor word, Tensor position, "
    "Tensor type, Tensor weight, Tensor mean, Tensor rstd, float dropout, Tensor? rng, SymInt stream, "
    "Tensor? dword, bool want_word) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    default=_default_bwd,
    fake=_fake_bwd,
    triton="embed:embed_bwd",
)


class _Embed(torch.autograd.Function):
    """Return (y, word). The table is an output so that `backward` gets its gradient from other uses."""

    @staticmethod
    def forward(ctx, kernels, padding_idx, *args):
        y, mean, rstd = kernels.fwd(*args)
        *inputs, _, _, dropout, rng, stream, _ = args  # without bias, eps and dtype
        ctx.save_for_backward(*inputs, mean, rstd, rng)
        ctx.kernels, ctx.dropout, ctx.stream, ctx.padding_idx = kernels, dropout, stream, padding_idx
        ctx.set_materialize_grads(False)
        return y, inputs[3]

    @staticmethod
    @once_differentiable(OP)
    def backward(ctx, dy, dword):
        if dy is None:
            return *[None] * 5, dword, *[None] * 9
        *saved, rng = ctx.saved_tensors
        wanted = ctx.needs_input_grad[5:10]
        padding = None if dword is None or ctx.padding_idx is None else dword[ctx.padding_idx].clone()
        dy, dword = check.contiguous(dy, dword)
        args = (dy, *saved, ctx.dropout, rng, ctx.stream, dword, wanted[0])
        gradients = ctx.kernels.bwd(*args)
        if wanted[0] and ctx.padding_idx is not None:
            gradients[0][ctx.padding_idx] = 0 if padding is None else padding
        wanted = zip(gradients, wanted, strict=True)
        return *[None] * 5, *(g if needed else None for g, needed in wanted), *[None] * 5


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
    padding_idx: int | None = None,
    return_word: bool = False,
) -> Tensor | Embedded:
    """Return dropout(LayerNorm(word[id] + position[position id] + type[type id])).

    Args:
        ids: ``[B, L]`` padded or ``[T]`` packed, int32 or int64.
        type_ids: shape of ids, int32 or int64; None: all 0.
        position_ids: shape of ids, int32 or int64; None: 0, 1, … within each sequence.
        word, position, type: tables ``[V, E]``, ``[max positions, E]``, ``[types, E]``, of one float dtype.
        norm_weight, norm_bias: ``[E]``, float32 or the tables' dtype.
        eps: added to LayerNorm's variance, 0 or more.
        dropout: probability in [0, 1) that an element becomes 0; `rng` is needed if it is above 0.
        rng: int64 ``[2]`` = (seed, step).
        stream: the number of this use of dropout, in [0, 2^32).
        cu_seqlens: int32 or int64 ``[B + 1]``, from 0 to T, of a packed batch.
        padding_idx: the row of `word` to which its lookups give no gradient, as in `F.embedding`.
        return_word: also return `word`, to pass to its next use. The gradient from there is the initial value
            of this lookup's sums, which saves an addition of whole tables.

    Returns:
        x ``[B, L, E]`` or ``[T, E]``, in the autocast dtype if enabled, else in the tables' dtype; with
        `return_word` ``Embedded(x, word)``.

    Raises:
        TypeError, ValueError: an argument breaks these rules; the message names it.
        IndexError: an id is outside its table (CPU only; on CUDA its row becomes NaN).
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
    check.eps(OP, eps)
    check.dropout(OP, dropout, rng, stream, ids)
    if cu_seqlens is not None:
        check.packed(OP, ids, cu_seqlens, None, ids.numel())
        position_ids = token_positions(ids, cu_seqlens) if position_ids is None else position_ids
    elif position_ids is None and ids.shape[-1] > position.shape[0]:
        rule = f"have at most {position.shape[0]} positions per sequence"
        raise ValueError(must("embed: ids", rule, ids.shape[-1]))
    V = word.shape[0]
    if padding_idx is not None and not 0 <= padding_idx < V:
        raise ValueError(must("embed: padding_idx", f"be a row of word, in [0, {V})", padding_idx))
    (like,) = autocast(word[:0])
    args = check.contiguous(ids, type_ids, position_ids, word, position, type, norm_weight, norm_bias)
    args += (eps, dropout, *check.contiguous(rng), stream, like.dtype)
    y, table = _Embed.apply(kernels, padding_idx, *args)
    if not return_word:
        return y
    return Embedded(y, table if word.requires_grad else word)
