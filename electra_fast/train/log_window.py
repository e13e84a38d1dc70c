"""The lines of the log: each is about a window of steps, whose metrics arrive later."""

import collections
import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from electra_fast.distributed import World
from electra_fast.train.logger import Logger
from electra_fast.train.metrics import MetricBuffer, total
from electra_fast.train.optimizer import Skipped

# A function of (sums, step, logit_std) of a line of the log.
Warnings = Callable[[Any, int, float], Iterable[str | None]]


class LogWindow:
    """Counts the steps since the last line of the log, and writes lines when their metrics have arrived.

    Args:
        metrics: the buffer to which the steps write.
        step: the number of steps before the window.
        skipped: the counter of skipped steps, which is updated with each line.
        accumulate: micro-batches per step.
        warnings: returns warnings about a line, or None for each. It must not be a method of the run, because
            the cycle of references would keep the folder locked.
        world: the processes, whose metrics are added.
    """

    def __init__(
        self,
        metrics: MetricBuffer,
        step: int,
        skipped: Skipped,
        accumulate: int,
        warnings: Warnings,
        world: World,
    ):
        self.metrics, self.skipped, self.accumulate = metrics, skipped, accumulate
        self.warnings, self.world = warnings, world
        self.first, self.steps, self.tokens, self.rate = step, 0, 0, 0.0
        self.since = time.monotonic()
        self._closed = collections.deque()

    def add(self, tokens: int, rate: float) -> None:
        """Count a step; its row of the buffer is the value of `steps` before the call."""
        self.steps, self.tokens, self.rate = self.steps + 1, self.tokens + tokens, rate

    def close(self, logit_std: Tensor) -> None:
        """End the window: start an asynchronous copy of its metrics to the host, and begin the next one.

        `logit_std` is that of the last micro-batch, which the last process has.
        """
        if self.world.rank < self.world.size - 1:
            logit_std = torch.zeros_like(logit_std)
        tokens = torch.full_like(logit_std, self.tokens, dtype=torch.float64)
        numbers = self.metrics.read(self.steps, logit_std, tokens, world=self.world)
        self._closed.append((self.first, self.rate, numbers))
        self.first, self.steps, self.tokens = self.first + self.steps, 0, 0

    def write(self, logger: Logger, wait: bool) -> None:
        """Write the lines whose metrics have arrived; with `wait`, wait and write all lines."""
        while self._closed and (arrived := self._closed[0][-1](wait)) is not None:
            rows, (logit_std, tokens) = arrived
            self._line(logger, *self._closed.popleft()[:-1], int(tokens), rows, logit_std)

    def _line(
        self, logger: Logger, first: int, rate: float, tokens: int, rows: list[Any], logit_std: float
    ) -> None:
        for step, row in enumerate(rows, first):
            self.skipped.add(step, row.skipped > 0)
        sums, now, last = total(rows), time.monotonic(), first + len(rows)
        facts = {
            "learning_rate": rate,
            "skipped": self.skipped.steps,
            "tokens": tokens,
            "tokens_per_second": tokens / (now - self.since),
        }
        if not math.isnan(logit_std):
            facts = {"logit_std": logit_std} | facts
        logger.write("train", last, sums.means(len(rows), len(rows) * self.accumulate) | facts)
        self.since = now
        for warning in self.warnings(sums, last, logit_std):
            logger.warn(last, warning)

    def skipped_steps(self) -> int:
        """Return the number of skipped steps; wait for the metrics of steps that are not yet in the log."""
        reads = [*(closed[-1] for closed in self._closed), self.metrics.read(self.steps)]
        return self.skipped.steps + sum(row.skipped > 0 for read in reads for row in read(True)[0])

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the enclosed work from `tokens_per_second`."""
        began = time.monotonic()
        yield
        self.since += time.monotonic() - began
