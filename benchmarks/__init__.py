"""Benchmarks of each op and of a whole pre-training step: `python -m benchmarks` (see README.md)."""

import os
from time import monotonic

# torch reads this when it loads: threads that spin while they wait would be charged as CPU time.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # every model is built from a config

STARTED = monotonic()  # the budget counts from here, so it includes loading torch


def __getattr__(name: str):
    if name != "time":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from benchmarks.harness.timing import time  # here, because it loads torch

    return time
