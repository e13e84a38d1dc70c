"""Measure groups of providers within a budget of time, and hand each its samples."""

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from benchmarks.cases import Case, Round
from benchmarks.clock import CPU, CUDA, Clock, Timed, interleave, quantile
from benchmarks.inputs import REHEARSAL
from benchmarks.machine import device
from benchmarks.providers import COMPILED
from benchmarks.report.numbers import standard_error

CLOCK = Clock()
PRECISE = 0.02  # the standard error of a ratio that needs no more rounds


class OutOfTime(Exception):
    """What is left of the budget does not suffice for a provider."""


@dataclass
class Measured:
    timed: Timed
    extra: dict[str, Any]


@dataclass
class Refused:
    """No number, and why."""

    word: str  # wrong: not the reference's results; fails: an exception; dropped: no time or memory
    reason: str


class Runner:
    def __init__(self, budget: float, started: float, say: Callable[[str], None] = lambda what: None):
        self.deadline = started + budget  # both of time.monotonic()
        self.say = say  # what runs now
        self.clock = CUDA() if device() == "cuda" else CPU()
        self.results: dict[tuple[str, str], Measured | Refused] = {}
        self.fixtures: dict[tuple[str, str], Any] = {}  # pytest-benchmark's, of what was reported
        self.headlines: dict[str, tuple[Case, float]] = {}  # and the seconds that a repetition takes
        self.preparing: dict[str, float] = {}  # the most seconds that a provider took, by op
        self.longest_compilation = 0.0

    def report(self, benchmark, case: Case, provider: str, when: Round = Round.OTHERS) -> None:
        """Give pytest-benchmark the samples of one provider; its group is measured when first met."""
        if (case.name, provider) not in self.results:
            together = case.headline if provider in case.headline else (provider, "fused")
            for name, result in self.measure(case, together, when).items():
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
        samples = iter(result.timed.times)
        benchmark.pedantic(lambda: CLOCK.add(next(samples)), rounds=len(result.timed.times))
        self.fixtures[case.name, provider] = benchmark

    def has_numbers(self) -> bool:
        return any(isinstance(result, Measured) for result in self.results.values())

    def measure(
        self, case: Case, providers: tuple[str, ...], when: Round = Round.OTHERS
    ) -> dict[str, Measured | Refused]:
        """Check, warm up and time these providers of a case, their rounds interleaved.

        In Round.OPS whatever time is left; in Round.STEP the least rounds, if there was time to prepare.
        """
        refused: dict[str, Refused] = {}
        timed: dict[str, Timed] = {}
        for provider in providers:
            self.say(f"{case.name}: {provider} is checked")
            try:
                if when > Round.OPS:
                    self._need(self._to_prepare(case, provider))
                timed[provider] = self._prepare(case, provider)
                if when > Round.STEP:
                    self._need(case.rounds[0] * sum(one.seconds for one in timed.values()))
            except Exception as error:  # whatever it is, the other providers get their numbers
                timed.pop(provider, None)
                refused[provider] = _refuse(error)
                if providers[0] != "fused":
                    break  # there is nothing to time fused beside
        if not timed:
            return refused

        try:
            seconds = self._interleave(case, list(timed.values()))
        except Exception as error:  # the group is not measured again for each of its providers
            return refused | {provider: _refuse(error) for provider in timed}
        if set(case.headline) <= set(timed):
            self.headlines[case.name] = case, seconds

        extras = {p: self._times(one, timed) for p, one in timed.items()}
        for provider, one in timed.items():
            extras[provider] |= {"how": one.how, "peak_bytes": self.clock.peak_bytes(one.function)}
            extras[provider] |= {"apart": True} if provider not in case.headline else {}
            try:
                self._need(0.0)
                extras[provider] |= case.counts(provider, one.function)
            except Exception as error:  # a profiler that is denied the device costs no time that was measured
                extras[provider]["not_counted"] = f"{type(error).__name__}: {error}"
        for one in timed.values():
            one.function = one.run = None  # a step's holds a model
        return refused | {p: Measured(timed[p], extra) for p, extra in extras.items()}

    def sharpen(self) -> None:
        """Repeat the headline that is least precise, until all are precise or the budget ends."""
        left = dict(self.headlines)
        while left:
            name = max(left, key=self._error)
            case, seconds = left[name]
            if self._error(name) <= PRECISE or self._left() <= seconds:
                del left[name]
                continue
            self.say(f"{name}: {self._error(name):.0%} uncertain, measured again")
            began = time.monotonic()
            try:
                timed = {p: self._prepare(case, p) for p in case.headline}
                self._interleave(case, list(timed.values()))
            except Exception:  # the first samples are as good as they were
                del left[name]
                continue
            left[name] = case, time.monotonic() - began
            group = {p: self.results[name, p].timed for p in case.headline}
            for provider, one in group.items():
                one.times += timed[provider].times
                one.host += timed[provider].host
            for provider, one in group.items():
                self._correct(name, provider, self._times(one, group))

    def _error(self, name: str) -> float:
        """Return the largest standard error among the ratios of a headline."""
        case, _ = self.headlines[name]
        fused = self.results[name, "fused"]
        spreads = (fused.extra["spread"][p] for p in case.headline if p != "fused")
        return max((standard_error(s, len(fused.timed.times)) for s in spreads), default=0.0)

    def _correct(self, name: str, provider: str, extra: dict[str, Any]) -> None:
        """Replace what was reported of a provider by all of its samples."""
        result = self.results[name, provider]
        result.extra |= extra
        if (benchmark := self.fixtures.get((name, provider))) is None:  # not among what was asked for
            return
        benchmark.extra_info.update(extra)
        stats = type(benchmark.stats.stats)()  # its medians are computed once
        for seconds in result.timed.times:
            stats.update(seconds)
        benchmark.stats.stats = stats

    def _interleave(self, case: Case, timed: list[Timed]) -> float:
        """Time them in turn for `case.seconds`; return how many seconds it took."""
        self.say(f"{case.name} is timed")
        least, most = case.rounds
        longest = max(one.seconds for one in timed)
        rounds = least if REHEARSAL else max(least, min(most, int(case.seconds / longest)))
        began = time.monotonic()
        interleave(timed, rounds, self.clock.sample, enough=lambda r: r >= least and self._left() < 0)
        return time.monotonic() - began

    def _to_prepare(self, case: Case, provider: str) -> float:
        """Return the seconds to expect before a provider can be timed."""
        if provider in COMPILED:
            return max(case.compiling, self.longest_compilation)
        return self.preparing.get(_op(case), 0.0)

    def _prepare(self, case: Case, provider: str) -> Timed:
        """Check a provider, call it once so that it compiles, and once more to know what it costs."""
        if provider in COMPILED:
            needs_a_compiler()
        start = time.monotonic()
        function = case.prepare(provider)
        function()
        took = time.monotonic() - start
        if provider in COMPILED:
            self.longest_compilation = max(self.longest_compilation, took)
        else:
            self.preparing[_op(case)] = max(self.preparing.get(_op(case), 0.0), took)
        timed = self.clock.prepare(function)
        self.clock.synchronize()
        start = time.perf_counter()
        timed.run()
        self.clock.synchronize()
        timed.seconds = time.perf_counter() - start
        return timed

    def _times(self, one: Timed, group: dict[str, Timed]) -> dict[str, Any]:
        median = quantile(one.times, 0.5)
        return {
            "p20": quantile(one.times, 0.2),
            "p80": quantile(one.times, 0.8),
            "host": quantile(one.host, 0.5),
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


def needs_a_compiler() -> None:
    """Raise ImportError where torch.compile has no C++ compiler for the CPU."""
    compiler = os.environ.get("CXX", "g++")
    if device() == "cpu" and shutil.which(compiler.split()[0]) is None:
        raise ImportError(f"torch.compile needs a C++ compiler for the CPU, got none ({compiler})")


def _op(case: Case) -> str:
    return case.name.partition(",")[0]


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
