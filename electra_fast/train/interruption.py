"""Signals that ask a run to stop: the first one is noted, a second one of the same kind ends the process."""

import contextlib
import signal
from collections.abc import Callable, Iterator

# SIGHUP is sent when the terminal closes, SIGUSR1 by a batch system before the time of a job is over.
NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


@contextlib.contextmanager
def noted(note: Callable[[int], None]) -> Iterator[None]:
    """Call `note` with the number of the first signal of each kind.

    SIGHUP stays ignored under `nohup`. Outside of the main thread Python does not allow handlers, so the
    caller's stay.
    """

    def handle(number: int, frame: object) -> None:
        note(number)
        signal.signal(number, signal.SIG_DFL)

    before = {}
    try:
        for number in NUMBERS:
            found = signal.getsignal(number)
            ignored = number == signal.SIGHUP and found is signal.SIG_IGN
            if not ignored and found is not None:  # None: not Python's handler
                before[number] = signal.signal(number, handle)
    except ValueError:
        pass
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
