"""Bias and GELU, in the middle of the feed-forward network and of both heads."""

import torch
from torch import Tensor

from electra_fast import reference
from electra_fast.dtypes import wide
from electra_fast.ops import _check as check
from electra_fast.ops._operators import operator
from electra_fast.ops._public import Kernels, public
from electra_fast.ops._transforms import once_differentiable

OP = "bias_gelu"


def _default_bwd(dy, x, bias):
    dz = torch.ops.aten.gelu_backward(wide(dy), wide(x) + wide(bias))
    return dz.to(x.dtype), dz[None].flatten(0, -2).sum(0).to(bias.dtype)


_fwd = operator(
    "bias_gelu_fwd(Tensor x, Tensor bias) -> Tensor",
    default=reference.bias_gelu,
    fake=lambda x, bias: torch.empty_like(x),
    triton="bias_gelu:bias_gelu_fwd",
)
_bwd = operator(
    "bias_gelu_bwd(Tensor dy, Tensor x, Tensor bias) -> (Tensor, Tensor)",
    default=_default_bwd,
    fake=lambda dy, x, bias: (torch.empty_like(x), torch.empty_like(bias)),
    triton="bias_gelu:bias_gelu_bwd",
)


class _BiasGELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kernels, x, bias):
        ctx.kernels = kernels
        ctx.save_for_backward(x, bias)
        ctx.set_materialize_grads(False)
        return kernels.fwd(x, bias)

    @staticmethod
    @once_differentiable(OP)
    def backward(ctx, dy):
        if dy is None:
            return (None,) * len(ctx.needs_input_grad)
        return None, *ctx.kernels.bwd(dy.contiguous(), *ctx.saved_tensors)


@public(_fwd, _bwd)
def bias_gelu(kernels: Kernels, x: Tensor, bias: Tensor) -> Tensor:
    """Return gelu(x + bias) = z Phi(z), the erf form (Hendrycks & Gimpel 2016), as BERT and ELECTRA use it.

    Args:
        x: ``[..., F]``, any float dtype.
        bias: ``[F]``, float32 or the dtype of x.

    Returns:
        shape and dtype of x.

    Raises:
        TypeError, ValueError: an argument breaks these rules; the message names it.

    Note:
        Implementations differ if x + bias is infinite. Compiled from csrc/, gelu is 0 at -inf and inf at inf,
        and its gradient is 0 and 1. Triton gives NaN at -inf and for both gradients. The reference, which is
        `F.gelu`, gives NaN at inf too.
    """
    check.tensor(OP, "x", x, check.FLOATS)
    check.tensor(OP, "bias", bias, (torch.float32, x.dtype), x.shape[-1:], x)
    return _BiasGELU.apply(kernels, x.contiguous(), bias.contiguous())
