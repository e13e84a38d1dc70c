"""The product with a layer's weights: one operator per direction, gradients in the dtype of the weights.

`F.linear` and its backward pass are a dozen of PyTorch's operators, most of which only transpose or reshape;
they were more than half of all operators in a step of ELECTRA-small. Autocast casts a weight in every forward
and its rounded gradient in every backward. Low-precision copies, cast once per update, save both.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from electra_fast.dtypes import autocast
from electra_fast.errors import must
from electra_fast.ops import _check as check
from electra_fast.ops._operators import operator
from electra_fast.ops._public import Kernels, public
from electra_fast.ops._transforms import once_differentiable

OP = "linear"


def _default_bwd(dy, x, weight, dtype, want_dx, want_dweight, want_dbias):
    rows, none = dy[None].flatten(0, -2), x.new_empty(0)
    dx = dy @ weight if want_dx else none
    dweight = (rows.t() @ x[None].flatten(0, -2)).to(dtype) if want_dweight else none
    return dx, dweight, rows.sum(0, dtype=dtype) if want_dbias else none


def _fake_bwd(dy, x, weight, dtype, want_dx, want_dweight, want_dbias):
    none = x.new_empty(0)
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format) if want_dx else none,
        weight.new_empty(weight.shape, dtype=dtype) if want_dweight else none,
        weight.new_empty(weight.shape[:1], dtype=dtype) if want_dbias else none,
    )


_fwd = operator(
    "linear_fwd(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    default=lambda x, weight, bias: F.linear(x, weight, bias),
    fake=lambda x, weight, bias: x.new_empty((*x.shape[:-1], weight.shape[0])),
)
_bwd = operator(
    "linear_bwd(Tensor dy, Tensor x, Tensor weight, ScalarType dtype, bool want_dx, bool want_dweight, "
    "bool want_dbias) -> (Tensor, Tensor, Tensor)",
    default=_default_bwd,
    fake=_fake_bwd,
)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kernels, x, weight, bias, low_weight, low_bias):
        low_weight = weight if low_weight is None else low_weight
        ctx.save_for_backward(x, low_weight, weight)
        ctx.kernels, ctx.dtype = kernels, weight.dtype
        ctx.set_materialize_grads(False)
        return kernels.fwd(x, low_weight, bias if low_bias is None else low_bias)

    @staticmethod
    @once_differentiable(OP)
    def backward(ctx, dy):
        if dy is None:
            return (None,) * 6
        wanted = ctx.needs_input_grad[1:4]
        gradients = ctx.kernels.bwd(dy.contiguous(), *ctx.saved_tensors[:2], ctx.dtype, *wanted)
        return None, *(g if want else None for g, want in zip(gradients, wanted, strict=True)), None, None


@public(_fwd, _bwd)
def linear(
    kernels: Kernels,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    low_weight: Tensor | None = None,
    low_bias: Tensor | None = None,
) -> Tensor:
    """Return x weight^T + bias.

    Args:
        x: ``[..., K]``, any float dtype; cast to the dtype of `low_weight`, or without it to the autocast
            dtype if enabled.
        weight: ``[N, K]``, dtype of x, or any float dtype if `low_weight` is given.
        bias: ``[N]``, dtype of weight, or None.
        low_weight, low_bias: copies of weight and bias in another dtype, used for the product. The gradients
            go to weight and bias, in their dtype.

    Returns:
        ``[..., N]``, in the dtype of the product.

    Raises:
        TypeError, ValueError: an argument breaks these rules; the message names it.
    """
    check.tensor(OP, "x", x, check.FLOATS)
    check.tensor(OP, "weight", weight, check.FLOATS, (None, x.shape[-1]), x)
    check.optional(OP, "bias", bias, (weight.dtype,), weight.shape[:1], x)
    if low_weight is None:
        x, weight, *bias = autocast(x, weight, *([] if bias is None else [bias]))
        bias = bias[0] if bias else None
        check.tensor(OP, "weight", weight, (x.dtype,))
    else:
        check.tensor(OP, "low_weight", low_weight, check.FLOATS, weight.shape, x)
        if (bias is None) != (low_bias is None):
            got = "only one of the two biases"
            raise ValueError(must(f"{OP}: low_bias", "be given if and only if bias is", got))
        check.optional(OP, "low_bias", low_bias, (low_weight.dtype,), weight.shape[:1], x)
        x = x.to(low_weight.dtype)
    return _Linear.apply(kernels, x.contiguous(), weight, bias, low_weight, low_bias)
