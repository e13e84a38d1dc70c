"""Optional checks of any function: memory, strides, autograd, the compiler, CUDA graphs, streams, threads.

`CHECKS[name](f, example)` calls `f` as `judge.run` does. It returns None if the function is right. It raises
AssertionError with the argument or result and the place if it is wrong, and NotImplementedError with the
reason if it cannot be checked here. Every other error is one of the function.
"""

import ctypes
import inspect
import math
import mmap
import sys
import threading
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from electra_fast.errors import must
from electra_fast.testing.checks.bits import (
    assert_same,
    device_of,
    difference,
    run_placed,
    span,
    title,
    with_other_values,
)
from electra_fast.testing.checks.cuda import graph, races, streams
from electra_fast.testing.definition import definition_of, results_by_name
from electra_fast.testing.example import Definition, Example
from electra_fast.testing.judge import backward, blame, forward, judge_example, leaves, run, upstream
from electra_fast.testing.memory import MARGIN, guarded_memory
from electra_fast.testing.supports import parameters

# Whether this process may crash, because another one watches it. `reads` runs only then.
ISOLATED: ContextVar[bool] = ContextVar("isolated", default=False)
ROUNDS = 10  # calls by each of two threads


class Check(NamedTuple):
    """A check that is called with a function and an example."""

    says: str  # what is true of a right function
    run: Callable[[Callable, Example], None]

    def __call__(self, f: Callable, example: Example) -> None:
        self.run(f, example)


def _assert_right(f: Callable, example: Example, layout: str = "") -> None:
    """Assert that the values are within the budget; if not, name the arguments in which `layout` is wrong."""
    wrong = [judgement.why for judgement in judge_example(f, example) if judgement.why]
    if wrong:
        raise AssertionError(wrong[0] + (blame(f, replace(example, layout=layout)) if layout else ""))


def _needs_gradients(example: Example) -> None:
    if not example.gradients:
        raise NotImplementedError("no gradients")


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


# --- memory and strides -------------------------------------------------------------------------------------


def determinism(f, example):
    """Three calls give the same bits."""
    first = run(f, example)
    for _ in range(2):
        assert_same(example, "between two calls", first, run(f, example))


class _Bands:
    """Copies tensors to memory between two bands, none of which may change."""

    def __init__(self, poison: float):
        self.poison, self.made = poison, []

    def __call__(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: self.copy(name, x) for name, x in tensors.items()}

    def copy(self, name: str, x: Tensor) -> Tensor:
        value = self.poison if x.is_floating_point() else int(math.isnan(self.poison))  # legal ids
        buffer = torch.full((len(span(x)) + 2 * MARGIN,), value, dtype=x.dtype, device=x.device)
        buffer[MARGIN:-MARGIN] = span(x)
        self.made.append((name, buffer, buffer.clone()))
        return buffer.as_strided(x.shape, x.stride(), MARGIN)

    def check(self, example: Example) -> None:
        for name, buffer, before in self.made:
            for where, part in (
                ("before", slice(MARGIN)),
                ("into", slice(MARGIN, -MARGIN)),
                ("after", slice(-MARGIN, None)),
            ):
                why = difference(before[part], buffer[part])
                if why:
                    raise AssertionError(f"{title(example)}: wrote {where} the memory of {name}: {why}")


def memory(f, example):
    """It writes only to its own tensors, and its results depend only on inputs and on what it wrote."""
    outcomes = []
    for poison in (math.nan, 3e4):
        bands = _Bands(poison)
        with guarded_memory(poison, f"{title(example)}: the function"):
            outcomes.append(run_placed(f, example, bands))
        bands.check(example)
    assert_same(example, "with the contents of memory that is uninitialized or outside the inputs", *outcomes)


def _fenced(x: Tensor) -> Tensor:
    """Return x in memory whose last byte is followed by a page that cannot be accessed."""
    values = span(x)
    if not len(values):
        return x.clone()
    size = -(-values.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    pages = mmap.mmap(-1, size + mmap.PAGESIZE)
    end = ctypes.addressof(ctypes.c_char.from_buffer(pages)) + size
    library = ctypes.CDLL(None, use_errno=True)
    if library.mprotect(ctypes.c_void_p(end), ctypes.c_size_t(mmap.PAGESIZE), 0):
        raise OSError(ctypes.get_errno(), "mprotect")
    moved = torch.frombuffer(pages, dtype=x.dtype, count=len(values), offset=size - values.nbytes)
    return moved.copy_(values).as_strided(x.shape, x.stride())


def reads(f, example):
    """It reads nothing after the last element of an input. If it does, the process ends."""
    if device_of(example).type != "cpu":
        raise NotImplementedError("needs inputs on the CPU")
    if not ISOLATED.get():
        raise NotImplementedError("needs isolate=True")
    run_placed(f, example, lambda tensors: {name: _fenced(x) for name, x in tensors.items()})


def _right_inputs(f: Callable, example: Example, layout: str) -> None:
    names = example.tensors()
    if not names:
        raise NotImplementedError("no tensors")
    variant = replace(example.laid_out(layout, *names), name=f"{example.name}, inputs {layout}")
    _assert_right(f, variant, layout)


def misaligned(f, example):
    """Inputs whose address is not a multiple of a vector give the right values."""
    _right_inputs(f, example, "offset")


def strided(f, example):
    """Inputs with any strides give the right values."""
    for layout in ("strided", "transposed"):
        _right_inputs(f, example, layout)


def upstream_(f, example):
    """Upstream gradients with any strides give the right gradients."""
    _needs_gradients(example)
    for layout in ("strided", "transposed", "expanded"):
        name = f"{example.name}, upstream gradients {layout}"
        _assert_right(f, replace(example, name=name, layout=layout, plain=example), layout)


# --- autograd, the compiler and precision -------------------------------------------------------------------


def saved(f, example):
    """A second backward pass gives the same gradients, and changes no input and no saved tensor."""
    _needs_gradients(example)
    example = example.to()  # a changed input does not concern other checks
    args, kept = leaves(example), []
    kept += [(name, x.detach(), x.detach().clone()) for name, x in args.items() if isinstance(x, Tensor)]

    def pack(x):
        kept.append((f"a saved tensor of shape {list(x.shape)}", x.detach(), x.detach().clone()))
        return len(kept) - 1

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda i: kept[i][1]):
        results = forward(f, example, args)
    given, gradients = upstream(example, results), []
    for _ in range(2):
        gradients.append(({}, backward(example, args, results, given, retain_graph=True)))
        for name, x, before in kept:
            why = difference(before, x)
            if why:
                raise AssertionError(f"{title(example)}: the backward pass changes {name}: {why}")
    assert_same(example, "in a second backward pass", *gradients)


def inplace(f, example):
    """An input that is changed after the call is detected by autograd or does not change the gradients."""
    _needs_gradients(example)
    _, wanted = run(f, example)
    for name in example.tensors():
        args = leaves(example.to())
        results = forward(f, example, args)
        given = upstream(example, results)
        with torch.no_grad():
            span(args[name]).zero_()  # 0 is a legal id
        try:
            got = backward(example, args, results, given)
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error):
                raise
        else:
            assert_same(example, f"if {name} is set to 0 after the call", ({}, wanted), ({}, got))


def compile_(f, example):
    """The one graph that torch.compile makes of it gives the same bits, forward and backward."""
    wanted = run(f, example)
    torch._dynamo.reset()
    compiled = torch.compile(lambda **args: f(**args), fullgraph=True, backend="aot_eager")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Dynamo itself uses what PyTorch deprecates
            got = run(compiled, example)
    except Exception as error:  # of any type: the call itself has succeeded
        raise AssertionError(f"{title(example)}: not compiled: {_said(error)}") from error
    assert_same(example, "between a call and a compiled one", wanted, got)


def opcheck(f, example):
    """It is an operator that torch.library.opcheck accepts."""
    operators = torch._ops.OpOverload, torch._ops.OpOverloadPacket, torch.library.CustomOpDef
    f = inspect.unwrap(f)
    if not isinstance(f, operators):
        raise NotImplementedError("not an operator of torch.library")
    try:
        accepted = parameters(f)  # an operator may lack optional arguments
        args = {n: x for n, x in leaves(example).items() if accepted is None or n in accepted}
        with warnings.catch_warnings():  # opcheck reads .grad of its copies, which are not leaves
            warnings.filterwarnings("ignore", r"The \.grad attribute of a Tensor", UserWarning)
            torch.library.opcheck(f, (), args)
    except Exception as error:  # of any type: opcheck has several
        raise AssertionError(f"{title(example)}: opcheck: {_said(error)}") from error


def autocast(f, example):
    """Under torch.autocast it is as exact as plain PyTorch in bfloat16.

    The values are those of bfloat16, in the dtypes of the example; results are rounded to bfloat16. Autograd
    itself converts every gradient to the dtype of its input.
    """
    dtypes = {n: x.dtype for n, x in example.tensors().items() if x.is_floating_point()}
    if not dtypes or example.exact:
        raise NotImplementedError("no floats")
    definition, device = definition_of(example), device_of(example)

    def floats(function, dtype=None):
        def call(**args):
            results = results_by_name(example, function(**args))
            return {n: y.to(dtype) for n, y in results.items() if y.is_floating_point()}

        return call

    def autocasted(**args):
        with torch.autocast(device.type, torch.bfloat16):
            return f(**args | {n: args[n].to(dtype) for n, dtype in dtypes.items()})

    own = Definition(floats(definition.reference), floats(definition.low, torch.bfloat16))
    variant = replace(example.to(torch.bfloat16), name=f"{example.name}, under autocast", definition=own)
    _assert_right(floats(autocasted, torch.bfloat16), variant)


# --- threads, and the table of all checks -------------------------------------------------------------------


def threads(f, example):
    """Two threads that call it at the same time get what each gets alone."""
    other = with_other_values(example)
    wanted = [run(f, example)]
    interpreter = sys.modules.get("triton.runtime.interpreter")
    if interpreter:
        interpreter.interpreter_builder.grid_dim = None
    wanted.append(run(f, other))
    if interpreter and interpreter.interpreter_builder.grid_dim:
        raise NotImplementedError("Triton's interpreter runs the kernels of one thread at a time")
    start = threading.Barrier(2)

    def repeated(example):
        start.wait()
        return [run(f, example) for _ in range(ROUNDS)]

    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(repeated, one) for one in (example, other)]
    for one, alone, thread in zip((example, other), wanted, running, strict=True):
        for outcome in thread.result():
            assert_same(one, "while another thread calls the function", alone, outcome)


CHECKS = {
    function.__name__.strip("_"): Check((function.__doc__ or "").partition("\n")[0], function)
    for function in (
        determinism, memory, reads, misaligned, strided, upstream_, saved, inplace, compile_, opcheck,
        autocast, threads, graph, streams, races,
    )
}  # fmt: skip


def check_names(call: str, names: str | Iterable[str]) -> tuple[str, ...]:
    """Return the names of some checks, or all if `names` is "all"; `call` begins the error message."""
    names = (names,) if isinstance(names, str) else tuple(names or ())
    if names == ("all",):
        return tuple(CHECKS)
    for name in names:
        if name not in CHECKS:
            rule = f"be 'all' or names of {', '.join(CHECKS)}"
            raise ValueError(must(f"{call}: checks", rule, repr(name)))
    return names
