"""How fast each op and a whole pre-training step are: `python -m benchmarks` (see README.md)."""

import os
import time

# Read when torch loads: threads that spin while they wait are charged as CPU time.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # every model is built from a config

STARTED = time.monotonic()  # the budget counts from here: loading torch is part of it
