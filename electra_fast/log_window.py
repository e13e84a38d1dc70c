"""The log of a run, line by line: each line is about a window of steps, whose metrics arrive later."""

import collections
import contextlib
import time
from collections.abc import Iterator

from torch import Tensor

from electra_fast.divergence import Collapse
from electra_fast.journal import Journal
from electra_fast.ledger import Ledger, Row, means, total
from electra_fast.optimizer import Skipped


class LogWindow:
    """Collects the steps since the last line of the log, and writes lines when their metrics have arrived.

    Args:
        ledger: where the steps write their metrics.
        step: steps taken before the window begins.
        skipped: the count of skipped steps, which grows with each line.
        accumulate: micro-batches per step.
        warmup: see `Collapse`.
    """

    def __init__(self, ledger: Ledger, step: int, skipped: Skipped, accumulate: int, warmup: int):
        self.ledger, self.skipped, self.accumulate = ledger, skipped, accumulate
        self.collapse = Collapse(warmup)
        self.first, self.steps, self.tokens, self.rate = step, 0, 0, 0.0
        self.since = time.monotonic()
        self._closed = collections.deque()

    def add(self, tokens: int, rate: float) -> None:
        """Count a step; its row of the ledger is number `steps` before the call."""
        self.steps, self.tokens, self.rate = self.steps + 1, self.tokens + tokens, rate

    def close(self, logit_std: Tensor) -> None:
        """End the window: start an asynchronous copy of its metrics to the host, and begin the next."""
        numbers = self.ledger.read(self.steps, logit_std)
        self._closed.append((self.first, self.tokens, self.rate, numbers))
        self.first, self.steps, self.tokens = self.first + self.steps, 0, 0

    def write(self, journal: Journal, wait: bool) -> None:
        """Write the lines whose metrics have arrived; with `wait`, all."""
        while self._closed and (arrived := self._closed[0][-1](wait)) is not None:
            rows, (logit_std,) = arrived
            self._line(journal, *self._closed.popleft()[:-1], rows, logit_std)

    def _line(
        self, journal: Journal, first: int, tokens: int, rate: float, rows: list[Row], logit_std: float
    ) -> None:
        for step, row in enumerate(rows, first):
            self.skipped.add(step, row.skipped > 0)
        sums, now, last = total(rows), time.monotonic(), first + len(rows)
        facts = {
            "logit_std": logit_std,
            "learning_rate": rate,
            "skipped": self.skipped.steps,
            "tokens": tokens,
            "tokens_per_second": tokens / (now - self.since),
        }
        journal.write("train", last, means(sums, len(rows), len(rows) * self.accumulate) | facts)
        self.since = now
        for warning in (self.collapse.generator(sums), self.collapse.discriminator(last, logit_std)):
            journal.warn(last, warning)

    def skipped_steps(self) -> int:
        """Return the number of skipped steps so far; waits for the metrics of those not yet in the log."""
        reads = [*(closed[-1] for closed in self._closed), self.ledger.read(self.steps)]
        return self.skipped.steps + sum(row.skipped > 0 for read in reads for row in read(True)[0])

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Exclude the enclosed work from tokens/second."""
        began = time.monotonic()
        yield
        self.since += time.monotonic() - began
