"""`add_norm` built from the LayerNorm of Liger, in Triton, and of quack, in CuTe.

Neither adds the residual or has dropout, so torch does both before it.
"""

import torch
import torch.nn.functional as F

from benchmarks.rivals import gpu, needs, package


@needs(gpu, package("liger_kernel"))
def liger(x, residual, weight, bias, *, eps, dropout=0.0, rng=None, stream=0):
    from liger_kernel.transformers.functional import liger_layer_norm

    return liger_layer_norm(F.dropout(x, dropout) + residual, weight, bias, eps)


class QuackLayerNorm(torch.autograd.Function):
    """quack has both passes of LayerNorm as functions of rows, with weights in float32."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        from quack.rmsnorm import layernorm_fwd

        rows, weight, bias = x.flatten(0, -2), weight.float(), bias.float()
        y, rstd, mean = layernorm_fwd(rows, weight, bias, eps, return_rstd=True, return_mean=True)
        ctx.save_for_backward(rows, weight, rstd, mean)
        return y.view(x.shape)

    @staticmethod
    def backward(ctx, dy):
        from quack.rmsnorm import layernorm_bwd

        rows, weight, rstd, mean = ctx.saved_tensors
        dx, dweight, dbias = layernorm_bwd(rows, weight, dy.flatten(0, -2).contiguous(), rstd, mean)
        return dx.view(dy.shape), dweight.to(dy.dtype), dbias.to(dy.dtype), None


@needs(gpu, package("quack"))
def quack(x, residual, weight, bias, *, eps, dropout=0.0, rng=None, stream=0):
    return QuackLayerNorm.apply(F.dropout(x, dropout) + residual, weight, bias, eps)


RIVALS = {"liger": liger, "quack": quack}
