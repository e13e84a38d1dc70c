"""`benchmarks.time`: time any function with the clocks of the benchmarks, next to other functions."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.harness import clock
from benchmarks.harness.clock import Timed, quantile
from benchmarks.report.numbers import PRECISE, digits, standard_error
from electra_fast.errors import must
from electra_fast.tables import text_table

ROUNDS = 5  # the fewest; the spread of fewer says nothing


class Ratio(NamedTuple):
    value: float  # the median of the other function over this one's: above 1 this one is faster
    error: float  # the standard error of the value, relative to it


class Times(NamedTuple):
    """The times of a function, in seconds per call. `print` shows one line per function."""

    name: str
    median: float
    p20: float  # percentiles of the rounds
    p80: float
    rounds: int
    how: str  # what was measured
    ratio: dict[str, Ratio]  # by the name of the other function
    against: dict[str, "Times"]
    verdict: str  # of all these numbers, by the rule of `noise`

    def __str__(self) -> str:
        rows = [[self.name, *self._cells(), f"{self.rounds} rounds, {self.how}; {self.verdict}"]]
        for name, other in self.against.items():
            value, error = self.ratio[name]
            rows.append([name, *other._cells(), f"{self.name} is {value:.2f}x as fast, ± {error:.1%}"])
        return text_table(rows, right=(1,))

    def _cells(self) -> list[str]:
        factor, unit = (1e3, "ms") if self.median >= 1e-3 else (1e6, "us")
        low, high = (digits(x * factor) for x in (self.p20, self.p80))
        return [f"{digits(self.median * factor)} {unit}", f"({low} - {high})"]


def time(
    f: Callable,
    inputs: dict[str, Any] | tuple,
    against: Callable | dict[str, Callable] | None = None,
    seconds: float = 1.0,
    *,
    gradients: tuple[str | int, ...] = (),
) -> Times:
    """Time a function, and others in turn in the same rounds, so that drift affects all equally.

        print(benchmarks.time(my_attention, {"q": q, "k": k, "v": v}, against=ops.attention))

    A time is CPU time, summed over all threads, with warm caches. If an input is on a GPU, it is that between
    events around replays of a CUDA graph, with a cold L2. `electra_fast.testing` compares results.

    Args:
        f: the function. It is called before it is timed, so that it can compile.
        inputs: keyword arguments, or a tuple of positional ones, at least one of them a tensor.
        against: another function, which the result names "against", or functions by name, with these inputs.
        seconds: the measuring time of each function; there are at least 5 rounds.
        gradients: the names of the inputs whose gradients are computed too, or their positions in the tuple.
            The result must then be a tensor, or have a field `loss` that is one. Without, autograd is off.

    Raises:
        TypeError: a function cannot be called, or `inputs` is neither a dict nor a tuple.
        ValueError: no input is a tensor, `gradients` names no floating input, or `seconds` is not above 0.
    """
    others = _others(f, against)
    args, wanted = _arguments(inputs, gradients)
    if seconds <= 0:
        raise ValueError(must("time: seconds", "be above 0", seconds))
    functions = [f, *others.values()]
    if isinstance(inputs, tuple):
        functions = [_positional(function) for function in functions]
    tensors = [x for x in args.values() if isinstance(x, Tensor)]
    where = next((x for x in tensors if x.is_cuda), tensors[0])
    with torch.cuda.device_of(where):  # changes nothing for a tensor on the CPU
        watch = clock.CUDA() if where.is_cuda else clock.CPU()
        timed = []
        for function in functions:
            call = clock.once(function, args, wanted)
            call()
            timed.append(clock.prepared(watch, call))
        longest = max(clock.SHORTEST, *(one.seconds for one in timed))
        clock.interleave(timed, max(ROUNDS, int(seconds / longest)), watch.sample)
    return compared(getattr(f, "__name__", "f"), timed[0], dict(zip(others, timed[1:], strict=True)))


def compared(name: str, timed: Timed, others: dict[str, Timed]) -> Times:
    """Return the times of a function and of others, from the samples of their common rounds."""
    against = {other: compared(other, one, {}) for other, one in others.items()}
    median, p20, p80 = (quantile(timed.times, q) for q in (0.5, 0.2, 0.8))
    rounds = len(timed.times)
    ratio = {}
    for other, one in others.items():
        error = standard_error(clock.ratio_percentiles(one.times, timed.times), rounds)
        ratio[other] = Ratio(against[other].median / median, error)
    errors = {f"the median of {name}": standard_error((p20, p80), rounds)}
    errors |= {f"the ratio to {other}": found.error for other, found in ratio.items()}
    return Times(name, median, p20, p80, rounds, timed.how, ratio, against, noise(errors))


def noise(errors: dict[str, float]) -> str:
    """Return "steady" if each of these relative standard errors is at most 2%, else "noisy: ..."."""
    what, error = max(errors.items(), key=lambda item: item[1])
    if error <= PRECISE:
        return "steady"
    remedy = "close other programs or raise seconds"
    return f"noisy: the standard error of {what} is {error:.1%}, above {PRECISE:.0%}; {remedy}"


def _others(f: Callable, against: Callable | dict[str, Callable] | None) -> dict[str, Callable]:
    """Return the functions of `against` by name, after checking that all can be called."""
    others = against if isinstance(against, dict) else {} if against is None else {"against": against}
    for name, function in (("f", f), *others.items()):
        if not callable(function):
            raise TypeError(must(f"time: {name}", "be callable", type(function).__name__))
    return others


def _arguments(inputs: dict | tuple, gradients: tuple) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the arguments by name, or by the digits of their position, and the names in `gradients`."""
    if not isinstance(inputs, (dict, tuple)):
        rule = "be a dict of keyword arguments or a tuple of positional ones"
        raise TypeError(must("time: inputs", rule, type(inputs).__name__))
    args = inputs if isinstance(inputs, dict) else {str(i): x for i, x in enumerate(inputs)}
    tensors = {name: x for name, x in args.items() if isinstance(x, Tensor)}
    if not tensors:
        raise ValueError(must("time: inputs", "contain a tensor, whose device selects the clock", "none"))
    floating = [name for name, x in tensors.items() if x.is_floating_point()]
    if isinstance(gradients, str) or not set(map(str, gradients)) <= set(floating):
        rule = f"be a tuple of floating inputs, of {', '.join(floating) or 'which there are none'}"
        raise ValueError(must("time: gradients", rule, repr(gradients)))
    return args, tuple(map(str, gradients))


def _positional(function: Callable) -> Callable:
    return lambda **args: function(*args.values())
