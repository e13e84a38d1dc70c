"""Measure groups of providers within a budget of time, and give pytest-benchmark their samples."""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from benchmarks.harness.cases import Case, Round
from benchmarks.harness.clock import (
    CPU,
    CUDA,
    Clock,
    Timed,
    interleave,
    prepared,
    quantile,
    ratio_percentiles,
)
from benchmarks.harness.compiled import LONGER
from benchmarks.harness.gate import NoGradient
from benchmarks.harness.inputs import REHEARSAL
from benchmarks.harness.machine import device
from benchmarks.harness.providers import COMPILED
from benchmarks.report.numbers import PRECISE, standard_error

CLOCK = Clock()


class OutOfTime(Exception):
    """The rest of the budget is too short for a provider."""


@dataclass
class Measured:
    timed: Timed
    extra: dict[str, Any]


@dataclass
class Refused:
    """Why a provider has no number."""

    word: str  # wrong: other results than the reference; fails: an exception; dropped: no time or memory
    reason: str


class Runner:
    def __init__(self, budget: float, started: float, say: Callable[[str], None] = lambda what: None):
        self.deadline = started + budget  # on the clock of time.monotonic()
        self.say = say  # shows what runs now
        self.clock = CUDA() if device() == "cuda" else CPU()
        self.results: dict[tuple[str, str], Measured | Refused] = {}
        self.fixtures: dict[tuple[str, str], Any] = {}  # pytest-benchmark's, of reported providers
        # The timed providers of each headline, and the seconds of one repetition.
        self.headlines: dict[str, tuple[Case, tuple[str, ...], float]] = {}
        self.preparing: dict[str, float] = {}  # longest preparation of a provider, by op
        self.longest_compilation = 0.0

    def report(self, benchmark, case: Case, provider: str, when: Round = Round.OTHERS) -> None:
        """Give pytest-benchmark the samples of one provider; measure its group if that is not done yet."""
        if (case.name, provider) not in self.results:
            apart = (provider, "fused", *([case.against[provider]] if provider in case.against else []))
            together = case.headline if provider in case.headline else apart
            with threads(case.threads):
                for name, result in self.measure(case, together, when).items():
                    self.results.setdefault((case.name, name), result)
            if provider in COMPILED:
                torch.compiler.reset()  # torch compiles one function a few times only
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
        """Check, warm up and time these providers of a case with interleaved rounds.

        Round.OPS ignores the deadline. Round.STEP needs time to prepare, and then gets its minimum of rounds.
        """
        refused: dict[str, Refused] = {}
        timed: dict[str, Timed] = {}
        for provider in providers:
            self.say(f"{case.name}: {provider} is checked")
            try:
                case.require(provider)
                if when > Round.OPS:
                    self._need(self._to_prepare(case, provider))
                timed[provider] = self._prepare(case, provider)
                if when > Round.STEP:
                    self._need(case.rounds[0] * sum(one.seconds for one in timed.values()))
            except Exception as error:  # any error: the other providers are measured
                timed.pop(provider, None)
                refused[provider] = _refuse(error, provider in case.yours)
                if providers[0] != "fused":
                    break  # no other provider is left to compare with fused
        if not timed:
            return refused

        try:
            seconds = self._interleave(case, list(timed.values()))
        except Exception as error:  # refused here, so the group is not measured again per provider
            return refused | {p: _refuse(error, p in case.yours) for p in timed}
        headline = tuple(p for p in case.headline if p in timed)
        if len(headline) > 1 and providers == case.headline:
            self.headlines[case.name] = case, headline, seconds

        extras = {p: self._times(one, timed) for p, one in timed.items()}
        for provider, one in timed.items():
            extras[provider] |= {"how": one.how, "peak_bytes": self.clock.peak_bytes(one.function)}
            extras[provider] |= {"apart": True} if provider not in case.headline else {}
            if (ours := case.against.get(provider)) in timed:
                extras[provider]["against"] = ours
            try:
                self._need(0.0)
                extras[provider] |= case.counts(provider, one.function)
            except Exception as error:  # a profiler may have no access to the device; the times are valid
                extras[provider]["not_counted"] = f"{type(error).__name__}: {error}"
        for one in timed.values():
            one.function = one.run = None  # frees the model of a step
        return refused | {p: Measured(timed[p], extra) for p, extra in extras.items()}

    def sharpen(self) -> None:
        """Measure the least precise headline again, until all are precise or the budget ends."""
        left = dict(self.headlines)
        while left:
            name = max(left, key=self._error)
            case, headline, seconds = left[name]
            if self._error(name) <= PRECISE or self._left() <= seconds:
                del left[name]
                continue
            self.say(f"{name}: standard error {self._error(name):.0%}, measured again")
            start = time.monotonic()
            try:
                with threads(case.threads):
                    timed = {p: self._prepare(case, p) for p in headline}
                    self._interleave(case, list(timed.values()))
            except Exception:  # the first samples remain valid
                del left[name]
                continue
            left[name] = case, headline, time.monotonic() - start
            group = {p: self.results[name, p].timed for p in headline}
            for provider, one in group.items():
                one.times += timed[provider].times
                one.host += timed[provider].host
            for provider, one in group.items():
                self._correct(name, provider, self._times(one, group))

    def _error(self, name: str) -> float:
        """Return the largest standard error of a headline's ratios."""
        _, headline, _ = self.headlines[name]
        fused = self.results[name, "fused"]
        spreads = (fused.extra["spread"][p] for p in headline if p != "fused")
        return max((standard_error(s, len(fused.timed.times)) for s in spreads), default=0.0)

    def _correct(self, name: str, provider: str, extra: dict[str, Any]) -> None:
        """Replace the reported samples of a provider by all of its samples."""
        result = self.results[name, provider]
        result.extra |= extra
        if (benchmark := self.fixtures.get((name, provider))) is None:  # not selected for this run
            return
        benchmark.extra_info.update(extra)
        stats = type(benchmark.stats.stats)()  # a new object, because the old one has cached its median
        for seconds in result.timed.times:
            stats.update(seconds)
        benchmark.stats.stats = stats

    def _interleave(self, case: Case, timed: list[Timed]) -> float:
        """Time the providers in turn for `case.seconds`; return the elapsed seconds."""
        self.say(f"{case.name} is timed")
        least, most = case.rounds
        longest = max(one.seconds for one in timed)
        rounds = least if REHEARSAL else max(least, min(most, int(case.seconds / longest)))
        start = time.monotonic()
        interleave(timed, rounds, self.clock.sample, enough=lambda r: r >= least and self._left() < 0)
        return time.monotonic() - start

    def _to_prepare(self, case: Case, provider: str) -> float:
        """Return the expected seconds before a provider can be timed."""
        if provider in COMPILED:
            return max(case.compiling * LONGER.get(provider, 1.0), self.longest_compilation)
        return max(case.preparing, self.preparing.get(_op(case), 0.0))

    def _prepare(self, case: Case, provider: str) -> Timed:
        """Check a provider, call it once so that it compiles, and once more to estimate its time."""
        start = time.monotonic()
        function = case.prepare(provider)
        function()
        took = time.monotonic() - start
        if provider in COMPILED:
            self.longest_compilation = max(self.longest_compilation, took)
        else:
            self.preparing[_op(case)] = max(self.preparing.get(_op(case), 0.0), took)
        return prepared(self.clock, function)

    def _times(self, one: Timed, group: dict[str, Timed]) -> dict[str, Any]:
        median = quantile(one.times, 0.5)
        return {
            "p20": quantile(one.times, 0.2),
            "p80": quantile(one.times, 0.8),
            "p95": quantile(one.times, 0.95),
            "host": quantile(one.host, 0.5),
            # another provider's time over this one's: above 1 this one is faster
            "ratio": {p: quantile(o.times, 0.5) / median for p, o in group.items() if o is not one},
            "spread": {p: ratio_percentiles(o.times, one.times) for p, o in group.items() if o is not one},
        }

    def _left(self) -> float:
        return self.deadline - time.monotonic()

    def _need(self, seconds: float) -> None:
        left = self._left()
        if left <= seconds:
            raise OutOfTime(f"needs {seconds:.0f} s, {max(left, 0):.0f} s are left")


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Let torch use this many threads within the context; None changes nothing."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _op(case: Case) -> str:
    return case.name.partition(",")[0]


def _refuse(error: Exception, yours: bool) -> Refused:
    """Return why a provider is refused. Only a provider of a user may be right without supporting a case."""
    first_line = next(iter(str(error).splitlines()), "")[:300]
    if isinstance(error, OutOfTime):
        return Refused("dropped", str(error))
    if isinstance(error, torch.OutOfMemoryError):
        return Refused("dropped", "it does not fit into the device's memory")
    if isinstance(error, ImportError):
        return Refused("dropped", str(error))
    if yours and isinstance(error, (NotImplementedError, NoGradient)):
        return Refused("dropped", first_line or type(error).__name__)
    if isinstance(error, AssertionError):
        return Refused("wrong", first_line)
    return Refused("fails", f"{type(error).__name__}: {first_line}")
