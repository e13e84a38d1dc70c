"""The first layer of a feed-forward network: product, bias and GELU, as two ops and as one kernel.

`fused` is what a model calls today, `ops.linear` and `ops.bias_gelu`. `candidate` is kernels/_linear_gelu.py.
`cublaslt_tanh` is the epilogue of cuBLASLt that torch offers. It is another function, the tanh form of GELU,
whose difference from the erf form is smaller than the rounding of bfloat16; it has no gradient.
"""

import functools
from typing import Any

import torch

from benchmarks.harness.candidates import LinearGELUGate, linear_gelu, plain
from benchmarks.harness.cases import BOTH, FLOPS, FORWARD, Call, Case, Run, parametrize
from benchmarks.harness.gate import Errors
from benchmarks.harness.inputs import CUDA, STEPS, Make
from electra_fast import ops


def two_ops(x, weight, bias):
    return ops.bias_gelu(ops.linear(x, weight), bias)


def cublaslt_tanh(x, weight, bias):
    if torch.is_grad_enabled():
        raise ImportError("torch has no gradient of this epilogue")
    y = torch._addmm_activation(bias, x.flatten(0, -2), weight.t(), use_gelu=True)
    return y.view(*x.shape[:-1], -1)


FUNCTIONS = {
    "fused": two_ops,
    "candidate": linear_gelu,
    "torch": plain,
    "cublaslt_tanh": cublaslt_tanh,
    "compile": plain,
    "compile_max": plain,
}


class LinearGELUCase(Case):
    providers = tuple(FUNCTIONS)
    headline = ("fused", "candidate", "torch")

    def __init__(self, size: str, passes: str):
        self.size, self.passes = size, passes
        self.name = f"linear_gelu, {size}, {passes}"
        self.errors: dict[str, Errors] = {}  # by provider

    @functools.cached_property
    def call(self) -> Call:
        make = Make(STEPS[self.size][0])
        T, K, N = make.B * make.L, make.config.hidden, make.config.ffn
        x, weight, bias = make.normal(make.B, make.L, K), make.normal(N, K, scale=K**-0.5), make.normal(N)
        product, moved = 2 * T * N * K, (T * (K + N) + N * K) * x.element_size()
        return Call(
            {"x": x, "weight": weight, "bias": bias},
            gradients=("x", "weight", "bias"),
            unit=FLOPS,
            forward=product,
            backward=2 * product,
            moved=(moved, 2 * moved - T * N * x.element_size()),  # read x, weight, dy; write dx, dweight
        )

    @functools.cached_property
    def gate(self) -> LinearGELUGate:
        return LinearGELUGate(self.call.args, self.call.gradients if self.passes == BOTH else ())

    def prepare(self, provider: str):
        function = FUNCTIONS[provider]
        if provider in ("compile", "compile_max"):
            mode = "max-autotune-no-cudagraphs" if provider == "compile_max" else None  # the clock captures
            function = torch.compile(function, dynamic=False, mode=mode)
        with torch.set_grad_enabled(self.passes == BOTH):
            if provider not in self.errors:
                self.errors[provider] = self.gate.check(function)
        return self.call.once(function, self.passes)

    def info(self, provider: str) -> dict[str, Any]:
        work = self.call.forward + (self.call.backward if self.passes == BOTH else 0)
        facts = {"op": "linear_gelu", "size": self.size, "passes": self.passes, "unit": FLOPS, "work": work}
        facts |= {"bound": self.call.bound(self.passes), "served_by": None}
        facts["implementation"] = "two ops" if provider == "fused" else None
        return facts | {"errors": self.errors.get(provider, {})}


if CUDA:  # the candidate is a Triton kernel, and the interpreter is never timed
    RUNS = [Run(s, q, p, 15) for s in STEPS for q in (BOTH, FORWARD) for p in FUNCTIONS]
    bench_linear_gelu = parametrize(functools.cache(LinearGELUCase), RUNS)
