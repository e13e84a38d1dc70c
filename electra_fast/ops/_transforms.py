"""PyTorch's transformations that the ops do not support: each is refused with its name and a remedy."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

SECOND_DERIVATIVE = "the second derivative (`create_graph=True`)"


def refusal(op: str, what: str) -> NotImplementedError:
    return NotImplementedError(
        f"{op}: {what} is not implemented; plain PyTorch supports it: electra_fast.reference.{op}, a model "
        "built with `ops=REFERENCE`, or a patched model after `undo()`"
    )


def once_differentiable(op: str) -> Callable:
    """Wrap the `backward` of an op so that a second derivative raises NotImplementedError.

    PyTorch's decorator of this name looks only at the incoming gradient. If that is a constant, or if
    `torch.autograd.grad` is called for some of the tensors, the second derivative is dropped silently. Here
    the gradients also depend on the saved tensors, so `forward` must save every input that they depend on.
    """

    def decorate(backward: Callable) -> Callable:
        @functools.wraps(backward)
        def wrapper(ctx, *args):
            with torch.no_grad():
                gradients = backward(ctx, *args)
            if torch.compiler.is_compiling() or not torch.is_grad_enabled():
                return gradients
            return _Gradient.apply(op, len(gradients), *gradients, *args, *ctx.saved_tensors)

        return wrapper

    return decorate


class _Gradient(torch.autograd.Function):
    """The first `count` tensors, the gradients of an op, as a function of the other tensors."""

    @staticmethod
    def forward(ctx, op, count, *tensors):
        ctx.op = op
        return tensors[:count]

    @staticmethod
    def backward(ctx, *_):
        raise refusal(ctx.op, SECOND_DERIVATIVE)


def refuse_transforms(op: str, args: tuple, kwargs: dict) -> None:
    """Refuse a call under vmap, or with tensors that carry a tangent: a kernel would silently ignore both.

    Raises:
        NotImplementedError: `torch.func.vmap`, `grad`, `vjp`, `jvp` or the like is active, or an argument is
            a dual tensor of forward-mode differentiation.
    """
    if torch._C._are_functorch_transforms_active():
        raise refusal(op, "torch.func (vmap, grad, vjp, jvp, …)")
    if forward_ad._current_level >= 0 and any(
        forward_ad.unpack_dual(x).tangent is not None
        for x in (*args, *kwargs.values())
        if isinstance(x, Tensor)
    ):
        raise refusal(op, "forward-mode differentiation")


def distinct(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return the tensors without repeated objects, which torch.compile refuses in an autograd.Function."""
    seen: list[Tensor] = []
    for x in tensors:
        twice = x is not None and any(x is other for other in seen)
        seen.append(x.view_as(x) if twice else x)
    return tuple(seen)
