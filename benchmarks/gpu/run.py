"""Run stages within a budget, each in a process with its own time limit."""

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
from benchmarks.harness.machine import ROOT

LEAST = 5.0  # a stage is started only if this many seconds remain
RESERVE = 5.0  # seconds at the end for the table
WRITE_LINES = ("benchmarks", "benchmarks.gpu.check", "benchmarks.gpu.capture", "benchmarks.gpu.pretend")


class Run:
    """The files, the clock and the limits that all stages share.

    Args:
        file: the file of the lines (`lines.py`).
        log: the file of the stages' output.
        scratch: a folder that the caller removes at the end.
        deadline: the time of `time.monotonic()` at which all stages stop.
        workers: how many stages run in parallel, if they may.
        environment: variables of every stage.
    """

    def __init__(
        self, file: Path, log: Path, scratch: Path, deadline: float, workers: int, environment: dict[str, str]
    ):
        self.file, self.log, self.scratch = file, log, scratch
        self.deadline, self.workers = deadline, workers
        self.environment = os.environ | {"PYTHONUNBUFFERED": "1", **environment}
        self.start, self.stopped = time.monotonic(), False
        self.live: set[subprocess.Popen] = set()
        self.lock = threading.Lock()  # `stop` must not miss a stage that is starting

    def stop(self) -> None:
        """Kill all running stages with their children, and start no more."""
        with self.lock:
            self.stopped, live = True, list(self.live)
        for process in live:
            _kill(process)

    def left(self) -> float:
        return self.deadline - RESERVE - time.monotonic()

    def all(self, stages: list[Stage], after) -> None:
        """Run the stages in order, in parallel if they may; call `after(end)` when a stage ends."""
        while stages:
            count = next((i for i, s in enumerate(stages) if s.letter != stages[0].letter), len(stages))
            group, stages = stages[:count], stages[count:]
            with ThreadPoolExecutor(self.workers) as pool:
                try:
                    for future in [pool.submit(self.one, stage) for stage in group if stage.together]:
                        after(future.result())
                except BaseException:  # on a signal too: otherwise the pool waits for the whole queue
                    self.stop()
                    raise
            for stage in group:
                if not stage.together:
                    after(self.one(stage))

    def in_background(self, stage: Stage) -> Future:
        """Start a stage in parallel with others; the result is its end."""
        return ThreadPoolExecutor(1).submit(self.one, stage)

    def one(self, stage: Stage) -> dict:
        """Run one stage; write and return its end: the exit code or why there is none, and the seconds."""
        limit = min(stage.limit, self.left())
        facts = {"kind": "end", "letter": stage.letter, "stage": stage.name}
        if self.stopped or limit < min(stage.limit, LEAST):
            why = "stopped" if self.stopped else "no time was left"
            return self._end(facts | {"rc": None, "why": why, "seconds": 0.0})
        start, output = time.monotonic(), self.scratch / f"{id(stage)}.out"
        with open(output, "w") as sink:
            rc, why = self._process(stage, limit, sink)
        text = output.read_text(errors="replace")
        output.unlink()
        with open(self.log, "a") as log:
            log.write(f"\n===== {stage.name}: rc {rc} {why}\n{text[-100_000:]}")
        seconds = round(time.monotonic() - start, 1)
        tail = [line[:300] for line in text.strip().splitlines()[-4:]]
        return self._end(facts | {"rc": rc, "why": why, "seconds": seconds, "tail": tail})

    def _process(self, stage: Stage, limit: float, sink) -> tuple[int | None, str]:
        """Return a stage's exit code, or None and why there is none."""
        command = list(stage.command)
        if command[1:2] == ["-m"] and command[2] in WRITE_LINES and "tune" not in command:
            command += ["--lines", str(self.file), "--stage", stage.name]
        environment = self.environment | dict(stage.environment)
        environment |= {"BENCHMARK_LINES": str(self.file), "BENCHMARK_STAGE": stage.name}
        if stage.together:  # one core per stage: the reference's threads would wait for each other
            environment["OMP_NUM_THREADS"] = "1"
        options = {"cwd": ROOT, "env": environment, "stdout": sink, "stderr": subprocess.STDOUT}
        try:
            with self.lock:
                if self.stopped:
                    return None, "stopped"
                # In its own group, its children can be killed too; a session would outlive the terminal.
                process = subprocess.Popen(command, process_group=0, **options)
                self.live.add(process)
        except OSError as error:
            return None, f"{command[0]}: {error.strerror}"
        try:
            return process.wait(limit), ""
        except subprocess.TimeoutExpired:
            return None, f"stopped after {limit:.0f} s"
        finally:
            _kill(process)  # and its remaining children
            self.live.discard(process)

    def _end(self, line: dict) -> dict:
        lines.write(self.file, **line)
        word = "ok" if line["rc"] == 0 else line["why"] or f"exit code {line['rc']}"
        now = time.monotonic() - self.start
        print(
            f"{now:6.1f} s  ({line['letter']}) {line['stage']:34} {line['seconds']:6.1f} s  {word}",
            flush=True,
        )
        return line


def _kill(process: subprocess.Popen) -> None:
    """Kill a process group; wait at most 5 s, because a process may be stuck in the GPU's driver."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(5)
