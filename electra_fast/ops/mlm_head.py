"""The generator's head: the tied projection to the vocabulary, its loss, and one sample per masked slot."""

import math

import torch
from torch import Tensor

from electra_fast import reference
from electra_fast.dtypes import autocast, wide, wide_dtype
from electra_fast.errors import must
from electra_fast.ops import _check as check
from electra_fast.ops._operators import operator
from electra_fast.ops._public import Kernels, public
from electra_fast.ops._transforms import once_differentiable
from electra_fast.reference import MLMHead

OP = "mlm_head"


def _default_fwd(x, table, bias, targets, weights, rng, temperature, disallow_correct):
    options = {"temperature": temperature, "disallow_correct": disallow_correct}
    return reference.mlm_head(x, table, bias, targets, weights, rng, **options)[:4]


def _default_bwd(x, table, bias, targets, weights, rng, temperature, disallow_correct, want_dx, want_dtable):
    """With P = softmax(logits): dlogits = w / sum(w) * (P - onehot(target)).

    Kernels compute P as exp(logits - lse) to save a sum. Here the softmax is exact instead.
    """
    head = _default_fwd(x, table, bias, targets, weights, rng, temperature, disallow_correct)
    unused = weights == 0
    total = weights.sum()
    scale = (weights / total.masked_fill(total == 0, 1))[:, None]
    x, table = wide(x).masked_fill(unused[:, None], 0), wide(table)
    dlogits = torch.addmm(wide(bias), x, table.T).softmax(-1)
    target = targets.long().masked_fill(unused, 0)[:, None]
    bad = (target < 0) | (target >= len(table))
    hit = dlogits.new_full(target.shape, -1.0).masked_fill(bad, math.nan)
    dlogits.scatter_add_(1, target.masked_fill(bad, 0), hit).mul_(scale).masked_fill_(unused[:, None], 0)
    dx = dlogits @ table if want_dx else x.new_empty(0)
    dtable = dlogits.T @ x if want_dtable else x.new_empty(0)
    return *head, dx, dtable, dlogits.sum(0)


def _fake_fwd(x, table, bias, targets, weights, rng, temperature, disallow_correct):
    loss, lse = (x.new_empty(shape, dtype=wide_dtype(x)) for shape in ((), x.shape[:1]))
    return loss, torch.empty_like(targets), x.new_empty((), dtype=torch.float32), lse


def _fake_bwd(x, table, bias, targets, weights, rng, temperature, disallow_correct, want_dx, want_dtable):
    head = _fake_fwd(x, table, bias, targets, weights, rng, temperature, disallow_correct)
    dx = head[0].new_empty(x.shape if want_dx else 0)
    dtable = head[0].new_empty(table.shape if want_dtable else 0)
    return *head, dx, dtable, head[0].new_empty(bias.shape)


_ARGUMENTS = (
    "Tensor x, Tensor table, Tensor bias, Tensor targets, Tensor weights, Tensor rng, float temperature, "
    "bool disallow_correct"
)
_fwd = operator(
    f"mlm_head_fwd({_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)",
    default=_default_fwd,
    fake=_fake_fwd,
    triton="mlm_head:mlm_head_fwd",
    triton_first=True,
)
# In training this operator computes the loss and its gradient together: three products, where a backward pass
# that computes the logits again needs four. The gradient is that of a loss with gradient 1, in float32; in
# float16 it would underflow before the loss's scale is known.
_bwd = operator(
    f"mlm_head_bwd({_ARGUMENTS}, bool want_dx, bool want_dtable) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    default=_default_bwd,
    fake=_fake_bwd,
    triton="mlm_head:mlm_head_bwd",
    triton_first=True,
)


class _MLMHead(torch.autograd.Function):
    """Return (*head, table). The table is an output so that `backward` gets its gradient from other uses."""

    @staticmethod
    def forward(ctx, kernels, dtype, x, table, bias, *rest):
        *head, dx, dtable, dbias = kernels.bwd(x.to(dtype), table.to(dtype), bias, *rest)
        ctx.save_for_backward(dx, dtable, dbias, x, table, bias)
        ctx.dtypes = x.dtype, table.dtype, bias.dtype
        ctx.mark_non_differentiable(*head[1:])
        ctx.set_materialize_grads(False)
        return *head, table

    @staticmethod
    @once_differentiable(OP)
    def backward(ctx, dloss, *rest):
        *_, dtable = rest  # from the table's other uses
        if dloss is None:
            return None, None, None, dtable, *[None] * 8

        def scaled(gradient, initial):
            return gradient * dloss if initial is None else torch.addcmul(initial, gradient, dloss)

        initial, needed = (None, dtable, None), ctx.needs_input_grad[2:5]
        each = zip(ctx.saved_tensors[:3], initial, ctx.dtypes, needed, strict=True)
        gradients = (scaled(g, first).to(dtype) if need else None for g, first, dtype, need in each)
        return None, None, *gradients, *[None] * 7


@public(_fwd, _bwd)
def mlm_head(
    kernels: Kernels,
    x: Tensor,
    table: Tensor,
    bias: Tensor,
    targets: Tensor,
    weights: Tensor,
    rng: Tensor,
    *,
    temperature: float = 1.0,
    disallow_correct: bool = False,
    return_table: bool = False,
) -> MLMHead:
    """Return the masked-language-model loss and one sample per slot (Clark et al. 2020, eq. 1).

    ``logits = x table^T + bias``; ``loss = sum_m w_m (lse_m - logits[m, target_m]) / sum_m w_m``, 0 if the
    weights sum to 0. A sample is the inverse CDF of softmax(logits / temperature), in vocabulary order, at
    one uniform number per slot.

    Args:
        x: ``[M, E]`` transformed hidden states of the masked slots, any float dtype.
        table: ``[V, E]`` word embeddings, dtype of x; both are cast to the autocast dtype if enabled.
        bias: ``[V]`` float32 or the dtype of x.
        targets: ``[M]`` original ids, int32 or int64.
        weights: ``[M]`` float32, not negative. A slot of weight 0 may contain anything; its sample and lse
            are 0.
        rng: int64 ``[2]`` = (seed, step).
        temperature: above 0; it applies to the samples only.
        disallow_correct: never draw the target.
        return_table: also return `table`, to pass to its next use. The gradient from there is added in the
            pass that scales this op's own, which saves an addition of whole tables.

    Returns:
        MLMHead(loss, samples ``[M]`` dtype of targets, correct, lse ``[M]``, table). Only loss and table
        carry a gradient. `correct` is the weighted count of slots whose arg-max (the lowest id in a tie) is
        the target.

    Raises:
        TypeError, ValueError: an argument breaks these rules; the message names it.
        IndexError: a target is outside [0, V) (CPU only; on CUDA the loss becomes NaN).
    """
    check.tensor(OP, "x", x, check.FLOATS, (None, None))
    M, E = x.shape
    check.tensor(OP, "table", table, check.FLOATS, (None, E), x)
    cast_x, cast_table = autocast(x[:0], table[:0])
    check.tensor(OP, "table", cast_table, (cast_x.dtype,))
    V = table.shape[0]
    if V < 1:
        raise ValueError(must("mlm_head: table", "have at least one row", f"shape {list(table.shape)}"))
    check.tensor(OP, "bias", bias, (*check.FLOAT32, cast_x.dtype), (V,), x)
    check.tensor(OP, "targets", targets, check.INTS, (M,), x)
    check.tensor(OP, "weights", weights, check.FLOAT32, (M,), x)
    check.rng(OP, rng, x)
    if not 0 < temperature < math.inf:
        raise ValueError(must("mlm_head: temperature", "be positive and finite", temperature))
    if disallow_correct and V < 2:
        rule = "be False if the vocabulary has one token"
        raise ValueError(must("mlm_head: disallow_correct", rule, True))
    x, table, *rest = check.contiguous(x, table, bias, targets, weights, rng)
    rest = [*rest, temperature, disallow_correct]
    wanted = [torch.is_grad_enabled() and t.requires_grad for t in (x, table, bias)]
    if any(wanted):
        *head, output_table = _MLMHead.apply(kernels, cast_x.dtype, x, table, *rest, *wanted[:2])
        table = output_table if wanted[1] else table
    else:
        head = kernels.fwd(*autocast(x, table), *rest)
    return MLMHead(*head, table if return_table else None)
