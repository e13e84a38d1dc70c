"""Kernels that no op uses yet, each with the signature of what it would replace.

A candidate is tested and raced like an op. If it is faster on a GPU it becomes one, otherwise it is removed.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from benchmarks.harness.gate import Errors, Results
from electra_fast import testing
from electra_fast.ops._operators import _lazy
from electra_fast.testing import Example
from electra_fast.testing.budget import judge

linear_gelu_fwd, linear_gelu_bwd = (_lazy(f"_linear_gelu:linear_gelu_{way}") for way in ("fwd", "bwd"))


class _LinearGELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, backward):
        y, h = linear_gelu_fwd(x, weight, bias, backward)
        ctx.save_for_backward(x, weight, bias, h)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return *linear_gelu_bwd(dy.contiguous(), *ctx.saved_tensors), None


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return gelu(x weight^T + bias), the erf form: x ``[.., K]``, weight ``[N, K]``, bias ``[N]``."""
    backward = torch.is_grad_enabled() and any(y.requires_grad for y in (x, weight, bias))
    return _LinearGELU.apply(x.contiguous(), weight.contiguous(), bias.contiguous(), backward)


def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return the same by plain PyTorch: in float64 the definition, else the scale of the error budget."""
    return F.gelu(F.linear(x, weight, bias))


class LinearGELUGate:
    """Checks functions on one example. Its op is `linear`, which has the same arguments and one result."""

    def __init__(self, args: dict[str, Tensor], gradients: tuple[str, ...]):
        self.example = Example("linear", "linear_gelu", args, gradients)

    @functools.cached_property
    def definition(self) -> tuple[Results, Results]:
        return testing.run(plain, self.example.to(torch.float64)), testing.run(plain, self.example)

    def check(self, function: Callable) -> Errors:
        """Return the errors of `function` over the error budget; raise AssertionError for one above 1."""
        errors: Errors = {}
        got, ref, low = testing.run(function, self.example), *self.definition
        for kind, (prefix, factor) in enumerate((("", 2.0), ("gradient of ", 3.0))):
            assert got[kind].keys() == ref[kind].keys(), f"{prefix}{', '.join(got[kind])} only"
            for name in ref[kind]:
                title = f"{prefix}{name}"
                judgement = judge(title, *(results[kind][name] for results in (got, ref, low)), factor)
                assert not judgement.why, judgement.why
                errors[title] = (judgement.ratio, 1.0)
        return errors
