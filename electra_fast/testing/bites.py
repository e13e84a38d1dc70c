"""Does a check bite? Break the source of Triton kernels, and list the faults that the check lets through."""

import faulthandler
import inspect
import multiprocessing
import operator
import os
import resource
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import torch

from electra_fast import testing
from electra_fast.errors import must
from electra_fast.tables import text_table
from electra_fast.testing.faults import KINDS, Fault, plant

FACTORY = "pass a function from a module to what the check accepts, and module=, the module with the kernels"


@dataclass(frozen=True)
class Report:
    """The faults that were planted in a file, from the top. `print` shows them as a table."""

    faults: list[Fault]

    @property
    def let_through(self) -> list[Fault]:
        return [fault for fault in self.faults if not fault.found_by]

    def __str__(self) -> str:
        found = len(self.faults) - len(self.let_through)
        return f"{_table(self.faults)}\n{found} of {len(self.faults)} faults found"

    def assert_all_found(self) -> None:
        """Raise AssertionError with a table of the faults that were let through, if there are any."""
        missed = self.let_through
        if missed:
            raise AssertionError(f"{len(missed)} of {len(self.faults)} faults let through\n{_table(missed)}")


def _table(faults: list[Fault]) -> str:
    rows = [["line", "fault", "result", "changed source"]]
    for fault in faults:
        result = f"found: {fault.found_by.partition(':')[0]}" if fault.found_by else "LET THROUGH"
        rows.append([str(fault.line), fault.kind, result, fault.source])
    return text_table(rows, right=[0])


def _serve(pipe, path: Path, name: str, get: Callable, check: Callable) -> None:
    """Send what the check raises for a function from the file `path`, or ""; this is the child process."""
    torch.set_num_threads(1)  # OpenMP's threads exist only in the parent
    faulthandler.disable()  # a crash is a result, so it leaves neither a traceback nor a core file
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    warnings.simplefilter("ignore")
    sys.dont_write_bytecode = True  # the next fault has the same path, size and second
    spec = spec_from_file_location(name, path)
    module = sys.modules[name] = module_from_spec(spec)
    found_by = ""
    try:
        spec.loader.exec_module(module)
        check(get(module))
    except BaseException as error:
        found_by = f"{type(error).__name__}: {error}"
    pipe.send(found_by)


def _judge(limit: float, *arguments) -> str:
    """Return what finds a fault, or ""; `arguments` are those of `_serve` after its pipe."""
    context = multiprocessing.get_context("fork")  # pickles no lambda, and imports nothing again
    pipe, end = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(end, *arguments), daemon=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This process .*is multi-threaded", DeprecationWarning)
        process.start()
    end.close()
    try:
        return pipe.recv() if pipe.poll(limit) else f"time limit: {limit:g} s"
    except EOFError:
        process.join()
        code = process.exitcode
        return f"crash: {signal.Signals(-code).name if code < 0 else f'exit code {code}'}"
    finally:
        process.kill()
        process.join()
        pipe.close()


def _origin(function: Callable, module: ModuleType | None) -> tuple[Path, str, Callable]:
    """Return the file with the kernels, its module's name, and what gets the function from that module."""
    if module is None:
        plain = inspect.unwrap(function)
        if not inspect.isfunction(plain) or "<" in plain.__qualname__:  # "<lambda>", "<locals>"
            rule, got = "be a function at the top level of a file", getattr(plain, "__qualname__", plain)
            raise ValueError(must("bites: function", rule, got, FACTORY))
        get, name = operator.attrgetter(plain.__qualname__), plain.__module__
        file = inspect.getsourcefile(plain)
    else:
        get, name, file = function, module.__name__, getattr(module, "__file__", None)
    if file is None or not Path(file).is_file():
        remedy = "write the kernels to a file and import it"
        raise ValueError(must("bites: function", "be in a source file", file, remedy))
    return Path(file), name, get


def bites(
    function: Callable,
    check: Callable[[Callable], object],
    *,
    module: ModuleType | None = None,
    limit: float = 60.0,
    only: Collection[str] = KINDS,
) -> Report:
    """Break the Triton kernels in a function's file in many ways, one at a time; check each result.

        testing.interpret()  # before anything imports Triton
        report = testing.bites(my_rtd_loss, lambda f: testing.check_op("rtd_loss", f))
        print(report)
        report.assert_all_found()

    A copy of the file is loaded with one fault in its source. Kernels that it imports are not broken.

        mask       a load or store without its mask, `where` without its condition
        scale      a stored value, a sum, dot or mean, or a factor with "scale" in its name, times 1.01
        range      the end of a `range`, or n in `offs < n`, minus 1; a `range` without its first step
        grid       cdiv(a, b) outside of kernels rounded down
        sum        `acc += x` as `acc = x`
        precision  float16 for float32, float32 for float64; `acc += x` rounded to float16
        overflow   exp(x - m) as exp(x)

    A fault that cannot change a result, such as 1.01 times a small integer, is let through too, so read
    those lines. A read or write outside of a tensor may not change a result either: a check with
    `testing.guarded_memory()` sees such writes.

    Args:
        function: is at the top level of a file, which does not call `bites` when it is imported. Decorators
            with `__wrapped__` are followed.
        check: is called with a function and raises an error if that is wrong. The first call is in this
            process, with the function without a fault. Each other call is in a forked process with one
            thread, without its output and warnings.
        module: the module with the kernels. `function` is then called with this module or a broken copy of
            it, and returns what `check` accepts.
        limit: seconds for one check. A fault that reaches it, or that crashes the process, is found.
        only: the kinds of faults.

    Raises:
        ValueError: the function has no source file, no fault fits this file, a kind is unknown, or the check
            refuses the function without a fault.
        RuntimeError: Triton does not interpret kernels here, or this process has used a GPU.
    """
    from tqdm import tqdm

    unknown = {*only} - {*KINDS}
    if unknown:
        rule = f"have only names in {', '.join(KINDS)}"
        raise ValueError(must("bites: only", rule, ", ".join(sorted(unknown))))
    if not testing.interpreted():
        got = "compiled kernels, which may destroy a GPU's context if they are broken"
        remedy = "set TRITON_INTERPRET=1 before Triton is imported"
        raise RuntimeError(must("bites: kernels", "run in Triton's interpreter", got, remedy))
    if torch.cuda.is_initialized():
        got = "one that has, and cannot be forked"
        raise RuntimeError(must("bites", "be called in a process that has not used a GPU", got))
    path, name, get = _origin(function, module)
    text = path.read_text(encoding="utf-8")
    faults = plant(text, only)
    if not faults:
        rule = "be in a file with Triton kernels that a fault fits"
        raise ValueError(must("bites: function", rule, path, FACTORY))
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, path.name)

        def found_by(source: str) -> str:
            copy.write_text(source, encoding="utf-8")
            return _judge(limit, copy, f"{name}_broken", get, check)

        # The first check is here, so that no child must import what it needs, which takes a second.
        accepted = "accept the function without a fault"
        try:
            check(function if module is None else function(module))
        except Exception as error:
            raise ValueError(must("bites: check", accepted, f"{type(error).__name__}: {error}")) from error
        refusal = found_by(text)
        if refusal:
            raise ValueError(must("bites: check", accepted, f"{refusal} in a child process"))
        bar = tqdm(faults, unit=" faults", disable=None)
        return Report([replace(fault, found_by=found_by(fault.file)) for fault in bar])
