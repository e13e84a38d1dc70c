"""The public function of an op: the same checks and autograd over any implementation of its operators."""

import functools
import inspect
from collections.abc import Callable
from typing import NamedTuple

import torch

from electra_fast.ops._operators import OPERATORS, Implementations
from electra_fast.ops._transforms import refuse_transforms


class Kernels(NamedTuple):
    """One implementation of an op: what its public function and its autograd function call."""

    fwd: Callable
    bwd: Callable | None = None


def public(fwd: torch._ops.OpOverload, bwd: torch._ops.OpOverload | None = None) -> Callable:
    """Turn `function(kernels, …)` into the public op over these two operators.

    The result has the signature without `kernels`. Its `over(kernels)` is the same function, with checks and
    autograd, over another implementation, so that a test or a benchmark can choose one kernel.
    """

    def decorate(function: Callable) -> Callable:
        signature = inspect.signature(function)
        signature = signature.replace(parameters=list(signature.parameters.values())[1:])

        def over(kernels: Kernels) -> Callable:
            @functools.wraps(function)
            def op(*args, **kwargs):
                refuse_transforms(function.__name__, args, kwargs)
                return function(kernels, *args, **kwargs)

            op.__signature__ = signature
            return op

        result = over(Kernels(fwd, bwd))
        result.over = over
        return result

    return decorate


def implementations(name: str, function: Callable) -> dict[str, Callable]:
    """Return each implementation of a public op that this installation has, by its name."""
    fwd, bwd = (name, None) if name in OPERATORS else (f"{name}_fwd", f"{name}_bwd")

    def over(kind: str) -> Callable:
        return function.over(Kernels(*(getattr(OPERATORS[op], kind) if op else None for op in (fwd, bwd))))

    kinds = [kind for kind in Implementations._fields if kind != "serving"]
    return {kind: over(kind) for kind in kinds if getattr(OPERATORS[fwd], kind)}
