"""Compare any function with an op or with a reference of your own: `report`, `check_op`, `check`."""

import functools
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from electra_fast.errors import must
from electra_fast.ops import Ops
from electra_fast.testing.checks import check_names
from electra_fast.testing.definition import check_function
from electra_fast.testing.example import DTYPES, Definition, Example
from electra_fast.testing.examples import examples
from electra_fast.testing.judge import defined, judge_example
from electra_fast.testing.report import Report, Row
from electra_fast.testing.subject import Subject, has_dtype, name_of, report_of, rows_of
from electra_fast.testing.supports import Supports, declaration, fit, not_compared, parameters


def check_example(function, example: Example) -> None:
    """Raise AssertionError for the first result or gradient that `judge_example` finds wrong."""
    for judgement in judge_example(function, example):
        judgement.assert_right()


def _subject(
    call: str, op: str, function: Callable | str, adapter, supports, checks, seed, device, dtypes,
    limit: float = 1.0, cases: int = 0, stable: bool = False, inputs: list[Example] | None = None,
) -> Subject:  # fmt: skip
    """Return the subject of a report, after checking the arguments that are the same for every op.

    Raises:
        TypeError, ValueError: an argument breaks a rule; the message names it.
    """
    seed = torch.seed() % 2**31 if seed is None else seed
    if not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ValueError(must(f"{call}: seed", "be an integer in [0, 2^63)", repr(seed)))
    if not isinstance(limit, int | float) or not 0 < limit < math.inf:
        raise ValueError(must(f"{call}: limit", "be a positive number of seconds", repr(limit)))
    if not isinstance(cases, int) or cases < 0:
        raise ValueError(must(f"{call}: cases", "be 0 or more", repr(cases)))
    names, device, dtypes = check_names(call, checks), _device(call, device), _dtypes(call, dtypes)
    return Subject(call, op, function, adapter, supports, names, seed, device, dtypes, cases, stable, inputs)


def _dtypes(call: str, dtypes: Iterable[torch.dtype] | None) -> tuple[torch.dtype, ...] | None:
    if dtypes is None:
        return None
    dtypes = (dtypes,) if isinstance(dtypes, torch.dtype) else tuple(dtypes)
    if not dtypes or not set(dtypes) <= set(DTYPES):
        raise ValueError(must(f"{call}: dtypes", f"be some of {', '.join(map(str, DTYPES))}", dtypes))
    return dtypes


def _device(call: str, device: str | torch.device) -> str:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:  # of an unknown device, or an absent one
        got = f"{device}: {str(error).strip().partition(chr(10))[0]}"
        raise ValueError(must(f"{call}: device", "be usable here", got)) from None
    return str(device)


def report(
    op: str, function: Callable | str, *, adapter: Callable | str | None = None,
    supports: Supports | None = None, checks: Collection[str] = (), seed: int | None = None,
    device: str = "cpu", dtypes: Iterable[torch.dtype] | None = None, cases: int = 24, strict: bool = False,
    isolate: bool = False, limit: float = 60.0, progress: bool = False,
) -> Report:  # fmt: skip
    """Compare a function with an op on every example, and return what is right, wrong and unsupported.

    Args:
        op: a name in `electra_fast.ops.Ops`.
        function: has the signature of that op, or lacks some of its optional arguments; it is called with
            keywords. "module:function" is imported.
        adapter: for a function with another signature: a name in `ADAPTERS[op]`, or a function that returns
            `function` with the op's signature.
        supports: what the function supports, for example ``{"dropout": False, "head_dims": (64,)}``; see
            `electra_fast.testing.supports`. A NotImplementedError of the function is counted too.
        checks: names in `testing.CHECKS`, or "all": further properties, checked on a few examples.
        seed: the seed of the example inputs; None draws a new one.
        device: the device of the inputs.
        dtypes: the floating dtypes to try; None: float32, bfloat16 and float16.
        strict: a result must be as exact as that of plain PyTorch also where terms cancel. Without, it may
            be as far away as one rounding of the inputs moves the exact result.
        cases: the number of seeds for random cases after the examples; `fuzz_op` tries more.
        isolate: run the examples in a child process, so that a crash or a hang is one row of the report. The
            function must be importable then.
        limit: seconds for one example, with `isolate`.
        progress: show a progress bar.

    Raises:
        TypeError: the function has another signature; the message shows the difference.
        ValueError: an unknown name of an op, adapter, check or of something supported.
    """
    if not isinstance(function, str):
        check_function("report", op, function)
    elif op not in Ops._fields:
        check_function("report", op, len)
    options = checks, seed, device, dtypes, limit, cases, not strict
    subject = _subject("report", op, function, adapter, supports, *options)
    return report_of(subject, isolate, limit, progress)


def check_op(
    op: str, function: Callable, *, adapter=None, supports: Supports | None = None, seed: int | None = None,
    device: str = "cpu", dtypes: Iterable[torch.dtype] | None = None, strict: bool = True,
) -> Report:  # fmt: skip
    """Compare an implementation of an op with the reference: `check_op("rtd_loss", my_function)`.

    It is `report` with an assertion, and ends with the first example that is wrong. It is strict, and there
    are no random cases.

    Args: those of `report`. The seed is part of the error message.

    Returns:
        the report, which lists what is not supported.

    Raises:
        AssertionError: an integer result differs from the reference, an error exceeds the budget (the
            message names the worst element), the function raises an error, or NotImplementedError for
            something that `supports` does not declare.
    """
    check_function("check_op", op, function)
    options = (), seed, device, dtypes, 1.0, 0, not strict
    subject = _subject("check_op", op, function, adapter, supports, *options)
    found = Report(op, name_of(function), subject.device, subject.seed)
    for task in subject.tasks():
        found.rows += task.rows()
        found.assert_nothing_wrong()
    found.assert_right()
    return found


def kernel_examples(
    op: str, *, adapter: Callable | str | None = None, supports: Supports | None = None, seed: int = 0,
    device: str | None = None, dtypes: Collection[torch.dtype] | None = None,
) -> dict[str, Callable[[Callable], list[Row]]]:  # fmt: skip
    """Return by name, for each example of an op, the function that compares a function with it.

    Args: those of `report`; without `device` a GPU is used if there is one.
    """
    check_function("kernel", op, len)
    declared = declaration("kernel", op, adapter, supports)
    device, dtypes = device or ("cuda" if torch.cuda.is_available() else "cpu"), _dtypes("kernel", dtypes)
    chosen = examples(op, seed, lambda example: not not_compared(example, declared))

    def compare(example: Example, function: Callable) -> list[Row]:
        check_function("kernel", op, function)
        fitted = fit("kernel", op, function, adapter, supports)
        return rows_of(*fitted, example.as_stable().to(device=device))

    return {
        e.name.replace("torch.", ""): functools.partial(compare, e) for e in chosen if has_dtype(e, dtypes)
    }


def check(
    function: Callable, reference: Callable, inputs: dict[str, Any] | Sequence[dict[str, Any] | Example],
    *, gradients: Collection[str] = (), low: Callable | None = None, supports: Supports | None = None,
    checks: Collection[str] = (), seed: int = 0, device: str = "cpu",
    isolate: bool = False, limit: float = 60.0,
) -> Report:  # fmt: skip
    """Compare any function with a reference of your own by the error budget; return the report.

    The reference is run in float64, and `low` in the dtype of the inputs, as the scale of the budget.

        testing.check(my_softmax, lambda x: x.softmax(-1), {"x": torch.randn(33, 100)}, gradients=["x"])

    Args:
        function: called with the inputs by name; returns a tensor, or a tuple, NamedTuple or dict of tensors.
        reference: the same in PyTorch. It must compute in the dtype of its inputs.
        inputs: the arguments of one call by name, a list of such dicts, or `testing.inputs(...)`.
        gradients: the arguments whose gradients are compared too.
        low: the same mathematics in plain PyTorch; None: `reference`.
        supports: as for `report`, without the names of an op.
        checks: names in `testing.CHECKS`, or "all".
        seed: named in error messages; give the seed with which the inputs were made.
        device: the device to which the inputs are moved.
        isolate, limit: as for `report`.

    Raises:
        AssertionError: a result or a gradient exceeds its budget, or the function raises an error; the
            message has the whole report.
        TypeError: the function does not accept the inputs by name.
        ValueError: the reference fails, or does not compute in float64.
    """
    for subject, one in (("function", function), ("reference", reference)):
        if not callable(one):
            raise TypeError(must(f"check: {subject}", "be callable", type(one).__name__))
    if isinstance(gradients, str):
        raise TypeError(must("check: gradients", "be a list of names", repr(gradients)))
    found = _as_examples(function, Definition(reference, low or reference), inputs, tuple(gradients))
    options = supports, checks, seed, device, None, limit, 0, True, found
    subject = _subject("check", found[0].op, function, None, *options)
    outcome = report_of(subject, isolate, limit, progress=False)
    try:
        outcome.assert_right()
    except AssertionError as error:
        raise AssertionError(f"{error}\n\n{outcome}") from None
    return outcome


def _as_examples(
    function: Callable, definition: Definition, inputs, gradients: tuple[str, ...]
) -> list[Example]:
    """Return the inputs of `check` as examples, after running the reference on the first one."""
    name, calls = name_of(function), [inputs] if isinstance(inputs, dict) else list(inputs)
    if not calls:
        raise ValueError(must("check: inputs", "have a call", "none"))
    found = []
    for i, call in enumerate(calls):
        if isinstance(call, dict):
            call = Example(name, f"inputs {i}" if len(calls) > 1 else "inputs", call)
        elif not isinstance(call, Example):
            rule = "be a dict of arguments, a list of these, or testing.inputs(...)"
            raise TypeError(must("check: inputs", rule, type(call).__name__))
        wanted = gradients or call.gradients
        for argument in wanted:
            x = call.args.get(argument)
            if not isinstance(x, Tensor) or not x.is_floating_point():
                got = f"{argument}, of type {type(x).__name__}" if argument in call.args else argument
                raise ValueError(must("check: gradients", "name floating tensors of the inputs", got))
        options = {"op": name, "gradients": tuple(wanted), "definition": definition, "stable": True}
        plain = call.plain and replace(call.plain, **options)
        found.append(replace(call, plain=plain, **options))
    names = parameters(function)
    if names is not None and (other := [argument for argument in found[0].args if argument not in names]):
        got = f"({', '.join(names)}), which lacks {', '.join(other)}"
        raise TypeError(must(f"check: {name}", "accept the inputs by name", got, "rename the inputs"))
    results, _ = defined(definition.reference, found[0].to(torch.float64, "cpu"))
    floats = {y.dtype for y in results.values() if y.is_floating_point()}
    if floats - {torch.float64}:
        rule, remedy = "compute in the dtype of its inputs", "do not cast inside it"
        raise ValueError(must("check: reference", rule, f"{floats.pop()} results in float64", remedy))
    return found
