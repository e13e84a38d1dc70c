"""Signals that ask a run to end: the first one is noted, a second one of its number ends the process."""

import contextlib
import signal
from collections.abc import Callable, Iterator

# SIGHUP comes when the terminal closes, SIGUSR1 from a batch system before the time of a job is over.
NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


@contextlib.contextmanager
def noted(note: Callable[[int], None]) -> Iterator[None]:
    """Call `note` with the number of the first signal of each kind.

    SIGHUP stays ignored under `nohup`. Outside the main thread Python lets no handler be set, and the
    signals stay those of the caller.
    """

    def handle(number: int, frame: object) -> None:
        note(number)
        signal.signal(number, signal.SIG_DFL)

    before = {}
    try:
        for number in NUMBERS:
            found = signal.getsignal(number)
            ignored = number == signal.SIGHUP and found is signal.SIG_IGN
            if not ignored and found is not None:  # None: set by other code than Python's, and not restorable
                before[number] = signal.signal(number, handle)
    except ValueError:
        pass
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
