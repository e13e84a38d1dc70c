"""A process that answers questions one by one, so that a crash or a hang ends it and not the caller."""

import ctypes
import multiprocessing
import signal
import sys
from collections.abc import Callable

PR_SET_PDEATHSIG = 1  # of linux/prctl.h


class Died(Exception):
    """The process ended or did not answer in time; the message says how."""


class NoStart(Exception):
    """The process ended before its first answer."""


def _serve(pipe, prepare: Callable, arguments: tuple) -> None:
    if sys.platform == "linux":  # end with the parent, also if that is killed
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    answer = prepare(*arguments)
    pipe.send("ready")
    while True:
        question = pipe.recv()
        try:
            found = answer(*question)
        except Exception as error:  # of any type: `ask` raises it
            found = error
        pipe.send(found)


class Child:
    """Answers with the function that `prepare(*arguments)` returns in a new process.

    The process is started when needed, and again after it died. `prepare` and the arguments are pickled.
    """

    def __init__(self, limit: float, prepare: Callable, *arguments):
        self.limit, self.prepare, self.arguments, self.process = limit, prepare, arguments, None

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        target = (other, self.prepare, self.arguments)
        self.process = context.Process(target=_serve, args=target, daemon=True)
        self.process.start()
        other.close()
        try:
            self.pipe.recv()  # the start takes seconds, which should not count for an answer
        except EOFError:
            raise NoStart(self.stop()) from None

    def stop(self) -> str:
        """End the process; return how it ended."""
        self.process.join(timeout=1)
        self.process.kill()
        self.process.join()
        code, self.process = self.process.exitcode, None
        name = f" ({signal.Signals(-code).name})" if code < 0 else ""
        return f"the process ended with exit code {code}{name}"

    def ask(self, *question):
        """Return the answer, which is not None, or raise the error with which the question ended.

        Raises:
            NoStart: the process cannot start.
            Died: the process ended, or has not answered within the limit.
        """
        if self.process is None:
            self.start()
        try:
            self.pipe.send(question)
            found = self.pipe.recv() if self.pipe.poll(self.limit) else None
        except (EOFError, ConnectionError):
            raise Died(self.stop()) from None
        if found is None:
            self.stop()
            raise Died(f"no result within {self.limit:.0f} seconds")
        if isinstance(found, Exception):
            raise found
        return found

    def close(self) -> None:
        """End the process without waiting for it."""
        if self.process is not None:
            self.process.kill()
