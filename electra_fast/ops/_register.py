"""Declare one operator: its schema, what runs on each device, and what the compiler sees."""

import functools
import importlib
import importlib.util
import inspect
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from electra_fast.ops._transforms import refuse_transforms

OLDEST_GPU = (8, 0)
HAS_TRITON = importlib.util.find_spec("triton") is not None
if importlib.util.find_spec("electra_fast._C") is None:
    _C = None
    COMPILED: frozenset[tuple[str, str]] = frozenset()
else:  # an extension that was built and does not load is an error, not a reason to be slow
    try:
        from electra_fast import _C
    except ImportError as error:
        raise ImportError(
            f"electra_fast._C does not load beside torch {torch.__version__} (CUDA {torch.version.cuda}): it "
            "was built for another torch or CPU. Build it again, `pip install --no-build-isolation -e .`, or "
            f"delete electra_fast/_C*.so to do without. The loader says: {error}"
        ) from error

    COMPILED = frozenset(_C.implemented())


class SlowPathWarning(UserWarning):
    """An op runs on a GPU without a kernel for it."""


class Implementations(NamedTuple):
    """What can run one operator, by the arguments of its schema. None where there is no such thing."""

    reference: Callable
    cpu: Callable | None  # compiled from csrc/
    triton: Callable | None
    cuda: Callable | None  # compiled from csrc/
    serving: dict[str, str]  # device: what serves it there, in words; the reference is not named


class Kernels(NamedTuple):
    """One implementation of an op: what its public function and its autograd function call."""

    fwd: Callable
    bwd: Callable | None = None


OPERATORS: dict[str, Implementations] = {}


def _lazy(target: str) -> Callable:
    """Return a stand-in for "module:function" of `electra_fast.kernels` that imports it when first called."""
    module, function = target.split(":")

    @functools.cache
    def resolve() -> Callable:
        from electra_fast.kernels._cache_keys import fix_cache_keys

        fix_cache_keys(f"electra_fast.kernels.{module}")
        return getattr(importlib.import_module(f"electra_fast.kernels.{module}"), function)

    def launch(*args):
        x = _first_tensor(args)
        _refuse_old_gpu(x.device)
        with torch.cuda.device_of(x):  # Triton launches on the current device
            return resolve()(*args)

    return launch


@functools.cache
def _refuse_old_gpu(device: torch.device) -> None:
    if device.type != "cuda":
        return
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < OLDEST_GPU:
        raise NotImplementedError(
            f"electra_fast: a GPU must have compute capability 8.0 or more, got {major}.{minor}; "
            "Triton has no tensor-core path below. electra_fast.reference runs there"
        )


def _first_tensor(args: tuple) -> Tensor:
    return next(a for a in args if isinstance(a, Tensor))


@functools.cache
def _warn_slow(name: str, reason: str) -> None:
    warnings.warn(
        f"electra_fast: {name} runs without a kernel on this GPU: {reason}", SlowPathWarning, stacklevel=4
    )


def operator(
    schema: str,
    *,
    default: Callable,
    fake: Callable,
    triton: str | None = None,
    triton_first: bool = False,
) -> torch._ops.OpOverload:
    """Register `schema` in the electra_fast namespace and return its callable.

    `default` runs on any device without a kernel of its own, `triton` names the launcher for CUDA. A kernel
    compiled from csrc/ goes before either, unless Triton's is the faster one (`triton_first`): the compiled
    one then serves where Triton is not installed, and is otherwise the overload `<op>.compiled`, for
    comparison. PyTorch's dispatcher does the rest.
    """
    op, arguments = schema.split("(", 1)
    name = f"electra_fast::{op}"
    reason = why_not_triton(triton)

    def reference(*args):
        device = _first_tensor(args).device.type
        if device == "cuda":
            _warn_slow(op, reason)
        with torch.autocast(device, enabled=False):  # the definition says which dtype, not the caller
            return default(*args)

    torch.library.define(name, "(" + arguments)
    torch.library.impl(name, "CompositeExplicitAutograd", reference)
    torch.library.register_fake(name, fake)
    packet = getattr(torch.ops.electra_fast, op)
    compiled = {"CPU": (op, "CPU") in COMPILED, "CUDA": (op, "CUDA") in COMPILED}
    launcher = _lazy(triton) if triton and HAS_TRITON else None

    serving = {}
    for device, kernel in (("CPU", None), ("CUDA", launcher)):
        if compiled[device] and not (kernel and triton_first):
            _C.serve(op, device, op, device)
            serving[device] = "compiled from csrc/"
        elif kernel:
            torch.library.impl(name, device, kernel)
            serving[device] = "Triton"
    cuda = packet.default if compiled["CUDA"] else None
    if compiled["CUDA"] and serving["CUDA"] == "Triton":
        torch.library.define(f"{name}.compiled", "(" + arguments)
        _C.serve(op, "CUDA", f"{op}.compiled", "CUDA")
        cuda = packet.compiled
    OPERATORS[op] = Implementations(
        reference=reference,
        cpu=packet.default if compiled["CPU"] else None,
        triton=launcher,
        cuda=cuda,
        serving=serving,
    )
    return packet.default


def why_not_triton(triton: str | None) -> str:
    if triton is None:
        return "it has no kernel yet, plain PyTorch serves it"
    return "" if HAS_TRITON else "Triton is not installed (pip install triton), plain PyTorch serves it"


def public(fwd: torch._ops.OpOverload, bwd: torch._ops.OpOverload | None = None) -> Callable:
    """Turn `function(kernels, …)` into the public op over these two operators.

    The result has the signature without `kernels`; its `over(kernels)` is the same function, checks and
    autograd included, over another implementation. So a test or a benchmark holds one kernel at a time.
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
    """Return each implementation of a public op that this installation has, by name."""
    fwd, bwd = (name, None) if name in OPERATORS else (f"{name}_fwd", f"{name}_bwd")

    def over(kind: str) -> Callable:
        return function.over(Kernels(*(getattr(OPERATORS[op], kind) if op else None for op in (fwd, bwd))))

    kinds = [kind for kind in Implementations._fields if kind != "serving"]
    return {kind: over(kind) for kind in kinds if getattr(OPERATORS[fwd], kind)}


def served_by(name: str, device: str) -> str:
    """Return what serves a public op on "CPU" or "CUDA", and why not something better."""
    op = name if name in OPERATORS else f"{name}_fwd"
    if device in OPERATORS[op].serving:
        return OPERATORS[op].serving[device]
    if device == "CUDA" and not HAS_TRITON:
        return "reference (Triton is not installed)"
    return "reference (no kernel yet)" if COMPILED else "reference (built without electra_fast._C)"
