"""Compare any function with an op or with a reference of your own: `report`, `check_op`, `check`."""

import functools
import math
import time
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from electra_fast.errors import must
from electra_fast.ops import Ops
from electra_fast.testing.child import Child, Died
from electra_fast.testing.example import Definition, Example
from electra_fast.testing.examples import examples
from electra_fast.testing.importing import imported
from electra_fast.testing.judge import BadReference, Overflow, blame, defined, judge_example
from electra_fast.testing.report import RAISED, RIGHT, UNSUPPORTED, WRONG, Report, Row
from electra_fast.testing.supports import (
    OWN,
    Supports,
    checked,
    declaration,
    dtype_of,
    fit,
    parameters,
    unsupported,
)


def check_function(call: str, op: str, function) -> None:
    """Check the name of an op and that a function is callable; `call` begins the error message."""
    if op not in Ops._fields:
        raise ValueError(f"{call}: op must be one of {', '.join(Ops._fields)}, got {op}")
    if not callable(function):
        raise TypeError(f"{call}: function must be callable, got {type(function).__name__}")


def check_example(function, example: Example) -> None:
    """Raise AssertionError for the first result or gradient that `judge_example` finds wrong."""
    for judgement in judge_example(function, example):
        assert not judgement.why, judgement.why


# --- one example --------------------------------------------------------------------------------------------


def rows_of(function: Callable, supports: Supports, example: Example) -> list[Row]:
    """Return the rows of one example; an error of the function is a row too."""
    row = functools.partial(Row, *title_of(example))
    if reason := unsupported(example, supports):
        return [row("", UNSUPPORTED, reason)]
    compared, left_out = _narrowed(example, supports)
    rows = [row(quantity, UNSUPPORTED, why) for quantity, why in left_out.items()]
    outcome = attempt(lambda: judge_example(function, compared), f"{example.op} ({example.name})")
    if isinstance(outcome, tuple):
        verdict, why = outcome
        layout = blame(function, compared) if verdict == WRONG else ""
        return [row("", verdict, why + layout)]
    layout = blame(function, compared) if any(j.why for j in outcome) else ""
    for j in outcome:
        numbers = () if math.isnan(j.error) else (j.error, j.budget, j.ratio)
        verdict, why = (WRONG, f"{j.why}{layout}") if j.why else (RIGHT, "")
        rows.append(row(j.quantity, verdict, why, *numbers))
    return rows


def title_of(example: Example) -> tuple[str, str]:
    """Return the name of an example without its dtype, and the dtype."""
    dtype = dtype_of(example)
    return example.name.replace(f"torch.{dtype}", "").replace(" ,", ",").strip() or "any", dtype


def attempt(call: Callable[[], Any], title: str) -> Any:
    """Return what the call returns, or (verdict, why) of the error that it raises."""
    try:
        return call()
    except BadReference:
        raise
    except Overflow as error:
        return UNSUPPORTED, str(error)
    except NotImplementedError as error:
        return UNSUPPORTED, f"NotImplementedError: {_first_line(error)}"
    except AssertionError as error:
        return WRONG, str(error) or f"{title}: AssertionError {_place(error)}"
    except Exception as error:  # of any type: it is a finding about the function
        return RAISED, f"{title}: raised {type(error).__name__}: {_first_line(error)} {_place(error)}"


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _place(error: Exception) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"({Path(frame.filename).name}:{frame.lineno})"


def _narrowed(example: Example, supports: Supports) -> tuple[Example, dict[str, str]]:
    """Return the example with the gradients and results that are supported, and why others are left out."""
    left_out, gradients, results = {}, example.gradients, supports.get("results")
    allowed = supports.get("gradients", True)
    if allowed is not True:
        kept = tuple(name for name in gradients if allowed and name in allowed)
        left_out = {f"gradient of {name}": "gradients" for name in gradients if name not in kept}
        gradients = kept
    if supports.get("random") == "own" and example.op == "mlm_head":
        results = tuple(name for name in results or ("loss", "correct", "lse", "table") if name != "samples")
        left_out["samples"] = OWN
    return replace(example, gradients=gradients, results=results and tuple(results)), left_out


# --- all examples of a function -----------------------------------------------------------------------------


class Task(NamedTuple):
    """A part of a report that is run, isolated and limited in time as one."""

    example: str
    dtype: str
    rows: Callable[[], list[Row]]


class Subject(NamedTuple):
    """A function and what it is compared with. It can be pickled if the function can."""

    call: str  # begins the error messages
    op: str  # or the name of the function
    function: Callable | str
    adapter: Callable | str | None
    supports: Supports | None
    checks: tuple[str, ...]
    seed: int
    device: str
    dtypes: tuple[torch.dtype, ...] | None
    inputs: list[Example] | None = None  # None: the examples of the op

    def tasks(self) -> list[Task]:
        """Return the parts of the report.

        Raises:
            TypeError, ValueError: the function, the adapter or the declaration does not fit.
        """
        function = imported(self.call, self.function) if isinstance(self.function, str) else self.function
        adapter = self.adapter
        if isinstance(adapter, str) and ":" in adapter:
            adapter = imported(f"{self.call}: adapter", adapter)
        if self.inputs is None:
            function, supports = fit(self.call, self.op, function, adapter, self.supports)
        else:
            supports = checked(self.call, self.op, self.supports)
        return [*self._tasks(function, supports)]

    def _tasks(self, function: Callable, supports: Supports) -> Iterator[Task]:
        found = self.inputs
        if found is None:
            found = examples(self.op, self.seed, lambda example: not unsupported(example, supports))
        chosen = []
        for example in found:
            if _has_dtype(example, self.dtypes):
                chosen.append(example.to(device=self.device))
                yield Task(*title_of(example), functools.partial(rows_of, function, supports, chosen[-1]))


def _found(subject: Subject, isolate: bool, limit: float, progress: bool) -> Iterator[list[Row]]:
    """Yield the rows of each task of a subject."""
    from tqdm import tqdm

    tasks = subject.tasks()
    child = Child(limit, _answers, subject) if isolate else None
    bar = tqdm(tasks, desc=subject.op, unit=" examples", leave=False, disable=None if progress else True)
    try:
        for i, task in enumerate(bar):
            try:
                yield child.ask(i) if child else task.rows()
            except Died as error:
                why = f"{subject.op} ({task.example}): {error}"
                yield [Row(task.example, task.dtype, "", RAISED, why)]
    finally:
        if child:
            child.close()


def _answers(subject: Subject) -> Callable[[int], list[Row]]:
    """Return the function that runs a task by its number, in the child process."""
    from electra_fast import testing

    testing.interpret()
    tasks = subject.tasks()
    return lambda i: tasks[i].rows()


def _named(function: Callable | str) -> str:
    return function if isinstance(function, str) else getattr(function, "__name__", type(function).__name__)


def _report(subject: Subject, isolate: bool, limit: float, progress: bool) -> Report:
    report, start = (
        Report(subject.op, _named(subject.function), subject.device, subject.seed),
        time.monotonic(),
    )
    for rows in _found(subject, isolate, limit, progress):
        report.rows += rows
    report.seconds = time.monotonic() - start
    return report


def _seed(seed: int | None) -> int:
    return torch.seed() % 2**31 if seed is None else seed


def report(
    op: str, function: Callable | str, *, adapter: Callable | str | None = None,
    supports: Supports | None = None, checks: Collection[str] = (), seed: int | None = None,
    device: str = "cpu", dtypes: Iterable[torch.dtype] | None = None,
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
    dtypes = None if dtypes is None else tuple(dtypes)
    subject = Subject("report", op, function, adapter, supports, tuple(checks), _seed(seed), device, dtypes)
    return _report(subject, isolate, limit, progress)


def check_op(
    op: str, function: Callable, *, adapter=None, supports: Supports | None = None, seed: int | None = None,
    device: str = "cpu", dtypes: Iterable[torch.dtype] | None = None,
) -> Report:  # fmt: skip
    """Compare an implementation of an op with the reference: `check_op("rtd_loss", my_function)`.

    It is `report` with an assertion, and ends with the first example that is wrong.

    Args: those of `report`. The seed is part of the error message.

    Returns:
        the report, which lists what is not supported.

    Raises:
        AssertionError: an integer result differs from the reference, an error exceeds the budget (the
            message names the worst element), the function raises an error, or NotImplementedError for
            something that `supports` does not declare.
    """
    check_function("check_op", op, function)
    dtypes = None if dtypes is None else tuple(dtypes)
    subject = Subject("check_op", op, function, adapter, supports, (), _seed(seed), device, dtypes)
    found = Report(op, _named(function), device, subject.seed)
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
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    chosen = examples(op, seed, lambda example: not unsupported(example, declared))

    def compare(example: Example, function: Callable) -> list[Row]:
        check_function("kernel", op, function)
        return rows_of(*fit("kernel", op, function, adapter, supports), example.to(device=device))

    return {
        e.name.replace("torch.", ""): functools.partial(compare, e) for e in chosen if _has_dtype(e, dtypes)
    }


def _has_dtype(example: Example, dtypes: Collection[torch.dtype] | None) -> bool:
    used = {example.args[name].dtype for name in example.gradients}
    return dtypes is None or not used or bool(used & set(dtypes))


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
    found = _as_examples(function, Definition(reference, low or reference), inputs, tuple(gradients))
    subject = Subject(
        "check", found[0].op, function, None, supports, tuple(checks), seed, device, None, found
    )
    outcome = _report(subject, isolate, limit, progress=False)
    try:
        outcome.assert_right()
    except AssertionError as error:
        raise AssertionError(f"{error}\n\n{outcome}") from None
    return outcome


def _as_examples(
    function: Callable, definition: Definition, inputs, gradients: tuple[str, ...]
) -> list[Example]:
    """Return the inputs of `check` as examples, after running the reference on the first one."""
    name, calls = _named(function), [inputs] if isinstance(inputs, dict) else list(inputs)
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
        found.append(replace(call, op=name, gradients=tuple(wanted), definition=definition))
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
