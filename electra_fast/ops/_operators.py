"""Declare one operator of the dispatcher: its schema, its kernels, and its results for the compiler."""

import functools
import importlib
import importlib.util
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from electra_fast.errors import must

OLDEST_GPU = (8, 0)
HAS_TRITON = importlib.util.find_spec("triton") is not None
if importlib.util.find_spec("electra_fast._C") is None:
    _C = None
    COMPILED: frozenset[tuple[str, str]] = frozenset()
else:  # An extension that does not load is an error: the reference must not replace it silently.
    try:
        from electra_fast import _C
    except ImportError as error:
        raise ImportError(
            f"electra_fast._C does not load with torch {torch.__version__} (CUDA {torch.version.cuda}): it "
            "was built for another torch or CPU. Build it again, `pip install --no-build-isolation -e .`, or "
            f"delete electra_fast/_C*.so to run without it. The loader says: {error}"
        ) from error

    if not hasattr(_C, "bind"):
        raise ImportError(
            "electra_fast._C was built from older sources: build it again, "
            "`pip install --no-build-isolation -e .`"
        )
    COMPILED = frozenset(_C.implemented())


class SlowPathWarning(UserWarning):
    """An op runs on a GPU without a kernel for it."""


class Implementations(NamedTuple):
    """What can run one operator, with the arguments of its schema; None if there is none of that kind."""

    reference: Callable
    cpu: Callable | None  # compiled from csrc/cpu
    triton: Callable | None
    cuda: Callable | None  # compiled from csrc/cuda
    serving: dict[
        str, str
    ]  # "CPU" or "CUDA" -> "cpu", "triton" or "cuda"; a device without a kernel is absent


class Served(NamedTuple):
    """Which implementation serves an op on a device."""

    kind: str  # a field of `Implementations`: "reference", "cpu", "triton" or "cuda"
    why: str = ""  # for "reference": why there is no kernel

    def __str__(self) -> str:
        name = {"triton": "Triton", "reference": "reference"}.get(self.kind, "compiled from csrc/")
        return f"{name} ({self.why})" if self.why else name


OPERATORS: dict[str, Implementations] = {}


def _lazy(target: str) -> Callable:
    """Return a function that imports "module:function" of `electra_fast.kernels` when it is first called.

    Its first argument must be a tensor, whose device becomes the current one, because Triton launches there.
    """
    module, function = target.split(":")

    @functools.cache
    def resolve() -> Callable:
        from electra_fast.kernels import _launch
        from electra_fast.kernels._cache_keys import fix_cache_keys

        _launch.enable(_C)
        fix_cache_keys(f"electra_fast.kernels.{module}")
        return getattr(importlib.import_module(f"electra_fast.kernels.{module}"), function)

    def launch(*args):
        device = args[0].device
        if device.type != "cuda":  # the interpreter
            return resolve()(*args)
        _refuse_old_gpu(device)
        if device.index == torch.cuda.current_device():
            return resolve()(*args)
        with torch.cuda.device(device):
            return resolve()(*args)

    return launch


def launched_by() -> str:
    """Return what launches Triton's kernels once they are compiled."""
    if not HAS_TRITON:
        return "Triton is not installed"
    from electra_fast.kernels import _launch

    why_not = _launch.enable(_C)
    return f"Triton, because {why_not}" if why_not else "the extension"


@functools.cache
def _refuse_old_gpu(device: torch.device) -> None:
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < OLDEST_GPU:
        remedy = "Triton has no tensor-core path for older ones; electra_fast.reference runs there"
        rule = "have compute capability 8.0 or more"
        raise NotImplementedError(must("electra_fast: a GPU", rule, f"{major}.{minor}", remedy))


def _first_tensor(args: tuple) -> Tensor:
    flat = (a for arg in args for a in (arg if isinstance(arg, list) else [arg]))
    return next(a for a in flat if isinstance(a, Tensor))


@functools.cache
def _warn_slow(name: str, reason: str) -> None:
    warnings.warn(
        f"electra_fast: {name} runs without a kernel on this GPU: {reason}", SlowPathWarning, stacklevel=4
    )


def why_not_triton(triton: str | None) -> str:
    if triton is None:
        return "it has no kernel yet, plain PyTorch serves it"
    return "" if HAS_TRITON else "Triton is not installed (pip install triton), plain PyTorch serves it"


def operator(
    schema: str,
    *,
    default: Callable,
    fake: Callable,
    triton: str | None = None,
    triton_first: bool = False,
) -> torch._ops.OpOverload:
    """Register `schema` in the namespace electra_fast and return the operator.

    Args:
        schema: "name(arguments) -> results" in the dispatcher's language.
        default: runs on every device that has no kernel.
        fake: returns results without values, for torch.compile.
        triton: "module:function", the launcher for CUDA in `electra_fast.kernels`.
        triton_first: Triton's kernel serves CUDA even if csrc/cuda was built. The compiled kernel then serves
            only where Triton is not installed, and is otherwise the overload `<name>.compiled`. By default a
            kernel compiled from csrc/ serves first.
    """
    op, arguments = schema.split("(", 1)
    name = f"electra_fast::{op}"
    reason = why_not_triton(triton)

    def reference(*args):
        device = _first_tensor(args).device.type
        if device == "cuda":
            _warn_slow(op, reason)
        with torch.autocast(device, enabled=False):  # the definition decides about dtypes
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
            serving[device] = device.lower()
        elif kernel:
            torch.library.impl(name, device, kernel)
            serving[device] = "triton"
    cuda = packet.default if compiled["CUDA"] else None
    if compiled["CUDA"] and serving["CUDA"] == "triton":
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


def served_by(name: str, device: str) -> Served:
    """Return what serves a public op on "CPU" or "CUDA"."""
    op = name if name in OPERATORS else f"{name}_fwd"
    if device in OPERATORS[op].serving:
        return Served(OPERATORS[op].serving[device])
    if device == "CUDA" and not HAS_TRITON:
        return Served("reference", "Triton is not installed")
    return Served("reference", "no kernel yet" if COMPILED else "built without electra_fast._C")
