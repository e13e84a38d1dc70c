"""Measure groups of providers within a budget of time, and hand each its samples."""

import time
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from benchmarks.cases import Case
from benchmarks.clock import CPU, CUDA, Clock, Timed, interleave, quantile
from benchmarks.inputs import REHEARSAL
from benchmarks.machine import device
from benchmarks.providers import COMPILED, LATE

CLOCK = Clock()


class OutOfTime(Exception):
    """What is left of the budget does not suffice for a provider."""


@dataclass
class Measured:
    samples: list[float]  # seconds a call
    extra: dict[str, Any]


@dataclass
class Refused:
    """No number, and why."""

    word: str  # wrong: not the reference's results; fails: an exception; dropped: no time or memory
    reason: str


class Runner:
    def __init__(self, budget: float, started: float):
        self.deadline = started + budget  # both of time.monotonic()
        self.clock = CUDA() if device() == "cuda" else CPU()
        self.results: dict[tuple[str, str], Measured | Refused] = {}
        self.longest_compilation = 0.0

    def report(self, benchmark, case: Case, provider: str) -> None:
        """Give pytest-benchmark the samples of one provider; its group is measured when first met."""
        if (case.name, provider) not in self.results:
            # A late provider brings its group's first along, for a ratio that drift does not touch.
            early = [p for p in case.providers if p not in LATE]
            together = [provider, case.providers[0]] if provider in LATE else early
            for name, result in self.measure(case, together).items():
                self.results.setdefault((case.name, name), result)
            if provider in COMPILED:
                torch.compiler.reset()  # a function compiles for a few settings only
        result = self.results[case.name, provider]
        if isinstance(result, Refused):
            line = f"{result.word}: {case.name}, {provider}: {result.reason}"
            if result.word == "dropped":
                pytest.skip(line)
            pytest.fail(line, pytrace=False)
        benchmark.group = case.name
        benchmark.extra_info.update(case.info(provider), provider=provider, **result.extra)
        samples = iter(result.samples)
        benchmark.pedantic(lambda: CLOCK.add(next(samples)), rounds=len(result.samples))

    def has_numbers(self) -> bool:
        return any(isinstance(result, Measured) for result in self.results.values())

    def measure(self, case: Case, providers: list[str]) -> dict[str, Measured | Refused]:
        """Check, warm up and time these providers of a case, their rounds interleaved."""
        refused: dict[str, Refused] = {}
        timed: dict[str, Timed] = {}
        for provider in providers:
            try:
                timed[provider] = self._prepare(case, provider)
                self._need(case.rounds[0] * sum(one.seconds for one in timed.values()))
            except Exception as error:  # whatever it is, the other providers get their numbers
                timed.pop(provider, None)
                refused[provider] = _refuse(error)
                if provider in LATE:
                    break  # there is nothing to time fused beside
        if not timed:
            return refused

        least, most = case.rounds
        longest = max(one.seconds for one in timed.values())
        affordable = self._left() / sum(one.seconds for one in timed.values())
        rounds = max(least, int(min(most, case.seconds / longest, affordable)))
        rounds = least if REHEARSAL else rounds
        try:
            interleave(list(timed.values()), rounds, self.clock.sample)
        except Exception as error:  # the group is not measured again for each of its providers
            return refused | {provider: _refuse(error) for provider in timed}

        extras = {provider: self._extra(one, timed) for provider, one in timed.items()}
        for provider, one in timed.items():
            try:
                extras[provider] |= case.counts(provider, one.function)
            except Exception as error:  # a profiler that is denied the device costs no time that was measured
                extras[provider]["not_counted"] = f"{type(error).__name__}: {error}"
        return refused | {p: Measured(timed[p].times, extra) for p, extra in extras.items()}

    def _prepare(self, case: Case, provider: str) -> Timed:
        """Check a provider, call it once so that it compiles, and once more to know what it costs."""
        compiles = provider in COMPILED
        self._need(max(case.compiling, self.longest_compilation) if compiles else 0.0)
        start = time.monotonic()
        function = case.prepare(provider)
        function()
        if compiles:
            self.longest_compilation = max(self.longest_compilation, time.monotonic() - start)
        timed = self.clock.prepare(function)
        self.clock.synchronize()
        start = time.perf_counter()
        timed.run()
        self.clock.synchronize()
        timed.seconds = time.perf_counter() - start
        return timed

    def _extra(self, one: Timed, group: dict[str, Timed]) -> dict[str, Any]:
        median = quantile(one.times, 0.5)
        return {
            "p20": quantile(one.times, 0.2),
            "p80": quantile(one.times, 0.8),
            "host": quantile(one.host, 0.5),
            "how": one.how,
            "peak_bytes": self.clock.peak_bytes(one.function),
            # of each other provider's time to this one's: above 1 this one is the faster
            "ratio": {p: quantile(o.times, 0.5) / median for p, o in group.items() if o is not one},
            "spread": {p: spread(o.times, one.times) for p, o in group.items() if o is not one},
        }

    def _left(self) -> float:
        return self.deadline - time.monotonic()

    def _need(self, seconds: float) -> None:
        left = self._left()
        if left <= seconds:
            raise OutOfTime(f"needs {seconds:.0f} s, {max(left, 0):.0f} s are left")


def spread(times: list[float], others: list[float]) -> tuple[float, float]:
    """Return the 20th and 80th percentile of the ratios of the two in each round."""
    ratios = [a / b for a, b in zip(times, others, strict=True)]
    return quantile(ratios, 0.2), quantile(ratios, 0.8)


def _refuse(error: Exception) -> Refused:
    if isinstance(error, OutOfTime):
        return Refused("dropped", str(error))
    if isinstance(error, torch.OutOfMemoryError):
        return Refused("dropped", "it does not fit into the device's memory")
    if isinstance(error, ImportError):
        return Refused("dropped", str(error))
    first_line = next(iter(str(error).splitlines()), "")
    if isinstance(error, AssertionError):
        return Refused("wrong", first_line)
    return Refused("fails", f"{type(error).__name__}: {first_line}")
