"""The loss of replaced-token detection and its confusion counts."""

import torch
from torch import Tensor

from electra_fast import reference
from electra_fast.dtypes import wide, wide_dtype
from electra_fast.ops import _check as check
from electra_fast.ops._operators import operator
from electra_fast.ops._public import Kernels, public
from electra_fast.ops._transforms import once_differentiable
from electra_fast.reference import RTDLoss

OP = "rtd_loss"


def default_bwd(dloss, counts, x, y, w):
    total = counts.sum()
    total = total.masked_fill(total == 0, 1)
    sign = 1 - 2 * y.to(dloss.dtype)
    dx = dloss * sign * torch.sigmoid(sign * wide(x))
    # The reciprocal of a sum of weights below 3e-39 would be infinite.
    return (dx / total if w is None else (dx * (w / total)).masked_fill(w == 0, 0)).to(x.dtype)


def fake_fwd(x, *_):
    return x.new_empty((), dtype=wide_dtype(x)), x.new_empty(4, dtype=torch.float32)


_fwd = operator(
    "rtd_loss_fwd(Tensor x, Tensor y, Tensor? w) -> (Tensor, Tensor)",
    default=lambda x, y, w: tuple(reference.rtd_loss(x, y, w)),
    fake=fake_fwd,
    triton="rtd_loss:rtd_loss_fwd",
)
_bwd = operator(
    "rtd_loss_bwd(Tensor dloss, Tensor counts, Tensor x, Tensor y, Tensor? w) -> Tensor",
    default=default_bwd,
    fake=lambda dloss, counts, x, y, w: torch.empty_like(x),
    triton="rtd_loss:rtd_loss_bwd",
)


class _RTDLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kernels, x, y, w):
        loss, counts = kernels.fwd(x, y, w)
        ctx.kernels = kernels
        ctx.save_for_backward(counts, x, y, w)
        ctx.mark_non_differentiable(counts)
        return loss, counts

    @staticmethod
    @once_differentiable(OP)
    def backward(ctx, dloss, _):
        return None, ctx.kernels.bwd(dloss, *ctx.saved_tensors), None, None


@public(_fwd, _bwd)
def rtd_loss(kernels: Kernels, logits: Tensor, replaced: Tensor, weights: Tensor | None = None) -> RTDLoss:
    """Return the weighted mean sigmoid cross-entropy of "was replaced" (Clark et al. 2020, L_Disc).

    ``loss = sum_t w_t softplus(s_t x_t) / sum_t w_t`` with s = -1 where replaced, else 1; 0 if the weights
    sum to 0.

    Args:
        logits: ``[...]`` float32, float16 or bfloat16 (float64 without a GPU); one discriminator logit per
            token.
        replaced: bool, same shape; True where the token is not the original one.
        weights: float32, same shape, not negative; 0 on padding, whose logit may be anything. None: every
            weight is 1.

    Returns:
        RTDLoss(loss, counts): float32 scalar, the only field with a gradient; float32 ``[4]`` = weighted true
        positives, false positives, false negatives, true negatives; logit > 0 predicts "replaced".

    Raises:
        TypeError, ValueError: an argument breaks these rules; the message names it.

    Note:
        Deterministic: the sums have a fixed order. Finite wherever the true loss is, also at infinite logits.
    """
    check.tensor(OP, "logits", logits, check.FLOATS)
    check.tensor(OP, "replaced", replaced, check.BOOL, logits.shape, logits)
    check.optional(OP, "weights", weights, check.FLOAT32, logits.shape, logits)
    x, y, w = (None if t is None else t.flatten().contiguous() for t in (logits, replaced, weights))
    return RTDLoss(*_RTDLoss.apply(kernels, x, y, w))
