"""Compare any function with an op or with a reference of your own: `report`, `check_op`, `check`."""

import functools
import math
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from electra_fast.ops import Ops
from electra_fast.testing.example import Example
from electra_fast.testing.examples import examples
from electra_fast.testing.judge import Overflow, blame, judge_example
from electra_fast.testing.report import OWN, RAISED, RIGHT, UNSUPPORTED, WRONG, Report, Row
from electra_fast.testing.supports import Supports, dtype_of, fit, unsupported


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


def rows_of(function: Callable, example: Example, supports: Supports) -> list[Row]:
    """Return the rows of one example. No error of the function gets out."""
    dtype = dtype_of(example)
    name = example.name.replace(f"torch.{dtype}", "").replace(" ,", ",").strip() or "any"
    row = functools.partial(Row, name, dtype)
    if reason := unsupported(example, supports):
        return [row("", UNSUPPORTED, reason)]
    own = supports.get("random") == "own"
    if own and (example.exact or example.args.get("dropout", 0) > 0):
        return [row("", UNSUPPORTED, OWN)]
    compared, left_out = _narrowed(example, supports, own)
    rows = [row(quantity, UNSUPPORTED, why) for quantity, why in left_out.items()]
    try:
        judgements = judge_example(function, compared)
    except Overflow as error:
        return [row("", UNSUPPORTED, str(error))]
    except NotImplementedError as error:
        return [row("", UNSUPPORTED, f"NotImplementedError: {_first_line(error)}")]
    except AssertionError as error:
        return [row("", WRONG, f"{error}{blame(function, compared)}", ratio=math.inf)]
    except Exception as error:  # of any type: it is a finding about the function
        frame = traceback.extract_tb(error.__traceback__)[-1]
        what = f"{type(error).__name__}: {_first_line(error)} ({Path(frame.filename).name}:{frame.lineno})"
        why = f"{example.op} ({example.name}): raised {what}"
        return [row("", RAISED, why)]
    layout = blame(function, compared) if any(j.why for j in judgements) else ""
    for j in judgements:
        numbers = () if math.isnan(j.error) else (j.error, j.budget, j.ratio)
        verdict, why = (WRONG, f"{j.why}{layout}") if j.why else (RIGHT, "")
        rows.append(row(j.quantity, verdict, why, *numbers))
    return rows


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _narrowed(example: Example, supports: Supports, own: bool) -> tuple[Example, dict[str, str]]:
    """Return the example with the gradients and results that are supported, and why others are left out."""
    left_out, gradients, results = {}, example.gradients, supports.get("results")
    allowed = supports.get("gradients", True)
    if allowed is not True:
        kept = tuple(name for name in gradients if allowed and name in allowed)
        left_out = {f"gradient of {name}": "gradients" for name in gradients if name not in kept}
        gradients = kept
    if own and example.op == "mlm_head":
        results = tuple(name for name in results or ("loss", "correct", "lse", "table") if name != "samples")
        left_out["samples"] = OWN
    return replace(example, gradients=gradients, results=results and tuple(results)), left_out


class Task(NamedTuple):
    """A part of a report that is run, isolated and limited in time as one."""

    title: str
    dtype: str
    rows: Callable[[], list[Row]]


def tasks_of_op(
    function: Callable, op: str, supports: Supports, seed: int, device: str, dtypes: Iterable | None
) -> Iterator[Task]:
    """Yield one task per example of an op."""
    for example in examples(op, seed):
        used = {example.args[name].dtype for name in example.gradients}
        if dtypes is None or not used or used & set(dtypes):
            example = example.to(device=device)
            yield Task(
                example.name, dtype_of(example), functools.partial(rows_of, function, example, supports)
            )


def check_op(
    op: str, function, *, adapter=None, supports: Supports | None = None, seed: int | None = None,
    device: str = "cpu", dtypes=None,
) -> None:  # fmt: skip
    """Compare an implementation of an op with the reference: `check_op("rtd_loss", my_function)`.

    It is `report` with an assertion, and ends with the first example that is wrong.

    Args:
        op: a name in `electra_fast.ops.Ops`.
        function: has the signature of that op, or lacks some optional arguments; called with keywords.
        adapter, supports: as for `report`.
        seed: the seed of the example inputs; None draws a new one, which is part of the error message.
        device: the device of the inputs.
        dtypes: the floating dtypes to try; None: float32, bfloat16 and float16.

    Raises:
        AssertionError: an integer result differs from the reference, an error exceeds the budget (the
            message names the worst element), the function raises an error, or NotImplementedError for
            something that `supports` does not declare.
    """
    check_function("check_op", op, function)
    seed = torch.seed() % 2**31 if seed is None else seed
    name = getattr(function, "__name__", type(function).__name__)
    function, supports = fit("check_op", op, function, adapter, supports)
    found = Report(op, name, device, seed)
    for task in tasks_of_op(function, op, supports, seed, device, dtypes):
        found.rows += task.rows()
        found.assert_nothing_wrong()
    found.assert_right()
