"""Jobs for several processes; an error in one of them, or its end, ends all of them."""

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

CONTINUE = "the same command continues"


def results(jobs: Iterable[Any], count: int, prepare: Callable[..., Callable], *arguments: Any) -> Iterator:
    """Yield ``prepare(*arguments)(job)`` for each job, in the order in which they are complete.

    At most `count` processes work. Each starts with the first job for which no other process is free, in a
    new interpreter, and calls `prepare` once. One job is taken from `jobs` in advance, so few of them are in
    the memory. Closing the generator ends the processes at once.

    Raises:
        OSError: a process ended or raised an error, which the message contains.
    """
    processes, idle, busy = {}, [], set()
    try:
        for job in jobs:
            if not idle and len(processes) < count:
                connection, process = _start(prepare, arguments)
                processes[connection] = process
                idle.append(connection)
            while not idle:
                for connection in _ready(busy):
                    yield _received(connection, processes)
                    idle.append(connection)
            connection = idle.pop()
            with _checked(processes[connection]):
                connection.send(job)
            busy.add(connection)
        while busy:
            for connection in _ready(busy):
                yield _received(connection, processes)
    finally:
        for process in processes.values():
            process.kill()
        for process in processes.values():
            process.join()


def _start(prepare: Callable, arguments: tuple) -> tuple[Connection, Any]:
    context = multiprocessing.get_context("spawn")  # A forked process would inherit threads and locks.
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, prepare, arguments), daemon=True)
    process.start()
    theirs.close()  # If the process ends, reading from `ours` raises EOFError.
    return ours, process


def _ready(busy: set[Connection]) -> list[Connection]:
    ready = wait(busy)
    busy.difference_update(ready)
    return ready


def _received(connection: Connection, processes: dict[Connection, Any]) -> Any:
    with _checked(processes[connection]):
        error, result = connection.recv()
    if error is not None:
        raise OSError(f"tokenize: a worker failed: {error}; {CONTINUE}")
    return result


@contextlib.contextmanager
def _checked(process: Any) -> Iterator[None]:
    try:
        yield
    except (EOFError, ConnectionError):
        process.join()
        code = process.exitcode
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        why = ", perhaps because the memory was full" if code == -signal.SIGKILL else ""
        raise OSError(f"tokenize: a worker {how}{why}; {CONTINUE}") from None


def _work(connection: Connection, prepare: Callable, arguments: tuple) -> None:
    """Run in a worker: answer each job with (error or None, result) until the connection is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # The terminal sends it to all; the parent ends its workers.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    try:
        function = prepare(*arguments)
        while True:
            connection.send((None, function(connection.recv())))
    except (EOFError, ConnectionError):  # The parent ended.
        pass
    except BaseException as error:  # The panics of tokenizers are not subclasses of Exception.
        connection.send((f"{type(error).__name__}: {error}", None))
