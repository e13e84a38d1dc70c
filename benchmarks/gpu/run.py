"""Run stages within a budget, each a process with a time limit of its own."""

import contextlib
import os
import signal
import subprocess
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from benchmarks.gpu import lines
from benchmarks.gpu.stages import Stage
from benchmarks.machine import ROOT

LEAST = 5.0  # seconds of the budget that a stage needs to be started at all
RESERVE = 5.0  # seconds at the end, for the table
OURS = ("benchmarks", "benchmarks.gpu.check", "benchmarks.gpu.capture", "benchmarks.gpu.pretend")


class Run:
    """The stages' common files, clock and limits.

    Args:
        file: where lines go (`lines.py`).
        log: what the stages print.
        deadline: of `time.monotonic()`, after which nothing runs.
        workers: how many stages run beside each other, where they may.
    """

    def __init__(self, file: Path, log: Path, deadline: float, workers: int, environment: dict[str, str]):
        self.file, self.log, self.deadline, self.workers = file, log, deadline, workers
        self.environment = os.environ | {"PYTHONUNBUFFERED": "1", **environment}
        self.began = time.monotonic()
        self.live: set[subprocess.Popen] = set()

    def kill(self) -> None:
        """End what still runs, with its children."""
        for process in list(self.live):
            with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
                os.killpg(process.pid, signal.SIGKILL)

    def left(self) -> float:
        return self.deadline - RESERVE - time.monotonic()

    def all(self, stages: list[Stage], after) -> None:
        """Run the stages in order, those that may together; call `after(stage)` as each ends."""
        while stages:
            count = next((i for i, s in enumerate(stages) if s[0] != stages[0].letter), len(stages))
            group, stages = stages[:count], stages[count:]
            beside = [stage for stage in group if stage.together]
            with ThreadPoolExecutor(self.workers) as pool:
                for future in [pool.submit(self.one, stage) for stage in beside]:
                    after(future.result())
            for stage in group:
                if not stage.together:
                    after(self.one(stage))

    def beside(self, stage: Stage) -> Future:
        """Start a stage that runs beside others; the result is its end."""
        return ThreadPoolExecutor(1).submit(self.one, stage)

    def one(self, stage: Stage) -> dict:
        """Run one stage; write and return its end: exit code, or why there is none, and seconds."""
        limit = min(stage.limit, self.left())
        facts = {"kind": "end", "letter": stage.letter, "stage": stage.name}
        if limit < min(stage.limit, LEAST):
            return self._end(facts | {"rc": None, "why": "no time was left", "seconds": 0.0})
        began, output = time.monotonic(), self.log.parent / f".{os.getpid()}-{id(stage)}.out"
        command = list(stage.command)
        if command[1:2] == ["-m"] and command[2] in OURS:
            command += ["--lines", str(self.file), "--stage", stage.name]
        environment = self.environment | dict(stage.environment)
        if stage.together:  # a core each: the reference's threads would wait for each other
            environment["OMP_NUM_THREADS"] = "1"
        environment |= {"BENCHMARK_LINES": str(self.file), "BENCHMARK_STAGE": stage.name}
        why = ""
        with open(output, "w") as sink:
            try:
                process = subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env=environment,
                    stdout=sink,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except OSError as error:
                rc, why = None, f"{command[0]}: {error.strerror}"
            else:
                self.live.add(process)
                try:
                    rc = process.wait(limit)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                    rc, why = None, f"stopped after {limit:.0f} s"
                self.live.discard(process)
        text = output.read_text(errors="replace")
        output.unlink()
        with open(self.log, "a") as log:
            log.write(f"\n===== {stage.name}: rc {rc} {why}\n{text[-100_000:]}")
        seconds = round(time.monotonic() - began, 1)
        tail = [line[:300] for line in text.strip().splitlines()[-4:]]
        return self._end(facts | {"rc": rc, "why": why, "seconds": seconds, "tail": tail})

    def _end(self, line: dict) -> dict:
        lines.write(self.file, **line)
        word = "ok" if line["rc"] == 0 else line["why"] or f"exit code {line['rc']}"
        now = time.monotonic() - self.began
        print(
            f"{now:6.1f} s  ({line['letter']}) {line['stage']:34} {line['seconds']:6.1f} s  {word}",
            flush=True,
        )
        return line
