"""Several processes that train together, as torchrun starts them, forked as in trainings.py."""

import contextlib
import io
import os
import socket
from collections.abc import Callable
from typing import Any, NamedTuple

import fine_tunings
import trainings


class Ended(NamedTuple):
    """How the processes ended, by rank."""

    codes: list[int]
    errors: list[str]  # what each printed to stderr, or its exception


def run(count: int, function: Callable[..., Any], *args: Any, hangs: bool = False, **of_rank: Any) -> Ended:
    """Call ``function(*args)`` in `count` processes and wait for them; if the last one `hangs`, kill it.

    `of_rank` has keyword arguments for one process each: ``rank1={"signal_at": …}``.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    receivers, processes = [], []
    for rank in range(count):
        receiver, sender = trainings.CONTEXT.Pipe(duplex=False)
        kwargs = of_rank.get(f"rank{rank}", {})
        process = trainings.CONTEXT.Process(
            target=_as_rank, args=(rank, count, port, sender, function, args, kwargs)
        )
        process.start()
        sender.close()
        receivers.append(receiver)
        processes.append(process)
    for process in processes:
        process.join(0 if hangs and process is processes[-1] else 100)
        process.kill()
        process.join()
    errors = []
    for receiver in receivers:
        try:
            errors.append(receiver.recv())
        except EOFError:
            errors.append("")
    return Ended([process.exitcode for process in processes], errors)


def _as_rank(rank, count, port, sender, function, args, kwargs) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            function(*args, **kwargs)
    except BaseException as error:
        errors.write(f"{type(error).__name__}: {error}")
        raise
    finally:
        sender.send(errors.getvalue())


def pretrain(count: int, recipe, out, **of_rank) -> Ended:
    """Pre-train as `trainings.train`; `of_rank` has its faults."""
    return run(count, trainings.train, recipe, out, **of_rank)


def fine_tune(count: int, recipe, out, **of_rank) -> Ended:
    return run(count, fine_tunings.train, recipe, out, None, None, **of_rank)
