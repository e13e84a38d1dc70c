"""The command `python -m benchmarks static`: compile every kernel, then print or compare the figures."""

import argparse
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

from benchmarks.static import aot, cuda, figures, gpus, summary


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks static",
        description="Compile every kernel without a GPU and print its registers, spills, occupancy and "
        "instructions. Instructions are counted in the whole kernel; the bound is that of its main loop.",
        epilog="--compare exits with 1 if a kernel got worse, and with 2 if nothing could be compared.",
    )
    p.add_argument("--arch", type=int, nargs="+", action="extend", choices=gpus.GPUS, metavar="SM")
    p.add_argument("--all", action="store_true", help="print one line per variant of a kernel")
    p.add_argument("--json", type=Path, metavar="FILE", help="write the rows to a file")
    then = p.add_mutually_exclusive_group()
    then.add_argument("--compare", action="store_true", help="print what differs from the committed figures")
    then.add_argument("--update", action="store_true", help="replace the committed figures")
    return p


def compiled(architectures: list[int]) -> list[dict]:
    """Return the rows of every kernel that the installed compilers can compile, one job per core."""
    here = figures.compilers()
    if here["triton"] is None:
        raise ValueError("static: Triton must be installed, got none; pip install triton")
    jobs = [(aot.compiled, *job) for job in product(architectures, aot.PARTS)]
    if here["nvcc"] is None:
        print("static: nvcc is not installed, so the kernels of csrc/cuda are left out", file=sys.stderr)
    else:
        jobs += [(cuda.compiled, *job) for job in product(architectures, cuda.SOURCES)]
    names = ", ".join(f"sm_{arch}" for arch in architectures)
    print(f"compiling for {names}: this takes minutes if nothing is cached", file=sys.stderr)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [row for rows in pool.map(lambda job: job[0](*job[1:]), jobs) for row in rows]


def compare(rows: list[dict], committed: dict) -> int:
    """Print the changes, or why nothing is compared; return the exit status."""
    for reason in (reasons := figures.not_compared(rows, committed)).values():
        print(reason)
    if len(reasons) == len({figures.compiler(row) for row in rows}):
        return 2
    changes = figures.changes(rows, committed)
    print("\n".join(change.line for change in changes) or "nothing changed")
    return int(any(change.worse for change in changes))


def main(arguments: list[str]) -> int:
    options = parser().parse_args(arguments)
    architectures = [arch for arch in gpus.GPUS if arch in (options.arch or gpus.GPUS)]
    if options.update and len(architectures) < len(gpus.GPUS):
        raise ValueError("static: --update must be for every architecture, got --arch; omit --arch")
    committed = figures.load() if options.compare else None
    try:
        rows = compiled(architectures)
    except RuntimeError as error:  # a kernel does not compile
        print(error, file=sys.stderr)
        return 1
    if options.json:
        options.json.write_text(json.dumps({"compilers": figures.compilers(), "rows": rows}, indent=1))
    if options.compare:
        return compare(rows, committed)
    if options.update:
        figures.update(rows)
        print(f"{len(rows)} kernels in {figures.FILE}")
    else:
        print(summary.table(rows, options.all))
    return 0
