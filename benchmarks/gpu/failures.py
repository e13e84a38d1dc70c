"""A pytest plugin that writes each failure immediately: `-p benchmarks.gpu.failures`.

The environment variable BENCHMARK_LINES names the file, and BENCHMARK_STAGE the stage.
"""

import os
from collections import Counter
from pathlib import Path

from benchmarks.gpu import lines

COUNTS: Counter = Counter()


def _write(**line) -> None:
    if "PYTEST_XDIST_WORKER" not in os.environ:  # the controller gets all reports
        stage = os.environ.get("BENCHMARK_STAGE", "")
        lines.write(Path(os.environ["BENCHMARK_LINES"]), kind="test", stage=stage, **line)


def pytest_runtest_logreport(report):
    if report.failed:
        _write(test=report.nodeid, when=report.when, why=str(report.longrepr)[-1500:])
    if report.when == "call" or report.outcome != "passed":
        COUNTS[report.outcome] += 1
        if sum(COUNTS.values()) % 100 == 0:
            _write(counts=dict(COUNTS))


def pytest_sessionfinish(session):
    _write(counts=dict(COUNTS), finished=True)
