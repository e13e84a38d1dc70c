"""Fakes for tests of the benchmarks: a case, pytest-benchmark's fixture, and the results of a run."""

import sys
import types
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))  # the benchmarks are not installed

from benchmarks.harness import gate, runner
from benchmarks.harness.cases import Case
from benchmarks.harness.inputs import SIZES
from benchmarks.report import runs

ROOT = Path(__file__).parents[1]
SIZE = next(iter(SIZES))
GELU = {"x": torch.linspace(-4, 4, 96).view(12, 8), "bias": torch.linspace(-1, 1, 8)}


class Fake(Case):
    """A case with a right, a wrong and a failing provider."""

    name, providers = "fake, small, forward", ("fused", "wrong", "broken")
    headline = providers
    seconds = 0.01

    def prepare(self, provider):
        if provider == "wrong":
            gate.Gate("bias_gelu", GELU, ("x",)).check(lambda x, bias: F.gelu(x))
        return (lambda: 1 / 0) if provider == "broken" else (lambda: F.gelu(GELU["x"]))

    def info(self, provider):
        return {"op": "fake", "unit": "B/s", "work": 768}


class Benchmark(types.SimpleNamespace):
    """The parts of pytest-benchmark's fixture that the runner uses."""

    def __init__(self):
        super().__init__(extra_info={}, group=None, samples=[], stats=types.SimpleNamespace(stats=None))

    def pedantic(self, function, rounds):
        for _ in range(rounds):
            start = runner.CLOCK()
            function()
            self.samples.append(runner.CLOCK() - start)


def fake_benchmark(group, provider, seconds, ratio):
    extra = {"provider": provider, "p20": seconds, "p80": seconds, "host": seconds, "ratio": ratio}
    extra |= {"unit": "B/s", "work": 10**6, "peak_bytes": 10**6, "how": "CPU time"}
    extra |= {
        "op": runs.case(group).op,
        "size": runs.case(group).size,
        "served_by": "reference" if provider == "fused" else None,
    }
    return {"group": group, "extra_info": extra, "stats": {"median": seconds, "rounds": 5}}


GROUP = "embed, small, forward+backward"
RESULT = {
    "machine_info": {
        "device": "cpu", "device_name": "A CPU", "threads": 2, "cpu_capability": "AVX2", "torch": "2.13.0",
        "sources": "abc",
    },
    "datetime": "2026-11-23T08:00:00",
    "benchmarks": [
        fake_benchmark(GROUP, "torch", 0.004, {"fused": 0.5}),
        fake_benchmark(GROUP, "fused", 0.002, {"torch": 2.0}),
        fake_benchmark(GROUP, "compile", 0.006, {"fused": 0.5}),
        fake_benchmark("mlm_head, small, forward", "fused", 1.5, {}),
    ],
    "wrong": ["rtd_loss, small, forward, reference: loss: 1 from float64"],
    "fails": [],
    "dropped": ["mlm_head, small, forward, compile: needs 240 s, 9 s are left"],
    "budget": 240.0,
    "seconds": 99.5,
}  # fmt: skip
