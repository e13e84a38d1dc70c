"""Progress on stderr, a bar on a terminal or one line per ten seconds: what runs, and the time left."""

import os
import time
from typing import TextIO

EVERY = 10.0  # seconds between two lines


class Progress:
    """A pytest plugin that replaces the dots.

    Args:
        budget: seconds that the run may take.
        started: the value of time.monotonic() when the run started.
        stream: defaults to a copy of stderr, because pytest captures stderr itself.
    """

    def __init__(self, budget: float, started: float, stream: TextIO | None = None):
        self.budget, self.started = budget, started
        self.stream = stream or os.fdopen(os.dup(2), "w", buffering=1)
        self.done, self.total = 0, 0
        self.last = -EVERY
        self.bar = self._bar() if self.stream.isatty() else None

    def _bar(self):
        try:
            from tqdm import tqdm
        except ImportError:
            return None
        tqdm.monitor_interval = 0  # the CPU time of its thread would be charged to the timed call
        shape = "{desc} |{bar}| {postfix}"
        return tqdm(total=self.budget, file=self.stream, bar_format=shape, dynamic_ncols=True, leave=False)

    def say(self, what: str) -> None:
        """Show what starts now."""
        spent = time.monotonic() - self.started
        left = f"{self.budget - spent:.0f} s left" if spent < self.budget else "the budget is spent"
        if self.bar is not None:
            self.bar.n = min(spent, self.budget)
            self.bar.set_postfix_str(left, refresh=False)
            self.bar.set_description_str(f"{self.done} of {self.total}, {what}")
        elif spent - self.last >= EVERY:
            self.last = spent
            print(f"{spent:4.0f} s, {left}: {self.done} of {self.total}, {what}", file=self.stream)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        self.stream.close()

    def pytest_collection_finish(self, session) -> None:
        self.total = len(session.items)

    def pytest_runtest_logfinish(self) -> None:
        self.done += 1

    def pytest_report_teststatus(self, report) -> tuple[str, str, str]:
        return report.outcome if report.when == "call" else "", "", ""
