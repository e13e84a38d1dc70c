"""Cases and providers. A case is one op at one size, forward or forward+backward. A provider runs it.

    @cases(value=70)
    def bench_bias_gelu(make):
        ...
        return Call(arguments, gradients=..., unit=..., forward=..., backward=...)

declares the cases of an op: its arguments at `make.size`, and the work of a call in bytes or FLOPs.
"""

import enum
import functools
import inspect
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend
from torch.overrides import TorchFunctionMode

from benchmarks.harness import compiled, gate
from benchmarks.harness.clock import once
from benchmarks.harness.inputs import SIZES, Make, Size
from benchmarks.harness.machine import bound, device
from benchmarks.harness.providers import COMPILED, LATE
from benchmarks.harness.yours import GIVEN, Yours
from benchmarks.rivals import require
from electra_fast import ops
from electra_fast.ops import TORCH
from electra_fast.ops._operators import served_by
from electra_fast.testing import Example
from electra_fast.testing.supports import unsupported

BYTES, FLOPS = "B/s", "FLOP/s"
FORWARD, BOTH = "forward", "forward+backward"
Functions = dict[str, Callable]


class Round(enum.IntEnum):
    """The order of a run. Imprecise ratios are measured again after all of these."""

    # Each op and its plain PyTorch form, once, and every case of a provider of a user: measured even when the
    # budget is spent.
    OPS = 1
    STEP = 2
    OTHERS = 3
    RIVALS = 4  # rivals and compiled providers
    DEFINITIONS = 5  # the reference, and cases that need minutes


class Run(NamedTuple):
    """One number of the results: a provider of a case, its round, and its value to a reader."""

    size: str
    passes: str
    provider: str
    value: float
    headline: Round | None = None  # the round, if the provider belongs to the case's headline

    @property
    def round(self) -> Round:
        if self.headline:
            return self.headline
        late = {"reference": Round.DEFINITIONS} | dict.fromkeys(LATE, Round.RIVALS)
        return late.get(self.provider, Round.OTHERS)


class Call(NamedTuple):
    """The arguments and the work of one call: the bytes that it must move, or its FLOPs and `moved` bytes."""

    args: dict[str, Any]
    unit: str
    forward: int
    backward: int = 0
    gradients: tuple[str, ...] = ()
    moved: tuple[int, int] = (0, 0)  # forward, backward

    def bound(self, passes: str) -> float | None:
        """Return the fewest seconds that the passes need, or None if the device's bounds are not known."""
        works = [self.forward, self.backward][: 1 + (passes == BOTH)]
        if self.unit == BYTES:
            return bound(0, sum(works))
        bounds = [bound(work, moved) for work, moved in zip(works, self.moved, strict=False)]
        return None if None in bounds else sum(bounds)

    def once(self, function: Callable, passes: str) -> Callable[[], Any]:
        """Return a function without arguments that makes this call, with its backward if `passes` has it."""
        return once(function, self.args, self.gradients if passes == BOTH else ())


class Case:
    """What the runner needs from a case; implemented by `OpCase` and by the files of models."""

    name: str  # the name of the group, whose providers do the same work
    providers: tuple[str, ...]
    headline: tuple[str, ...] = ("fused", "torch")  # timed together; any other provider only with fused
    seconds = 0.6  # measuring time per provider
    rounds = (5, 40)  # minimum, maximum
    preparing = 0.0  # expected seconds before a first provider can be timed
    compiling = 15.0  # expected seconds of a first call that compiles
    threads: int | None = None  # of torch; None leaves the default
    against: ClassVar[dict[str, str]] = {}  # providers that are compared with another one of ours than fused
    yours: ClassVar[dict[str, Yours]] = {}  # providers of a user

    def require(self, provider: str) -> None:
        """Raise ImportError with the reason if the provider is absent here; this costs no time."""
        if provider in COMPILED:
            compiled.require(provider)

    def prepare(self, provider: str) -> Callable[[], Any]:
        """Return one call of the provider, after checking it; a wrong one raises AssertionError."""
        raise NotImplementedError

    def info(self, provider: str) -> dict[str, Any]:
        """Return the facts about the case for the results."""
        raise NotImplementedError

    def counts(self, provider: str, function: Callable[[], Any]) -> dict[str, int]:
        """Return the counts of one call for the results."""
        return {}


class OpCase(Case):
    # The errors of checked providers, by op, size, provider, and whether the gradients were checked.
    right: ClassVar[dict[tuple[str, str, str, bool], gate.Errors]] = {}

    def __init__(self, op: str, inputs: Callable[[Make], Call], size: Size, passes: str, rivals: Functions):
        self.op, self.inputs, self.size, self.passes, self.rivals = op, inputs, size, passes, rivals
        self.name = f"{op}, {size.name}, {passes}"
        self.yours = GIVEN.get(op, {})
        self.headline = ("fused", "torch", *self.yours)
        # The reference samples in float64, which takes too long at the sizes of a single op.
        definition = ("reference",) if size.name in SIZES else ()
        drops = "dropout" in inspect.signature(getattr(TORCH, op)).parameters
        others = ("compile", "compile_max", *(["compile_rand4x"] if drops else []))
        self.providers = (*self.headline, *definition, *rivals, *others)

    def require(self, provider: str) -> None:
        super().require(provider)
        if provider in self.rivals:
            require(self.rivals[provider])

    @functools.cached_property
    def call(self) -> Call:
        return self.inputs(Make(self.size))

    @functools.cached_property
    def gate(self) -> gate.Gate:
        return gate.Gate(self.op, self.call.args, self.call.gradients)

    def checked(self, provider: str) -> tuple[str, str, str, bool]:
        """Return the key in `right`. A function of a user may be right in the forward pass only."""
        whole = (self.op, self.size.name, provider, True)
        forward = provider in self.yours and self.passes == FORWARD
        return (*whole[:3], False) if forward and whole not in self.right else whole

    def prepare(self, provider: str) -> Callable[[], Any]:
        function = {
            "fused": getattr(ops.FUSED, self.op),
            "torch": getattr(TORCH, self.op),
            "reference": getattr(ops.REFERENCE, self.op),
            **self.rivals,
            **{name: yours.function for name, yours in self.yours.items()},
        }.get(provider)
        if provider in COMPILED:
            function = compiled.compiled(getattr(TORCH, self.op), provider)
        if provider in self.yours:
            example = Example(self.op, self.name, self.call.args, self.call.gradients)
            if what := unsupported(example, self.yours[provider].supports):
                raise NotImplementedError(f"does not support {what}")
        key = self.checked(provider)
        if key not in self.right and provider != "reference":
            if provider == "fused":
                gate.check_kernel(self.op, function, self.call.args)
            many = provider != "fused" and self.size.name not in SIZES
            roundings = gate.MANY_TERMS if many else gate.ANY_ORDER
            self.right[key] = self.gate.check(function, roundings, backward=key[-1])
        call = self.call.once(function, self.passes)
        if getattr(function, "synchronizes", False):
            call.eager = "eager calls, cold L2: it waits for the host, so it cannot be captured"
        return call

    def info(self, provider: str) -> dict[str, Any]:
        work = self.call.forward + (self.call.backward if self.passes == BOTH else 0)
        served = served_by(self.op, device().upper()) if provider == "fused" else None
        # With dropout the reference computes Philox in PyTorch, so its time is not a baseline.
        replays = provider == "reference" and self.call.args.get("dropout", 0) > 0
        facts = {"op": self.op, "size": self.size.name, "passes": self.passes, "no_baseline": replays}
        facts |= {"unit": self.call.unit, "work": work, "bound": self.call.bound(self.passes)}
        if provider == "torch" and self.op.startswith("attention"):
            facts["backend"] = sdpa_backend(self.call.once(getattr(TORCH, self.op), self.passes))
        if provider in self.yours:
            facts["yours"] = self.yours[provider].source
        errors = self.right.get(self.checked(provider), {})
        facts |= {"served_by": served and str(served), "implementation": served and served.kind}
        return facts | {"errors": errors}


class Choice(TorchFunctionMode):
    """Records which kernel F.scaled_dot_product_attention chooses."""

    backend: str | None = None  # "flash", "efficient", "cudnn" or "math"

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            number = torch._fused_sdp_choice(*args, **kwargs or {})
            self.backend = SDPBackend(number).name.removesuffix("_ATTENTION").lower()
        return function(*args, **kwargs or {})


def sdpa_backend(call: Callable[[], Any]) -> str | None:
    """Return the kernel of the last F.scaled_dot_product_attention in one call, or None."""
    with Choice() as choice:
        call()
    return choice.backend


def cases(
    value: float, sizes: dict[str, Size] | None = None, rivals: Functions | None = None, forward: bool = False
) -> Callable:
    """Turn a function that makes arguments into a benchmark of every size, pass and provider.

    Args:
        value: the value of the numbers to a reader; within a round a higher one is measured first.
        sizes: sizes of this op only, measured after those that all ops have.
        rivals: functions of other libraries by name, with the op's signature.
        forward: whether the forward pass at `sizes` is timed separately too.
    """

    def decorate(inputs: Callable[[Make], Call]) -> Callable:
        op = inputs.__name__.removeprefix("bench_")
        both = op not in ("mask_tokens", "replace_tokens")  # these two have no gradient
        passes = [BOTH, FORWARD] if both else [FORWARD]
        own = sizes or {}
        found = {(s, p): OpCase(op, inputs, SIZES[s], p, rivals or {}) for s in SIZES for p in passes}
        own_passes = passes if forward else [BOTH]
        found |= {(s, p): OpCase(op, inputs, own[s], p, rivals or {}) for s in own for p in own_passes}
        first = next(iter(found))
        runs = [
            Run(
                *key,
                p,
                0 if key[0] in own else value,
                Round.OPS if p in case.headline and (key == first or case.yours) else None,
            )
            for key, case in found.items()
            for p in case.providers
        ]
        bench = parametrize(lambda *key: found[key], runs)
        bench.inputs = inputs
        return bench

    return decorate


def parametrize(of: Callable[[str, str], Case], runs: list[Run]) -> Callable:
    """Return a test function parametrized by `runs`; the case of a run is `of(size, passes)`."""
    found = {run[:3]: run for run in runs}

    @pytest.mark.parametrize(("size", "passes", "provider"), list(found))
    def bench(benchmark, runner, size, passes, provider):
        runner.report(benchmark, of(size, passes), provider, found[size, passes, provider].round)

    bench.runs = found
    return bench
