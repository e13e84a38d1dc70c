"""`benchmarks.time`: its fields, its line per function, its rule about noise, and what it refuses."""

import fake_runs  # noqa: F401  makes the benchmarks importable
import pytest
import torch

import benchmarks
from benchmarks.harness import timing
from benchmarks.harness.clock import Timed

X, Y = torch.ones(4), torch.full((4,), 2.0)


def samples(*times):
    return Timed(None, "CPU time", None, times=list(times))


def test_the_numbers_are_those_of_the_samples():
    found = timing.compared("mine", samples(2e-3, 4e-3, 3e-3, 3e-3, 3e-3), {"other": samples(*[6e-3] * 5)})
    assert (found.median, found.rounds, found.how) == (3e-3, 5, "CPU time")
    assert found.p20 == pytest.approx(2.8e-3) and found.p80 == pytest.approx(3.2e-3)
    assert found.ratio["other"].value == pytest.approx(2) and found.against["other"].median == 6e-3
    mine, other = str(found).splitlines()
    assert mine.startswith("mine   3.00 ms  (2.80 - 3.20)  5 rounds, CPU time; noisy: ")
    assert other.startswith("other  6.00 ms  (6.00 - 6.00)  mine is 2.00x as fast, ± ")
    assert (
        str(timing.compared("f", samples(5e-6), {}))
        == "f  5.00 us  (5.00 - 5.00)  1 rounds, CPU time; steady"
    )


@pytest.mark.parametrize(
    ("others", "verdict"),
    [
        ([1.0, 1.01] * 10, "steady"),
        (
            [1.0, 1.5] * 10,
            "noisy: the standard error of the ratio to other is 6.7%, above 2%; close other prog",
        ),
    ],
)
def test_a_standard_error_above_two_per_cent_is_noise(others, verdict):
    assert timing.compared("f", samples(*[1.0] * 20), {"other": samples(*others)}).verdict.startswith(verdict)
    drift = [1.0, 1.5] * 10
    found = timing.compared("f", samples(*drift), {"other": samples(*drift)})
    assert "of the median of f is" in found.verdict and found.ratio["other"].error == 0, "both drift alike"


def test_functions_are_called_with_the_inputs_by_the_clock_of_their_device(device):
    seen, inputs = [], (X.to(device), Y.to(device))

    def mine(x, y):
        seen.append((x, y, torch.is_grad_enabled()))
        return x + y

    found = benchmarks.time(mine, inputs, {"add": torch.add, "mul": torch.mul}, seconds=1e-3)
    assert found.name == "mine" and list(found.ratio) == list(found.against) == ["add", "mul"]
    how = {"cpu": "CPU time of all threads", "cuda": "graph replay, cold L2"}
    assert found.rounds == timing.ROUNDS and found.how == how[device]
    assert all(x is inputs[0] and y is inputs[1] and not grad for x, y, grad in seen)
    assert list(benchmarks.time(torch.add, {"input": X, "other": Y}, torch.mul, 1e-3).ratio) == ["against"]


def test_gradients_are_part_of_the_call():
    seen = []

    class Mine(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, y):
            return x * y

        @staticmethod
        def backward(ctx, dy):
            seen.append(ctx.needs_input_grad)
            return dy, dy

    benchmarks.time(Mine.apply, (X, Y), seconds=1e-3, gradients=(1,))
    assert set(seen) == {(False, True)} and not Y.requires_grad
    benchmarks.time(lambda a, b: Mine.apply(a, b), {"a": X, "b": Y}, seconds=1e-3, gradients=("a", "b"))
    assert seen[-1] == (True, True)


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"f": 3}, TypeError, "time: f must be callable, got int"),
        ({"against": {"a": 3}}, TypeError, "time: a must be callable, got int"),
        ({"against": 3}, TypeError, "time: against must be callable, got int"),
        (
            {"inputs": [X, Y]},
            TypeError,
            "time: inputs must be a dict of keyword arguments or a tuple of posit",
        ),
        (
            {"inputs": X},
            TypeError,
            "time: inputs must be a dict of keyword arguments or a tuple of positional",
        ),
        (
            {"inputs": (1, 2)},
            ValueError,
            "time: inputs must contain a tensor, whose device selects the clock",
        ),
        (
            {"gradients": (2,)},
            ValueError,
            r"time: gradients must be a tuple of floating inputs, of 0, 1, got \(2,\)",
        ),
        (
            {"gradients": "0"},
            ValueError,
            "time: gradients must be a tuple of floating inputs, of 0, 1, got '0'",
        ),
        ({"seconds": 0}, ValueError, "time: seconds must be above 0, got 0"),
    ],
)
def test_what_cannot_be_timed_is_refused(options, error, sentence):
    with pytest.raises(error, match=sentence):
        benchmarks.time(**{"f": torch.add, "inputs": (X, Y)} | options)


def test_a_name_that_the_package_has_not_is_refused():
    with pytest.raises(AttributeError, match="has no attribute 'times'"):
        benchmarks.times  # noqa: B018
