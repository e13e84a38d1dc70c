"""`python -m electra_fast.testing.fuzz`: random cases for every op and implementation that can run here.

    --seconds 600                      the time is shared equally by the implementations, and by their ops
    --seed 704239                      one case; each finding prints the command that repeats it
    --op rtd_loss --implementation my_module:my_function    another implementation

The cases run in a child process, so a crash or a hang does not end the run. The exit status is 1 if there
were findings.
"""

import argparse
import importlib
import multiprocessing
import random
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

import torch

from electra_fast import testing
from electra_fast.errors import must
from electra_fast.tables import text_table
from electra_fast.testing.cases import Outcome, judge_case

ENOUGH = 10  # findings, after which an op of an implementation is not run again


def host_run() -> None:
    """Make the kernels of csrc/cuda run on the CPU. Only a checkout has the code for it, in tests/host."""
    tests = Path(__file__).parents[2] / "tests"
    if not torch.cuda.is_available() and (tests / "host" / "__init__.py").exists():
        sys.path.insert(0, str(tests))
        importlib.import_module("host").install()


def function_of(op: str, implementation: str):
    """Return an implementation by its name or "module:function"; raise ValueError if it does not exist."""
    if ":" in implementation:
        module, _, name = implementation.partition(":")
        try:
            function = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:  # an empty name gives a ValueError
            got = f"{implementation}: {type(error).__name__}: {error}"
            raise ValueError(must("--implementation", "be an importable module:function", got)) from None
        if not callable(function):
            got = f"{implementation} of type {type(function).__name__}"
            raise ValueError(must("--implementation", "name a function", got))
        return function
    return testing.implementations(op)[implementation]


def serve(pipe) -> None:
    """Judge the cases that arrive through a pipe; this is the child process."""
    warnings.simplefilter("ignore")  # the cases overflow on purpose
    testing.interpret()
    host_run()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe.send("ready")
    while True:
        op, implementation, seed = pipe.recv()
        small = device == "cpu" and implementation in ("triton", "cuda")
        pipe.send(judge_case(op, function_of(op, implementation), seed, small=small, device=device))


class Child:
    """A process that judges cases one by one; it is started when needed."""

    def __init__(self, limit: float):
        self.limit, self.process = limit, None

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=serve, args=(other,), daemon=True)
        self.process.start()
        other.close()
        self.pipe.recv()

    def stop(self) -> int:
        """End the process; return its exit code, which is negative for a signal."""
        self.process.join(timeout=1)
        self.process.kill()
        self.process.join()
        code, self.process = self.process.exitcode, None
        return code

    def judge(self, op: str, implementation: str, seed: int) -> Outcome:
        if self.process is None:
            self.start()
        try:
            self.pipe.send((op, implementation, seed))
            if self.pipe.poll(self.limit):
                return self.pipe.recv()
        except (EOFError, ConnectionError):
            return Outcome(f"the process ended with exit code {self.stop()}")
        self.stop()
        return Outcome(f"no result within {self.limit:.0f} seconds")


def pairs_of(op: str | None, implementation: str | None) -> list[tuple[str, str]]:
    """Return the (implementation, op) pairs for these options."""
    if implementation and ":" in implementation:
        return [(implementation, op)]
    named = [(name, o) for o in testing.OPS for name in testing.implementations(o)]
    return [(n, o) for n, o in named if op in (None, o) and implementation in (None, n)]


def fuzz(pairs: list[tuple[str, str]], seconds: float, seed: int | None, limit: float) -> tuple:
    """Run cases until the time is over, or one seed; return the counts of cases, refusals and findings."""
    from tqdm import tqdm

    child, spent = Child(limit), Counter()
    child.start()  # the start takes seconds, which should not count for a case
    cases, refused, findings = Counter(), Counter(), Counter()
    first = random.randrange(2**31) if seed is None else seed
    waiting, began = list(pairs), time.monotonic()
    with tqdm(total=round(seconds), unit=" s", disable=None if seed is None else True) as bar:
        while waiting and (seed is not None or time.monotonic() - began < seconds):
            # The implementation with the least time so far, and its op with the least time.
            pair = min(waiting, key=lambda pair: (spent[pair[0]], spent[pair]))
            name, op = pair
            bar.set_postfix_str(f"{name} {op}, {findings.total()} findings", refresh=False)
            start, number = time.monotonic(), first + cases[pair]
            outcome = child.judge(op, name, number)
            elapsed = time.monotonic() - start
            spent[name] += elapsed
            spent[pair] += elapsed
            cases[pair] += 1
            refused[pair] += bool(outcome.refused)
            if outcome.finding:
                findings[pair] += 1
                again = f"--op {op} --implementation {name} --seed {number}"
                said = f"{op}, {name}: {outcome.finding}\n    python -m electra_fast.testing.fuzz {again}"
                tqdm.write(said, file=sys.stdout)
                sys.stdout.flush()
            if seed is not None or findings[pair] >= ENOUGH:
                waiting.remove(pair)
            bar.update(min(time.monotonic() - began, seconds) - bar.n)
    if child.process:
        child.process.kill()
    return cases, refused, findings


def table(cases: Counter, refused: Counter, findings: Counter) -> str:
    """Return the summary: a row per op, and per implementation its cases, refusals and findings."""
    names = list(dict.fromkeys(name for name, _ in cases))
    rows = [["cases/refused/findings", *names]]
    for op in dict.fromkeys(op for _, op in cases):
        pairs = [(name, op) for name in names]
        rows.append([op, *(f"{cases[p]}/{refused[p]}/{findings[p]}" if cases[p] else "" for p in pairs)])
    return text_table(rows, right=range(1, len(rows[0])))


def main(arguments: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        prog="python -m electra_fast.testing.fuzz", description=__doc__.split("\n")[0]
    )
    p.add_argument("--seconds", type=float, default=60, help="total duration (default: 60)")
    p.add_argument("--seed", type=int, help="run only the case of this seed")
    p.add_argument("--op", choices=testing.OPS)
    p.add_argument(
        "--implementation", help="reference, cpu, cuda, triton; or module:function together with --op"
    )
    p.add_argument("--limit", type=float, default=120, help="most seconds for one case (default: 120)")
    options = p.parse_args(arguments)
    testing.interpret()
    host_run()
    if ":" in (options.implementation or "") and not options.op:
        p.error(must("--op", "be given with module:function", f"{options.implementation} without it"))
    pairs = pairs_of(options.op, options.implementation)
    if not pairs:
        names = ", ".join(dict.fromkeys(name for name, _ in pairs_of(options.op, None)))
        p.error(must("--implementation", f"be one that runs here, {names}", options.implementation))
    if ":" in (options.implementation or ""):
        try:
            function_of(options.op, options.implementation)
        except ValueError as error:
            p.error(str(error))
    cases, refused, findings = fuzz(pairs, options.seconds, options.seed, options.limit)
    print(table(cases, refused, findings))
    return int(findings.total() > 0)


if __name__ == "__main__":
    sys.exit(main())
