"""`python -m electra_fast.testing.fuzz`: random cases for every op and implementation that can run here.

    --seconds 600                      the time is shared equally by the implementations, and by their ops
    --seed 704239                      one case; each finding prints the command that repeats it
    --seed 0 --seconds 60              the cases of the seeds from 0 on, instead of random ones
    --op rtd_loss --implementation my_module:my_function    another implementation

The cases run in a child process, so a crash or a hang does not end the run. The exit status is 1 if there
were findings.
"""

import argparse
import importlib
import random
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

from electra_fast import testing
from electra_fast.errors import must
from electra_fast.tables import text_table
from electra_fast.testing.cases import Outcome, judge_case
from electra_fast.testing.child import Child, Died
from electra_fast.testing.importing import imported

DURATION = 60  # seconds of a run without --seed and --seconds
ENOUGH = 10  # findings, after which an op of an implementation is not run again


def host_run() -> None:
    """Make the kernels of csrc/cuda run on the CPU. Only a checkout has the code for it, in tests/host."""
    tests = Path(__file__).parents[2] / "tests"
    if not torch.cuda.is_available() and (tests / "host" / "__init__.py").exists():
        sys.path.insert(0, str(tests))
        importlib.import_module("host").install()


def function_of(op: str, implementation: str) -> Callable:
    """Return an implementation by its name or "module:function"; raise ValueError if it does not exist."""
    if ":" in implementation:
        return imported("--implementation", implementation)
    return testing.implementations(op)[implementation]


def judges() -> Callable[[str, str, int], Outcome]:
    """Return the function that judges one case; this runs in the child process."""
    warnings.simplefilter("ignore")  # the cases overflow on purpose
    testing.interpret()
    host_run()
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def judge(op: str, implementation: str, seed: int) -> Outcome:
        small = device == "cpu" and implementation in ("triton", "cuda")
        return judge_case(op, function_of(op, implementation), seed, small=small, device=device)

    return judge


def judged(child: Child, op: str, implementation: str, seed: int) -> Outcome:
    """Return the outcome of a case; the end of its process is a finding."""
    try:
        return child.ask(op, implementation, seed)
    except Died as error:
        return Outcome(str(error))


def pairs_of(op: str | None, implementation: str | None) -> list[tuple[str, str]]:
    """Return the (implementation, op) pairs for these options."""
    if implementation and ":" in implementation:
        return [(implementation, op)]
    named = [(name, o) for o in testing.OPS for name in testing.implementations(o)]
    return [(n, o) for n, o in named if op in (None, o) and implementation in (None, n)]


def fuzz(pairs: list[tuple[str, str]], seconds: float | None, seed: int | None, limit: float) -> tuple:
    """Run cases until the time is over; return the counts of cases, refusals and findings.

    A seed without `seconds` is one case for each pair.
    """
    from tqdm import tqdm

    child, spent = Child(limit, judges), Counter()
    child.start()
    cases, refused, findings = Counter(), Counter(), Counter()
    first = random.randrange(2**31) if seed is None else seed
    waiting, began, once = list(pairs), time.monotonic(), seed is not None and seconds is None
    seconds = DURATION if seconds is None else seconds
    with tqdm(total=round(seconds), unit=" s", disable=True if once else None) as bar:
        while waiting and (once or time.monotonic() - began < seconds):
            # The implementation with the least time so far, and its op with the least time.
            pair = min(waiting, key=lambda pair: (spent[pair[0]], spent[pair]))
            name, op = pair
            bar.set_postfix_str(f"{name} {op}, {findings.total()} findings", refresh=False)
            start, number = time.monotonic(), first + cases[pair]
            outcome = judged(child, op, name, number)
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
            if once or findings[pair] >= ENOUGH:
                waiting.remove(pair)
            bar.update(min(time.monotonic() - began, seconds) - bar.n)
    child.close()
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
    p.add_argument("--seconds", type=float, help=f"total duration (default: {DURATION})")
    p.add_argument("--seed", type=int, help="run only the case of this seed; with --seconds, begin with it")
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
