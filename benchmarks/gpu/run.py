"""Run stages within a budget, each a process with a time limit of its own."""

import contextlib
import os
import signal
import subprocess
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from benchmarks.gpu import lines
from benchmarks.gpu.stages import Stage
from benchmarks.machine import ROOT

LEAST = 5.0  # seconds of the budget that a stage needs to be started at all
RESERVE = 5.0  # seconds at the end, for the table
WRITE_LINES = ("benchmarks", "benchmarks.gpu.check", "benchmarks.gpu.capture", "benchmarks.gpu.pretend")


class Run:
    """The stages' common files, clock and limits.

    Args:
        file: where lines go (`lines.py`).
        log: what the stages print.
        scratch: a folder for what is removed in the end.
        deadline: of `time.monotonic()`, after which nothing runs.
        workers: how many stages run at once, where they may.
        environment: variables of every stage.
    """

    def __init__(
        self,
        file: Path,
        log: Path,
        scratch: Path,
        deadline: float,
        workers: int,
        environment: dict[str, str],
    ):
        self.file, self.log, self.scratch = file, log, scratch
        self.deadline, self.workers = deadline, workers
        self.environment = os.environ | {"PYTHONUNBUFFERED": "1", **environment}
        self.began, self.stopped = time.monotonic(), False
        self.live: set[subprocess.Popen] = set()
        self.lock = threading.Lock()  # between a stage that starts and the end of all

    def stop(self) -> None:
        """End what runs, with its children, and start nothing more."""
        with self.lock:
            self.stopped, live = True, list(self.live)
        for process in live:
            _kill(process)

    def left(self) -> float:
        return self.deadline - RESERVE - time.monotonic()

    def all(self, stages: list[Stage], after) -> None:
        """Run the stages in order, those that may at once; call `after(end)` as each ends."""
        while stages:
            count = next((i for i, s in enumerate(stages) if s.letter != stages[0].letter), len(stages))
            group, stages = stages[:count], stages[count:]
            with ThreadPoolExecutor(self.workers) as pool:
                try:
                    for future in [pool.submit(self.one, stage) for stage in group if stage.together]:
                        after(future.result())
                except BaseException:  # a signal: the pool would wait for the whole queue
                    self.stop()
                    raise
            for stage in group:
                if not stage.together:
                    after(self.one(stage))

    def in_background(self, stage: Stage) -> Future:
        """Start a stage beside others; the result is its end."""
        return ThreadPoolExecutor(1).submit(self.one, stage)

    def one(self, stage: Stage) -> dict:
        """Run one stage; write and return its end: exit code, or why there is none, and seconds."""
        limit = min(stage.limit, self.left())
        facts = {"kind": "end", "letter": stage.letter, "stage": stage.name}
        if self.stopped or limit < min(stage.limit, LEAST):
            why = "stopped" if self.stopped else "no time was left"
            return self._end(facts | {"rc": None, "why": why, "seconds": 0.0})
        began, output = time.monotonic(), self.scratch / f"{id(stage)}.out"
        with open(output, "w") as sink:
            rc, why = self._process(stage, limit, sink)
        text = output.read_text(errors="replace")
        output.unlink()
        with open(self.log, "a") as log:
            log.write(f"\n===== {stage.name}: rc {rc} {why}\n{text[-100_000:]}")
        seconds = round(time.monotonic() - began, 1)
        tail = [line[:300] for line in text.strip().splitlines()[-4:]]
        return self._end(facts | {"rc": rc, "why": why, "seconds": seconds, "tail": tail})

    def _process(self, stage: Stage, limit: float, sink) -> tuple[int | None, str]:
        """Return a stage's exit code, or None and why there is none."""
        command = list(stage.command)
        if command[1:2] == ["-m"] and command[2] in WRITE_LINES:
            command += ["--lines", str(self.file), "--stage", stage.name]
        environment = self.environment | dict(stage.environment)
        environment |= {"BENCHMARK_LINES": str(self.file), "BENCHMARK_STAGE": stage.name}
        if stage.together:  # a core each: the reference's threads would wait for each other
            environment["OMP_NUM_THREADS"] = "1"
        options = {"cwd": ROOT, "env": environment, "stdout": sink, "stderr": subprocess.STDOUT}
        try:
            with self.lock:
                if self.stopped:
                    return None, "stopped"
                # A group, so that its children end with it; no session, which would outlive the terminal.
                process = subprocess.Popen(command, process_group=0, **options)
                self.live.add(process)
        except OSError as error:
            return None, f"{command[0]}: {error.strerror}"
        try:
            return process.wait(limit), ""
        except subprocess.TimeoutExpired:
            return None, f"stopped after {limit:.0f} s"
        finally:
            _kill(process)  # with what it left behind
            self.live.discard(process)

    def _end(self, line: dict) -> dict:
        lines.write(self.file, **line)
        word = "ok" if line["rc"] == 0 else line["why"] or f"exit code {line['rc']}"
        now = time.monotonic() - self.began
        print(
            f"{now:6.1f} s  ({line['letter']}) {line['stage']:34} {line['seconds']:6.1f} s  {word}",
            flush=True,
        )
        return line


def _kill(process: subprocess.Popen) -> None:
    """Kill a process group; wait 5 s at most, since a process may be stuck in the GPU's driver."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(5)
