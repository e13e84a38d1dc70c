"""How often a run on many GPUs fails, and how often it should be saved."""

import math
from typing import NamedTuple

GPUS = (8, 64, 1024, 4096, 16384)
# Per GPU and day: 419 unexpected interruptions in 54 days on 16,384 GPUs (Llama 3, arXiv 2407.21783, 3.3.4).
RATE = 419 / 54 / 16384
COPY = 10e9  # bytes per second from the GPU to ordinary memory of the host; assumed
RESTART = 300.0  # seconds from a failure to the first new step; assumed
DAY = 86400.0


class Plan(NamedTuple):
    """Checkpoints of a run whose steps wait while the state is copied to the host; a thread writes it."""

    per_day: float  # failures
    interval: float  # seconds from one checkpoint to the next
    lost: float  # the share of the time in which the state is copied and lost work is repeated


def plan(gpus: int, size: float) -> Plan:
    """Return the best plan for checkpoints of `size` bytes (Young 1974, doi:10.1145/361147.361115).

    Daly (2006, doi:10.1016/j.future.2004.11.016) adds terms that are small while copying takes much less time
    than passes between two failures.
    """
    copying, between = size / COPY, DAY / (RATE * gpus)
    interval = math.sqrt(2 * copying * between)
    return Plan(DAY / between, interval, copying / interval + (interval / 2 + RESTART) / between)
