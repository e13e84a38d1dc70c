"""The public function of an op: the same checks and autograd over any implementation of its operators.

A call has two paths with the same result. csrc/calls serves the common calls of the ops that a layer is made
of; for all other calls, wrong ones included, it returns NotImplemented. The path in Python accepts every call
and raises the errors.
"""

import functools
import inspect
from collections.abc import Callable
from typing import NamedTuple

import torch

from electra_fast.ops._operators import _C, OPERATORS, Implementations
from electra_fast.ops._transforms import SECOND_DERIVATIVE, refusal, refuse_transforms


class Kernels(NamedTuple):
    """One implementation of an op: what its public function and its autograd function call."""

    fwd: Callable
    bwd: Callable | None = None


def public(fwd: torch._ops.OpOverload, bwd: torch._ops.OpOverload | None = None) -> Callable:
    """Turn `function(kernels, …)` into the public op over these two operators.

    The result has the signature without `kernels`. Its `over(kernels)` is the same function, with checks and
    autograd, over another implementation, so that a test or a benchmark can choose one kernel. Its two paths
    are `in_cpp(args, kwargs)`, None if there is no such path, and `in_python`.
    """
    default = Kernels(fwd, bwd)

    def decorate(function: Callable) -> Callable:
        signature = inspect.signature(function)
        signature = signature.replace(parameters=list(signature.parameters.values())[1:])

        def in_python_over(kernels: Kernels) -> Callable:
            @functools.wraps(function)
            def op(*args, **kwargs):
                refuse_transforms(function.__name__, args, kwargs)
                return function(kernels, *args, **kwargs)

            op.__signature__ = signature
            return op

        in_python = in_python_over(default)
        in_cpp = _in_cpp(function.__name__, signature)

        @functools.wraps(in_python)
        def op(*args, **kwargs):
            if in_cpp is not None and not torch.compiler.is_compiling():
                result = in_cpp(args, kwargs)
                if result is not NotImplemented:
                    return result
            return in_python(*args, **kwargs)

        op.in_cpp, op.in_python = in_cpp, in_python
        op.over = lambda kernels: op if kernels == default else in_python_over(kernels)
        return op

    return decorate


def _in_cpp(name: str, signature: inspect.Signature) -> Callable | None:
    if _C is None or name not in _C.calls():
        return None
    parameters = signature.parameters.values()
    positional = sum(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    sentence = str(refusal(name, SECOND_DERIVATIVE))
    return _C.bind(name, tuple(signature.parameters), positional, defaults, sentence)


def implementations(name: str, function: Callable) -> dict[str, Callable]:
    """Return each implementation of a public op that this installation has, by its name."""
    fwd, bwd = (name, None) if name in OPERATORS else (f"{name}_fwd", f"{name}_bwd")

    def over(kind: str) -> Callable:
        return function.over(Kernels(*(getattr(OPERATORS[op], kind) if op else None for op in (fwd, bwd))))

    kinds = [kind for kind in Implementations._fields if kind != "serving"]
    return {kind: over(kind) for kind in kinds if getattr(OPERATORS[fwd], kind)}
