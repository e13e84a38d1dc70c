"""The batches of a run on its device, each prepared while the model computes with the one before."""

import queue
import threading
import time
from collections.abc import Callable, Generator
from concurrent import futures
from typing import Any

import torch
from torch import Tensor

from electra_fast.errors import must

Batch = dict[str, Any]  # keyword arguments of Electra.forward
BATCH_TIMEOUT = (
    600.0  # seconds to wait for one batch, which takes milliseconds unless the disk of the text hangs
)
POLL = 0.5  # seconds between two checks whether the run was asked to stop
AHEAD = 16  # batches for which the disk is asked before they are made
CLOSING = 3.0  # seconds to wait at the end for a batch; SIGKILL often follows 10 seconds after SIGTERM


class NoBatch(TimeoutError):
    """A batch was not ready in time, or the run was asked to stop while it waited for one."""


class Loader:
    """`loader[index]` is the batch that ``make(index)`` returns, on a device.

    `batches` describes the data; it has the ``pad_id``. On a GPU all batches should have the same shape, so
    that a step can be captured as a CUDA graph. ``announce(index)`` asks the disk for a batch that is needed
    soon.
    """

    def __init__(
        self,
        batches: Any,
        make: Callable[[int], Batch],
        device: torch.device,
        announce: Callable[[int], None] = lambda index: None,
    ):
        self.batches, self.make, self.device, self.announce = batches, make, device, announce
        self._copy_stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __getitem__(self, index: int) -> Batch:
        return self._send(self._make(index))

    def prefetch(
        self, first: int = 0, every: int = 1, stop: Callable[[], Any] = lambda: False
    ) -> Generator[tuple[Batch, int], None, None]:
        """Yield (batch, number of real tokens) for first, first + every, …; a thread prepares the next batch.

        One thread is enough: it prepares 20 million tokens per second. Its errors are raised in the caller.
        It is a daemon, so if it hangs the process can still end. Closing the generator ends it and waits for
        it, at most `CLOSING` seconds: a process that ends while another thread is inside torch is aborted.

        Raises:
            NoBatch: a batch was not ready after `BATCH_TIMEOUT` seconds, or ``stop()`` was true meanwhile.
        """
        jobs: queue.SimpleQueue[tuple[int, futures.Future[Batch]] | None] = queue.SimpleQueue()

        def work() -> None:
            announced = first
            while (job := jobs.get()) is not None:
                index, future = job
                try:
                    while announced <= index + AHEAD * every:
                        self.announce(announced)
                        announced += every
                    future.set_result(self._make(index))
                except BaseException as error:  # raised in the caller by future.result()
                    future.set_exception(error)

        def request(index: int) -> futures.Future[Batch]:
            future: futures.Future[Batch] = futures.Future()
            jobs.put((index, future))
            return future

        thread = threading.Thread(target=work, name="electra_fast batches", daemon=True)
        thread.start()
        try:
            index, future = first, request(first)
            while True:
                _wait(future, index, stop)
                batch = future.result()
                index, future = index + every, request(index + every)
                tokens = int((batch["ids"] != self.batches.pad_id).sum())
                yield self._send(batch), tokens
        finally:
            jobs.put(None)
            thread.join(CLOSING)

    def _make(self, index: int) -> Batch:
        batch, pin = self.make(index), self._copy_stream is not None
        return {name: x.pin_memory() if pin and isinstance(x, Tensor) else x for name, x in batch.items()}

    def _send(self, batch: Batch) -> Batch:
        """Copy on a separate CUDA stream, so that the copy does not wait for the steps queued before it."""
        if self._copy_stream is None:
            return batch
        computing = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self._copy_stream):
            to = {"device": self.device, "non_blocking": True}
            sent = {name: x.to(**to) if isinstance(x, Tensor) else x for name, x in batch.items()}
        computing.wait_stream(self._copy_stream)
        for x in sent.values():
            if isinstance(x, Tensor):
                x.record_stream(computing)
        return sent


def _wait(future: futures.Future[Batch], index: int, stop: Callable[[], Any]) -> None:
    end = time.monotonic() + BATCH_TIMEOUT
    while not futures.wait([future], timeout=POLL).done:
        if stop():
            raise NoBatch(f"loader: the run was asked to stop while it waited for batch {index}")
        if time.monotonic() > end:
            rule = f"be ready within {BATCH_TIMEOUT:g} seconds"
            remedy = "check the disk with the token cache (XDG_CACHE_HOME, else ~/.cache)"
            raise NoBatch(must(f"loader: batch {index}", rule, "none", remedy))
