"""Whether two calls of a function give the same bits, and the memory of a tensor."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from electra_fast.testing.example import Example
from electra_fast.testing.judge import backward, forward, upstream
from electra_fast.testing.layouts import with_layout_of

Tensors = dict[str, Tensor]
Outcome = tuple[Tensors, Tensors]  # of `judge.run`: results and gradients by name


def title(example: Example) -> str:
    """Return the beginning of a message about an example."""
    return f"{example.op} ({example.name})"


def difference(x: Tensor, y: Tensor) -> str:
    """Return in words where two tensors differ first; empty if they are the same.

    A NaN equals a NaN, and 0 equals -0.
    """
    if (x.dtype, x.shape) != (y.dtype, y.shape):
        return f"{x.dtype} {list(x.shape)} and {y.dtype} {list(y.shape)}"
    differ = ((x != y) & ~(x.isnan() & y.isnan())).nonzero()
    if not len(differ):
        return ""
    at = tuple(differ[0].tolist())
    return f"{x[at].item()} and {y[at].item()} at {list(at)}"


def assert_same(example: Example, what: str, wanted: Outcome, got: Outcome) -> None:
    """Assert that two outcomes have the same bits; `what` says which outcomes they are."""
    for kind, these, those in zip(("", "gradient of "), wanted, got, strict=True):
        other = f"{title(example)}: {kind}{', '.join(these)} and {kind}{', '.join(those)} {what}"
        if these.keys() != those.keys():
            raise AssertionError(other)
        for name, x in these.items():
            why = difference(x, those[name])
            if why:
                raise AssertionError(f"{title(example)}: {kind}{name} differs {what}: {why}")


def span(x: Tensor) -> Tensor:
    """Return the memory from the first to the last element of x, as one axis."""
    last = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
    return x.as_strided((last + 1 if x.numel() else 0,), (1,))


def device_of(example: Example) -> torch.device:
    """Return the device of the tensors, the CPU if there is none."""
    return next((x.device for x in example.tensors().values()), torch.device("cpu"))


def with_other_values(example: Example) -> Example:
    """Return the example with its floats halved, and in the opposite order along the last of several axes.

    Raises:
        NotImplementedError: there are no floats.
    """
    floats = {n: x for n, x in example.tensors().items() if x.is_floating_point()}
    if not floats:
        raise NotImplementedError("no floats that could have other values")
    halves = {n: with_layout_of((x.flip(-1) if x.dim() > 1 else x) / 2, x) for n, x in floats.items()}
    return replace(example, args=example.args | halves)


def run_placed(f: Callable, example: Example, place: Callable[[Tensors], Tensors]) -> Outcome:
    """Run f like `judge.run`, with its tensors and its upstream gradients where `place` copies them."""
    args = example.args | place(example.tensors())
    args |= {name: args[name].requires_grad_() for name in example.gradients}
    results = forward(f, example, args)
    names = [f"the upstream gradient of {name}" for name, y in results.items() if y.requires_grad]
    given = place(dict(zip(names, upstream(example, results), strict=True)))
    gradients = backward(example, args, results, [*given.values()])
    return {name: y.detach() for name, y in results.items()}, gradients
