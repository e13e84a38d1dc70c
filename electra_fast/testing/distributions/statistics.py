"""Tests of random numbers against their specified distribution, each as a `Judgement`.

The thresholds are fixed: the p-value of a chi-square test must be above 1e-4 divided by the number of tests,
and below 1 - 1e-6, because a fit that is too good is also an error; z must be within 4.
"""

import math
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from electra_fast.testing.budget import Judgement

TESTS = 32  # number of chi-square tests of all ops; none should fail by chance
LEAST, TOO_GOOD, Z = 1e-4 / TESTS, 1e-6, 4.0


class NotJudged(NotImplementedError):
    """A property cannot be judged: the function does not support what it needs, or drew too little."""


def failure(name: str, error: Exception) -> Judgement:
    """Return the judgement of a property that raised an error: the ratio is NaN if it is not implemented."""
    if isinstance(error, NotJudged):
        return Judgement(name, math.nan, f"{error}")
    line, _, _ = str(error).strip().partition("\n")
    first = f"{type(error).__name__}: {line}"
    if isinstance(error, NotImplementedError):
        return Judgement(name, math.nan, first)
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return Judgement(name, math.inf, f"{name}: raised {first} ({Path(frame.filename).name}:{frame.lineno})")


def judged(what: str, properties: dict[str, Callable[[], Judgement | str]]) -> Iterator[Judgement]:
    """Yield the judgement of each property by name; one that raises an error does not hide the others.

    A property returns a judgement without a name, or what is wrong in words (empty: it is right).
    """
    for quantity, evaluate in properties.items():
        name = f"{what}: {quantity}"
        try:
            found = evaluate()
            if isinstance(found, str):
                found = Judgement(name, math.inf if found else 0.0, found)
            found = found._replace(name=name, why=found.why and f"{name}: {found.why}")
        except Exception as error:  # of any type: it is a finding about the function
            found = failure(name, error)
        yield found._replace(quantity=quantity)


def chi_square(counts: Tensor, expected: Tensor) -> float:
    """Return the p-value of Pearson's test; cells with an expectation below 5 are merged."""
    counts, expected = counts.double().flatten(), expected.double().flatten()
    order = expected.argsort(descending=True)
    counts, expected = counts[order], expected[order]
    large = int((expected >= 5).sum())
    if large < len(expected):
        rest = [(x[:large], x[large:].sum()[None]) for x in (counts, expected)]
        counts, expected = (torch.cat(pair) for pair in rest)
        if expected[-1] < 5 and large:
            counts, expected = (torch.cat([x[:-2], x[-2:].sum()[None]]) for x in (counts, expected))
    if len(expected) < 2:
        raise AssertionError("chi_square: too few draws for two cells with an expectation of 5")
    return tail(((counts - expected) ** 2 / expected).sum(), len(expected) - 1)


def tail(statistic: Tensor, freedom: int) -> float:
    """Return the probability that a chi-square with these degrees of freedom is larger."""
    return torch.special.gammaincc(torch.tensor(freedom / 2).double(), statistic.double() / 2).item()


def plausible(p: float) -> Judgement:
    """Judge a p-value. The error and its budget are -log10 of p, or of 1 - p if the fit is too good."""
    sides = [(p, LEAST, "not the specified distribution"), (1 - p, TOO_GOOD, "too good to be random")]
    sides = [(-math.log10(x) if x > 0 else math.inf, -math.log10(least), why) for x, least, why in sides]
    error, budget, why = max(sides, key=lambda side: side[0] / side[1])
    return Judgement("", error / budget, f"p = {p:.3g}, {why}" if error >= budget else "", error, budget)


def z_test(observed: float, mean: float, variance: float, where: str = "") -> Judgement:
    """Judge a sum of many draws. The error is |z|; `where` is added to the words."""
    if not variance > 0:
        raise NotJudged("too little was drawn")
    z = abs(observed - mean) / variance**0.5
    why = f"observed {observed:.6g}, expected {mean:.6g}, z = {z:.2f}{where}"
    return Judgement("", z / Z, why if not z < Z else "", z, Z)


def within(error: float, budget: float, why: str) -> Judgement:
    """Judge a deviation, which may be NaN."""
    if error <= budget:
        return Judgement("", error / budget if budget else 0.0, "", error, budget)
    return Judgement("", error / budget if budget and error == error else math.inf, why, error, budget)


@contextmanager
def seeded(rng: Tensor, stream: int = 0) -> Iterator[None]:
    """Seed torch's generators from (seed, step) and the stream for one call, and restore them after it.

    A function that draws from them gives the same numbers in each run, and others in another step.
    """
    seed, step = rng.tolist()
    with torch.random.fork_rng(devices=[rng.device] if rng.is_cuda else []):
        torch.manual_seed((1000 * seed + step) * 1000 + stream)
        yield
