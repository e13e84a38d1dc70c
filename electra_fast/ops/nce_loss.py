"""The loss of noise-contrastive estimation and its confusion counts."""

import math

import torch
from torch import Tensor

from electra_fast import reference
from electra_fast.dtypes import wide
from electra_fast.errors import must
from electra_fast.ops import _check as check
from electra_fast.ops._operators import operator
from electra_fast.ops._public import Kernels, public
from electra_fast.ops._transforms import once_differentiable
from electra_fast.ops.rtd_loss import default_bwd, fake_fwd
from electra_fast.reference import NCELoss

OP = "nce_loss"
INPUTS = "Tensor x, Tensor q, Tensor y, Tensor? w, float log_odds"


def _default_bwd(dloss, counts, x, q, y, w, log_odds):
    return default_bwd(dloss, counts, wide(x) + q + log_odds, y, w).to(x.dtype)


_fwd = operator(
    f"nce_loss_fwd({INPUTS}) -> (Tensor, Tensor)",
    default=lambda x, q, y, w, log_odds: tuple(reference.nce_loss(x, q, y, w, log_odds=log_odds)),
    fake=fake_fwd,
    triton="nce_loss:nce_loss_fwd",
)
_bwd = operator(
    f"nce_loss_bwd(Tensor dloss, Tensor counts, {INPUTS}) -> Tensor",
    default=_default_bwd,
    fake=lambda dloss, counts, x, *_: torch.empty_like(x),
    triton="nce_loss:nce_loss_bwd",
)


class _NCELoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kernels, x, q, y, w, log_odds):
        loss, counts = kernels.fwd(x, q, y, w, log_odds)
        ctx.kernels, ctx.log_odds = kernels, log_odds
        ctx.save_for_backward(counts, x, q, y, w)
        ctx.mark_non_differentiable(counts)
        return loss, counts

    @staticmethod
    @once_differentiable(OP)
    def backward(ctx, dloss, _):
        return None, ctx.kernels.bwd(dloss, *ctx.saved_tensors, ctx.log_odds), None, None, None, None


@public(_fwd, _bwd)
def nce_loss(
    kernels: Kernels,
    energies: Tensor,
    log_q: Tensor,
    noise: Tensor,
    weights: Tensor | None = None,
    *,
    log_odds: float = 0.0,
) -> NCELoss:
    """Return the weighted mean loss of binary noise-contrastive estimation (Clark et al. 2020b, section 2).

    The model's probability of a token is exp(-energy), so the log odds of "is noise" against "is data" are

        logit_t = energies_t + log_q_t + log_odds

    and ``loss = sum_t w_t softplus(s_t logit_t) / sum_t w_t`` with s = -1 for noise, else 1 (Ma and Collins
    2018); 0 if the weights sum to 0.

    Args:
        energies: ``[...]`` float32, float16 or bfloat16 (float64 without a GPU); one per token.
        log_q: float32, same shape; the log-probability of the token under the noise distribution. It gets no
            gradient. With -inf the token is surely data: its loss is 0, and inf if it is noise.
        noise: bool, same shape; True where the token was drawn from the noise distribution.
        weights: float32, same shape, not negative; 0 on a token that does not count, whose energy and log_q
            may be anything, NaN too. None: every weight is 1.
        log_odds: log(k / (n - k)) for k noise tokens per n; finite. If it differs between tokens, add it to
            log_q instead.

    Returns:
        NCELoss(loss, counts): float32 scalar, the only field with a gradient, which goes to the energies;
        float32 ``[4]`` = weighted true positives, false positives, false negatives, true negatives;
        logit > 0 predicts "noise".

    Raises:
        TypeError, ValueError: an argument breaks these rules; the message names it.

    Note:
        Deterministic: the sums have a fixed order. Finite wherever the true loss is, if the logits are finite
        in float32 or infinite; -inf + inf is NaN.
    """
    check.tensor(OP, "energies", energies, check.FLOATS)
    check.tensor(OP, "log_q", log_q, check.FLOAT32, energies.shape, energies)
    check.tensor(OP, "noise", noise, check.BOOL, energies.shape, energies)
    check.optional(OP, "weights", weights, check.FLOAT32, energies.shape, energies)
    if not -math.inf < log_odds < math.inf:
        raise ValueError(must(f"{OP}: log_odds", "be finite", log_odds))
    x, q, y, w = (None if t is None else t.flatten().contiguous() for t in (energies, log_q, noise, weights))
    return NCELoss(*_NCELoss.apply(kernels, x, q, y, w, log_odds))
