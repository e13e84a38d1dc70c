"""The generator's head: tied vocabulary projection, its loss, and one sample a masked slot."""

import math

import torch
from torch import Tensor

from electra_fast import reference
from electra_fast.ops import _check as check
from electra_fast.ops._register import Kernels, operator, public
from electra_fast.ops._transforms import once_differentiable
from electra_fast.reference import MLMHead, wide

OP = "mlm_head"


def _default_fwd(x, table, bias, targets, weights, rng, temperature, disallow_correct):
    options = {"temperature": temperature, "disallow_correct": disallow_correct}
    return reference.mlm_head(x, table, bias, targets, weights, rng, **options)[:4]


def _default_bwd(x, table, bias, targets, weights, rng, temperature, disallow_correct, want_dx, want_dtable):
    """With P = softmax(logits): dlogits = w / sum(w) * (P - onehot(target)).

    A kernel takes exp(logits - lse) for P and needs no second sum; here nothing is saved by its rounding.
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
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    loss, lse = x.new_empty((), dtype=wide), x.new_empty(x.shape[:1], dtype=wide)
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
# The gradient needs nothing but what the forward pass has at hand, so it is made in the same sweep: three
# products where a backward pass that computes the logits again takes four. Float32 of a loss whose own
# gradient is 1; in float16 it would underflow before the loss's scale is known.
_bwd = operator(
    f"mlm_head_bwd({_ARGUMENTS}, bool want_dx, bool want_dtable) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    default=_default_bwd,
    fake=_fake_bwd,
    triton="mlm_head:mlm_head_bwd",
    triton_first=True,
)


class _MLMHead(torch.autograd.Function):
    """(*head, table): the table goes through, so that its gradient from elsewhere comes to `backward`."""

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
        *_, more = rest
        if dloss is None:
            return None, None, None, more, *[None] * 8

        def scaled(gradient, more):
            return gradient * dloss if more is None else torch.addcmul(more, gradient, dloss)

        each = zip(
            ctx.saved_tensors[:3], (None, more, None), ctx.dtypes, ctx.needs_input_grad[2:5], strict=True
        )
        gradients = (scaled(g, m).to(dtype) if needed else None for g, m, dtype, needed in each)
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
    """Return the masked-language-model loss and a draw a slot from the generator (Clark et al. 2020, eq. 1).

    ``logits = x table^T + bias``; ``loss = sum_m w_m (lse_m - logits[m, target_m]) / sum_m w_m``, 0 where the
    weights sum to 0. The sample is the inverse CDF in vocabulary order of softmax(logits / temperature) at
    one uniform a slot.

    Args:
        x: ``[M, E]`` transformed hidden states of the masked slots, any float dtype.
        table: ``[V, E]`` word embeddings, dtype of x; where autocast is enabled both are cast to its dtype.
        bias: ``[V]`` float32 or the dtype of x.
        targets: ``[M]`` original ids, int32 or int64.
        weights: ``[M]`` float32. A slot of weight 0 may hold anything; its sample and its lse are 0 and mean
            nothing.
        rng: int64 ``[2]`` = (seed, step).
        temperature: above 0; of the sample only.
        disallow_correct: never draw the target; of the sample only.
        return_table: also return `table`, for its next user: the gradient that it gets there is added to in
            the pass that scales this one's.

    Returns:
        MLMHead(loss, samples ``[M]`` dtype of targets, correct, lse ``[M]``, table). Only the loss, and the
        table where it was asked for, carry a gradient. `correct` is the weighted count of slots whose arg-max
        (the lowest id in a tie) is the target.

    Raises:
        TypeError, ValueError: an argument breaks these rules. IndexError: a target outside [0, V), on the
            CPU; on CUDA the loss becomes NaN.
    """
    check.tensor(OP, "x", x, check.FLOATS, (None, None))
    M, E = x.shape
    check.tensor(OP, "table", table, check.FLOATS, (None, E), x)
    cast_x, cast_table = reference.autocast(x[:0], table[:0])
    check.tensor(OP, "table", cast_table, (cast_x.dtype,))
    V = table.shape[0]
    if V < 1:
        raise ValueError(f"mlm_head: table must have at least one row, got shape {list(table.shape)}")
    check.tensor(OP, "bias", bias, (*check.FLOAT32, cast_x.dtype), (V,), x)
    check.tensor(OP, "targets", targets, check.INTS, (M,), x)
    check.tensor(OP, "weights", weights, check.FLOAT32, (M,), x)
    check.rng(OP, rng, x)
    if not 0 < temperature < math.inf:
        raise ValueError(f"mlm_head: temperature must be positive and finite, got {temperature}")
    if disallow_correct and V < 2:
        raise ValueError(
            "mlm_head: disallow_correct must be False where the vocabulary has one token, got True"
        )
    x, table, *rest = check.contiguous(x, table, bias, targets, weights, rng)
    rest = [*rest, temperature, disallow_correct]
    wanted = [torch.is_grad_enabled() and t.requires_grad for t in (x, table, bias)]
    if any(wanted):
        *head, through = _MLMHead.apply(kernels, cast_x.dtype, x, table, *rest, *wanted[:2])
        table = through if wanted[1] else table
    else:
        head = kernels.fwd(*reference.autocast(x, table), *rest)
    return MLMHead(*head, table if return_table else None)
