"""A function, what it is compared with, and the parts of a report about it."""

import functools
import itertools
import math
import os
import pickle
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from electra_fast.errors import must
from electra_fast.testing.cases import case, judge_ordinary
from electra_fast.testing.checks import CHECKS, ISOLATED
from electra_fast.testing.child import Child, Died, NoStart
from electra_fast.testing.distributions import PROPERTIES, distribution_rows
from electra_fast.testing.example import Example
from electra_fast.testing.examples import examples
from electra_fast.testing.importing import imported
from electra_fast.testing.judge import BadReference, Overflow, blame, judge_example
from electra_fast.testing.report import RAISED, RIGHT, UNSUPPORTED, WRONG, Report, Row
from electra_fast.testing.supports import OWN, Supports, checked, dtype_of, fit, not_compared

CHANCE = 2.0  # multiple of the budget that is right for a stable example: one of hundreds may be beyond it
ENOUGH = 3  # examples in a row that end the process, or wrong random cases, after which no other is run
# Measured with Triton 3.7: a float32 stored as bfloat16, the product of two, and their sum over an axis.
BITS = (
    "Triton's interpreter rounds to bfloat16 towards zero, and adds and multiplies its bits as integers. "
    "If this is a Triton kernel, convert to float32 after each load, and check bfloat16 on a GPU."
)


# --- one example --------------------------------------------------------------------------------------------


def rows_of(function: Callable, supports: Supports, example: Example) -> list[Row]:
    """Return the rows of one example; an error of the function is a row too."""
    row = functools.partial(Row, *title_of(example))
    if reason := not_compared(example, supports):
        return [row("", UNSUPPORTED, reason)]
    compared, left_out = _narrowed(example, supports)
    rows = [row(quantity, UNSUPPORTED, why) for quantity, why in left_out.items()]
    outcome = attempt(lambda: judge_example(function, compared), f"{example.op} ({example.name})")
    if isinstance(outcome, tuple):
        verdict, why = outcome
        layout = blame(function, compared) if verdict == WRONG else ""
        return [row("", verdict, why + layout)]
    if example.stable:
        outcome = [j._replace(why="") if j.ratio <= CHANCE else j for j in outcome]
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
        with warnings.catch_warnings():  # of extreme values, on purpose
            warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton.runtime.interpreter")
            return call()
    except BadReference:
        raise
    except Overflow as error:
        return UNSUPPORTED, str(error)
    except NotImplementedError as error:
        return UNSUPPORTED, f"NotImplementedError: {_first_line(error)}"
    except AssertionError as error:
        return WRONG, str(error) or f"{title}: AssertionError {_place(error)}"
    except (Exception, SystemExit) as error:  # of any type: it is a finding about the function
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


def rows_of_case(function: Callable, supports: Supports, number: int, subject: "Subject") -> list[Row]:
    """Return the row of one random case, or none for a case that is not ordinary."""
    example, kind = case(subject.op, number, small=_runs_interpreted())
    if kind != "ordinary" or not has_dtype(example, subject.dtypes):
        return []
    row = functools.partial(Row, "random cases", dtype_of(example), "")
    if reason := not_compared(example, supports):
        return [row(UNSUPPORTED, reason)]
    example = example.as_stable() if subject.stable else example
    compared, _ = _narrowed(example.to(device=subject.device), supports)
    outcome = attempt(lambda: judge_ordinary(function, compared), f"{example.op} ({example.name})")
    verdict, why = outcome if isinstance(outcome, tuple) else (WRONG, outcome) if outcome else (RIGHT, "")
    return [row(verdict, why)]


def _interpreter():
    """Return what Triton's interpreter knows of its last launch, or None if it is not loaded."""
    return getattr(sys.modules.get("triton.runtime.interpreter"), "interpreter_builder", None)


def _runs_interpreted() -> bool:
    """Return whether the function runs in Triton's interpreter, which is slow at large sizes."""
    return bool(getattr(_interpreter(), "grid_dim", None))  # of a launch since `Subject.tasks`


def rows_of_check(function: Callable, supports: Supports, name: str, example: Example) -> list[Row]:
    """Return the row of one optional check on one example."""
    title, dtype = title_of(example)
    compared, _ = _narrowed(example, supports)
    outcome = attempt(lambda: CHECKS[name](function, compared), f"{example.op} ({example.name}): {name}")
    verdict, why = outcome or (RIGHT, "")
    return [Row(f"{name}: {title}", dtype, "", verdict, why.removeprefix("NotImplementedError: "))]


# --- all examples of a function -----------------------------------------------------------------------------


def has_dtype(example: Example, dtypes: Collection[torch.dtype] | None) -> bool:
    used = {example.args[name].dtype for name in example.gradients}
    return dtypes is None or not used or bool(used & set(dtypes))


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
    cases: int = 0  # random cases of the op, with which large sizes and rare combinations come
    stable: bool = False  # see `Example.stable`
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
            found = examples(self.op, self.seed, lambda example: not not_compared(example, supports))
        if (interpreter := _interpreter()) is not None:
            interpreter.grid_dim = None
        chosen = []
        for example in found:
            if has_dtype(example, self.dtypes):
                example = example.as_stable() if self.stable else example
                chosen.append(example.to(device=self.device))
                yield Task(*title_of(example), functools.partial(rows_of, function, supports, chosen[-1]))
        for number in range(self.seed, self.seed + self.cases):
            rows = functools.partial(rows_of_case, function, supports, number, self)
            yield Task("random cases", "", rows)
        if supports.get("random") == "own" and self.op in PROPERTIES:
            rows = functools.partial(distribution_rows, function, self.op, supports, self.device)
            yield Task("distribution", "", rows)
        few = {dtype_of(e): e for e in reversed(chosen) if not not_compared(e, supports)}  # one per dtype
        for name, example in itertools.product(self.checks, reversed(few.values())):
            title, dtype = title_of(example)
            rows = functools.partial(rows_of_check, function, supports, name, example)
            yield Task(f"{name}: {title}", dtype, rows)


def _found(subject: Subject, isolate: bool, limit: float, progress: bool) -> Iterator[list[Row]]:
    """Yield the rows of each task of a subject."""
    tasks, deaths, wrong_cases = subject.tasks(), 0, 0
    if isolate:
        _assert_importable(subject)
    child = Child(limit, _answers, subject) if isolate else None
    try:
        for i, task in enumerate(_shown(tasks, subject.op) if progress else tasks):
            if task.example == "random cases" and wrong_cases >= ENOUGH:
                why = f"not run, because {ENOUGH} random cases were wrong"
                yield [Row(task.example, "", "", UNSUPPORTED, why)]
                continue
            try:
                rows = child.ask(i) if child else task.rows()
                wrong_cases += sum(row.example == "random cases" and row.verdict == WRONG for row in rows)
                deaths = 0
                yield rows
            except Died as error:
                outside = "; it read beyond the end of an input" if task.example.startswith("reads:") else ""
                why = f"{subject.op} ({task.example}): {error}{outside}"
                yield [Row(task.example, task.dtype, "", RAISED, why)]
                deaths += 1
            if deaths == ENOUGH:
                left = len(tasks) - i - 1
                why = f"{left} examples were not run, because {ENOUGH} in a row ended the process"
                yield [Row("others", "", "", RAISED, f"{subject.op}: {why}")] if left else []
                return
    except NoStart as error:
        rule = "be importable by a new process, with isolate"
        remedy = 'in a script, call this below `if __name__ == "__main__":`'
        raise ValueError(must(f"{subject.call}: its functions", rule, error, remedy)) from None
    finally:
        if child:
            child.close()


def _assert_importable(subject: Subject) -> None:
    try:
        pickle.dumps(subject)
    except Exception as error:  # pickle raises different types
        rule, remedy = "be defined in a module, with isolate", "move lambdas and inner functions there"
        got = f"{type(error).__name__}: {_first_line(error)}"
        raise ValueError(must(f"{subject.call}: its functions", rule, got, remedy)) from None


def _shown(tasks: list[Task], title: str) -> Iterator[Task]:
    from tqdm import tqdm

    return tqdm(tasks, desc=title, unit=" examples", leave=False, disable=None)


def _answers(subject: Subject) -> Callable[[int], list[Row]]:
    """Return the function that runs a task by its number, in the child process."""
    from electra_fast import testing

    if "triton.language.standard" not in sys.modules:  # a script may have imported Triton for another use
        testing.interpret()
    ISOLATED.set(True)
    tasks = subject.tasks()
    return lambda i: tasks[i].rows()


def name_of(function: Callable | str) -> str:
    return function if isinstance(function, str) else getattr(function, "__name__", type(function).__name__)


def report_of(subject: Subject, isolate: bool, limit: float, progress: bool) -> Report:
    """Run all parts of a subject."""
    start = time.monotonic()
    report = Report(subject.op, name_of(subject.function), subject.device, subject.seed)
    for rows in _found(subject, isolate, limit, progress):
        report.rows += rows
    bad = {row.dtype for row in report.rows if row.verdict in (WRONG, RAISED)}
    if bad == {"bfloat16"} and os.environ.get("TRITON_INTERPRET") == "1":
        report.note = BITS
    report.seconds = time.monotonic() - start
    return report
