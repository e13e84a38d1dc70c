"""`python -m electra_fast.testing.fuzz`: random cases for every op and implementation that can run here.

    --seconds 600                      each implementation gets an equal share, each of its ops too
    --seed 704239                      that one case; a finding prints the whole command
    --op rtd_loss --implementation my_module:my_function    a kernel of your own

The cases run in a child process, which a crash or a hang ends without ending the others. Exit status 1: there
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
from electra_fast.testing.cases import Outcome, judge_case

ENOUGH = 10  # findings of one implementation of one op, after which it rests


def host_run() -> None:
    """Let csrc/cuda run on the CPU, as in the tests. Only a checkout can: it lies in tests/host."""
    tests = Path(__file__).parents[2] / "tests"
    if not torch.cuda.is_available() and (tests / "host" / "__init__.py").exists():
        sys.path.insert(0, str(tests))
        importlib.import_module("host").install()


def function_of(op: str, implementation: str):
    """Return an implementation by its name or by "module:function"; ValueError if there is no such one."""
    if ":" in implementation:
        module, _, name = implementation.partition(":")
        try:
            function = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:  # ValueError: of an empty name
            rule = "--implementation must be module:function that can be imported"
            raise ValueError(f"{rule}, got {implementation}; {type(error).__name__}: {error}") from None
        if not callable(function):
            kind = type(function).__name__
            raise ValueError(f"--implementation must name a function, got {implementation}, of type {kind}")
        return function
    return testing.implementations(op)[implementation]


def serve(pipe) -> None:
    """Judge the cases that come through a pipe: the child process."""
    warnings.simplefilter("ignore")  # overflows, as the cases want them
    host_run()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe.send("ready")
    while True:
        op, implementation, seed = pipe.recv()
        small = device == "cpu" and implementation in ("triton", "cuda")
        pipe.send(judge_case(op, function_of(op, implementation), seed, small=small, device=device))


class Child:
    """A process that judges one case after the other, started when it is needed."""

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
        """End the process; return its exit code, the negative number of a signal."""
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
        return Outcome(f"no answer in {self.limit:.0f} seconds")


def pairs_of(op: str | None, implementation: str | None) -> list[tuple[str, str]]:
    """Return the (implementation, op) pairs that were asked for."""
    if implementation and ":" in implementation:
        return [(implementation, op)]
    named = [(name, o) for o in testing.OPS for name in testing.implementations(o)]
    return [(n, o) for n, o in named if op in (None, o) and implementation in (None, n)]


def fuzz(pairs: list[tuple[str, str]], seconds: float, seed: int | None, limit: float) -> tuple:
    """Run cases until the time is up, or one seed; return the numbers of cases, refusals and findings."""
    from tqdm import tqdm

    child, spent = Child(limit), Counter()
    child.start()  # takes seconds, which are no case's
    cases, refused, findings = Counter(), Counter(), Counter()
    first = random.randrange(2**31) if seed is None else seed
    waiting, began = list(pairs), time.monotonic()
    with tqdm(total=round(seconds), unit=" s", disable=None if seed is None else True) as bar:
        while waiting and (seed is not None or time.monotonic() - began < seconds):
            # The implementation that had the least time, and its op that had the least.
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
    rows = [f"{'cases/refused/findings':<22}" + "".join(f"{name:>18}" for name in names)]
    for op in dict.fromkeys(op for _, op in cases):
        pairs = [(name, op) for name in names]
        cells = [f"{cases[p]}/{refused[p]}/{findings[p]}" if cases[p] else "" for p in pairs]
        rows.append(f"{op:<22}" + "".join(f"{cell:>18}" for cell in cells))
    return "\n".join(rows)


def main(arguments: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        prog="python -m electra_fast.testing.fuzz", description=__doc__.split("\n")[0]
    )
    p.add_argument("--seconds", type=float, default=60, help="all implementations together (default: 60)")
    p.add_argument("--seed", type=int, help="run only the case of this seed")
    p.add_argument("--op", choices=testing.OPS)
    p.add_argument("--implementation", help="reference, cpu, cuda, triton, or module:function, with --op")
    p.add_argument("--limit", type=float, default=120, help="seconds that one case may take (default: 120)")
    options = p.parse_args(arguments)
    host_run()
    if ":" in (options.implementation or "") and not options.op:
        p.error(f"--op must be given with the function of one op, got {options.implementation} alone")
    pairs = pairs_of(options.op, options.implementation)
    if not pairs:
        names = ", ".join(dict.fromkeys(name for name, _ in pairs_of(options.op, None)))
        p.error(f"--implementation must be one that runs here, {names}, got {options.implementation}")
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
