"""Dropout, residual and LayerNorm, at the end of both halves of an encoder layer."""

import torch
from torch import Tensor

from electra_fast.dtypes import wide, wide_dtype
from electra_fast.ops import _check as check
from electra_fast.ops._operators import operator
from electra_fast.ops._public import Kernels, public
from electra_fast.ops._transforms import distinct, once_differentiable
from electra_fast.philox import drop

OP = "add_norm"


def _sum(x, residual, dropout, rng, stream):
    z = drop(wide(x), dropout, rng, stream)
    return z if residual is None else z + wide(residual)


def _default_fwd(x, residual, weight, bias, eps, dropout, rng, stream):
    z = _sum(x, residual, dropout, rng, stream)
    y, mean, rstd = torch.native_layer_norm(z, z.shape[-1:], weight.to(z.dtype), bias.to(z.dtype), eps)
    return y.to(x.dtype), mean[..., 0], rstd[..., 0]


def _default_bwd(dy, x, residual, weight, mean, rstd, dropout, rng, stream):
    z = _sum(x, residual, dropout, rng, stream)
    w, stats = weight.to(z.dtype), (mean[..., None], rstd[..., None])
    dz, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
        wide(dy), z, z.shape[-1:], *stats, w, w, [True] * 3
    )
    dx = drop(dz, dropout, rng, stream).to(x.dtype)
    dresidual = dz.to(residual.dtype) if _separate_gradient(residual, dropout) else x.new_empty(0)
    return dx, dresidual, dweight.to(weight.dtype), dbias.to(weight.dtype)


def _separate_gradient(residual: Tensor | None, dropout: float) -> bool:
    """Return whether the residual's gradient differs from that of x; without dropout they are equal."""
    return residual is not None and dropout > 0


def _fake_fwd(x, residual, weight, bias, eps, dropout, rng, stream):
    mean, rstd = (x.new_empty(x.shape[:-1], dtype=wide_dtype(x)) for _ in range(2))
    return x.new_empty(x.shape), mean, rstd


def _fake_bwd(dy, x, residual, weight, mean, rstd, dropout, rng, stream):
    dresidual = residual.new_empty(x.shape) if _separate_gradient(residual, dropout) else x.new_empty(0)
    return x.new_empty(x.shape), dresidual, torch.empty_like(weight), torch.empty_like(weight)


_fwd = operator(
    "add_norm_fwd(Tensor x, Tensor? residual, Tensor weight, Tensor bias, float eps, float dropout, "
    "Tensor? rng, SymInt stream) -> (Tensor, Tensor, Tensor)",
    default=_default_fwd,
    fake=_fake_fwd,
    triton="add_norm:add_norm_fwd",
)
_bwd = operator(
    "add_norm_bwd(Tensor dy, Tensor x, Tensor? residual, Tensor weight, Tensor mean, Tensor rstd, "
    "float dropout, Tensor? rng, SymInt stream) -> (Tensor, Tensor, Tensor, Tensor)",
    default=_default_bwd,
    fake=_fake_bwd,
    triton="add_norm:add_norm_bwd",
)


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kernels, x, residual, weight, bias, eps, dropout, rng, stream):
        y, mean, rstd = kernels.fwd(x, residual, weight, bias, eps, dropout, rng, stream)
        ctx.save_for_backward(x, residual, weight, mean, rstd, rng)
        ctx.kernels, ctx.dropout, ctx.stream = kernels, dropout, stream
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    @once_differentiable(OP)
    def backward(ctx, dy):
        if dy is None:
            return (None,) * len(ctx.needs_input_grad)
        *saved, rng = ctx.saved_tensors
        residual = saved[1]
        dx, dresidual, dweight, dbias = ctx.kernels.bwd(dy.contiguous(), *saved, ctx.dropout, rng, ctx.stream)
        if residual is None:
            dresidual = None
        elif not _separate_gradient(residual, ctx.dropout):
            dresidual = dx
        return None, dx, dresidual, dweight, dbias, None, None, None, None


@public(_fwd, _bwd)
def add_norm(
    kernels: Kernels,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float,
    dropout: float = 0.0,
    rng: Tensor | None = None,
    stream: int = 0,
) -> Tensor:
    """Return LayerNorm(residual + dropout(x)) over the last axis (Devlin et al. 2019, post-LayerNorm).

    Args:
        x: ``[..., W]``, any float dtype.
        residual: shape and dtype of x, or None.
        weight, bias: ``[W]``, float32 or the dtype of x.
        eps: added to the variance, 0 or more.
        dropout: probability in [0, 1) that an element of x becomes 0; `rng` is needed if it is above 0.
        rng: int64 ``[2]`` = (seed, step).
        stream: the number of this use of dropout, in [0, 2^32).

    Returns:
        shape and dtype of x.

    Raises:
        TypeError, ValueError: an argument breaks these rules; the message names it.
    """
    check.tensor(OP, "x", x, check.FLOATS)
    check.optional(OP, "residual", residual, (x.dtype,), x.shape, x)
    check.tensor(OP, "weight", weight, (torch.float32, x.dtype), x.shape[-1:], x)
    check.tensor(OP, "bias", bias, (weight.dtype,), x.shape[-1:], x)
    check.eps(OP, eps)
    check.dropout(OP, dropout, rng, stream, x)
    x, residual, weight, bias, rng = check.contiguous(x, residual, weight, bias, rng)
    x, residual = distinct(x, residual)
    return _AddNorm.apply(kernels, x, residual, weight, bias, eps, dropout, rng, stream)
