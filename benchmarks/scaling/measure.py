"""The speed of `electra_fast pretrain` in one process and in two on this machine, one thread per process.

Both runs take the same steps of the same micro-batches, and the processes divide the micro-batches. Each run
is made twice, with few steps and with more. The difference of the CPU times is that of the steps alone,
without the start, the evaluation and the checkpoints.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from benchmarks.harness.machine import cpu_model
from electra_fast.errors import must
from electra_fast.tables import text_table

PROCESSES = (1, 2)
WARM_UP = 10  # steps of the short run, and of the line of the log that is left out
OPTIONS = ("pretrain", "--preset", "tiny", "--accumulate", str(max(PROCESSES)))
Command = Callable[[int], list[str]]  # of a number of processes


class Run(NamedTuple):
    """A run of pre-training."""

    cpu: float  # seconds of all its processes
    tokens: int
    rate: float  # tokens per second, the median of the log's lines after WARM_UP


class Measured(NamedTuple):
    processes: int
    per_second: float
    per_cpu_second: float


def python(processes: int) -> list[str]:
    """Return the beginning of a command that runs this package in a number of processes."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [sys.executable, *(torchrun if processes > 1 else []), "-m", "electra_fast"]


def measure(steps: int, command: Command = python) -> list[Measured]:
    """Return the speed with each of PROCESSES.

    Raises:
        ValueError: a run failed.
    """
    found = []
    with tempfile.TemporaryDirectory(prefix="electra_fast-") as folder:
        for processes in PROCESSES:
            counts = (WARM_UP, WARM_UP + steps)
            short, long = (run(command(processes), Path(folder) / f"{processes}-{n}", n) for n in counts)
            per_cpu_second = (long.tokens - short.tokens) / (long.cpu - short.cpu)
            found.append(Measured(processes, long.rate, per_cpu_second))
    return found


def run(command: list[str], out: Path, steps: int) -> Run:
    """Pre-train in the folder `out`, and return what the run cost."""
    before = _cpu_of_children()
    command = [*command, *OPTIONS, "--steps", str(steps), "--out", str(out)]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        got = done.stderr.strip().split("\n")[-1]
        raise ValueError(must(f"scaling: {' '.join(command)}", "end without an error", got))
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["kind"] == "train"]
    rates = [line["tokens_per_second"] for line in lines if line["step"] > WARM_UP or steps <= WARM_UP]
    tokens = sum(line["tokens"] for line in lines)
    return Run(_cpu_of_children() - before, tokens, statistics.median(rates))


def _cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)  # of those that ended, and of their children
    return used.ru_utime + used.ru_stime


def table(found: list[Measured]) -> str:
    """Return the speeds, and the ratios to those of one process."""
    first = found[0]
    rows = [["processes", "tokens per second", "", "tokens per CPU second", ""]]
    for m in found:
        times = m.per_second / first.per_second, m.per_cpu_second / first.per_cpu_second
        rate, per_cpu = (f"{x:,.0f}".replace(",", " ") for x in (m.per_second, m.per_cpu_second))
        rows.append([str(m.processes), rate, f"{times[0]:.2f}\u00d7", per_cpu, f"{times[1]:.2f}\u00d7"])
    note = (
        f"Measured on {cpu_model()}, {os.cpu_count()} threads: preset tiny, one thread per process, gloo, the"
    )
    note += " same micro-batches per step. Other load on the machine slows tokens per second."
    return f"{note}\n{text_table(rows, right=range(5))}"
