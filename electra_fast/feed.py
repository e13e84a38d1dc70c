"""Batches as a model takes them, on its device, each made while the one before is computed with.

All have one shape, so that a step can be captured as a CUDA graph: a packed batch is filled up with sequences
of padding, one or two of them, to its number of tokens, and with empty ones to a number of sequences.
"""

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from electra_fast.data import Batches, Packed

Batch = dict[str, Any]  # keyword arguments of Electra.forward
PATIENCE = 600.0  # seconds to wait for one batch: it takes milliseconds, unless the disk of the text hangs
POLL = 0.5  # seconds between two looks at whether the run was asked to stop


class NoBatch(TimeoutError):
    """A batch was not made in time, or the run was asked to stop while it waited for one."""


class Feed:
    """`feed[index]` is a batch, a function of the batches' seed and the index."""

    def __init__(self, batches: Batches, packed: bool, device: torch.device):
        self.batches, self.packed, self.device = batches, packed, device
        self._copying = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __getitem__(self, index: int) -> Batch:
        return self._send(self._make(index))

    @contextlib.contextmanager
    def ahead(self, stop: Callable[[], Any] = lambda: False) -> Iterator[Callable[[int], tuple[Batch, int]]]:
        """Yield index -> (batch, real tokens in it); a thread makes index + 1 meanwhile.

        One thread suffices: it makes 20 million tokens a second, and what it raises is raised in the caller.
        A call raises `NoBatch` after `PATIENCE` seconds, or once ``stop()`` is true while it waits. The
        thread is a daemon, so that one that hangs does not keep the process from ending.
        """
        jobs: queue.SimpleQueue[tuple[int, futures.Future[Batch]] | None] = queue.SimpleQueue()
        waiting: dict[int, futures.Future[Batch]] = {}

        def work() -> None:
            while (job := jobs.get()) is not None:
                index, future = job
                try:
                    future.set_result(self._make(index))
                except BaseException as error:  # for the thread that waits
                    future.set_exception(error)

        def ask(index: int) -> futures.Future[Batch]:
            future: futures.Future[Batch] = futures.Future()
            jobs.put((index, future))
            return future

        def take(index: int) -> tuple[Batch, int]:
            future = waiting.pop(index, None) or ask(index)
            _wait(future, index, stop)
            batch = future.result()
            waiting[index + 1] = ask(index + 1)
            tokens = int((batch["ids"] != self.batches.pad_id).sum())
            return self._send(batch), tokens

        threading.Thread(target=work, name="electra_fast batches", daemon=True).start()
        try:
            yield take
        finally:
            jobs.put(None)

    def _make(self, index: int) -> Batch:
        batch = filled(self.batches, index) if self.packed else self.batches.padded(index)
        named = {name: x for name, x in batch._asdict().items() if x is not None}
        pin = self._copying is not None
        return {name: x.pin_memory() if pin and isinstance(x, Tensor) else x for name, x in named.items()}

    def _send(self, batch: Batch) -> Batch:
        """Copy on a stream of its own: the host is ahead of the device, so it does not wait for a step."""
        if self._copying is None:
            return batch
        computing = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self._copying):
            to = {"device": self.device, "non_blocking": True}
            sent = {name: x.to(**to) if isinstance(x, Tensor) else x for name, x in batch.items()}
        computing.wait_stream(self._copying)
        for x in sent.values():
            if isinstance(x, Tensor):
                x.record_stream(computing)
        return sent


def _wait(future: futures.Future[Batch], index: int, stop: Callable[[], Any]) -> None:
    end = time.monotonic() + PATIENCE
    while not futures.wait([future], timeout=POLL).done:
        if stop():
            raise NoBatch(f"pretrain: the run was asked to stop while it waited for batch {index}")
        if time.monotonic() > end:
            raise NoBatch(
                f"pretrain: batch {index} must be made within {PATIENCE:g} seconds, got none; the disk that "
                "holds the tokens (XDG_CACHE_HOME, else ~/.cache) may not answer"
            )


def filled(batches: Batches, index: int) -> Packed:
    """Return packed batch `index` with ``batch_tokens`` tokens, and as many sequences as most batches have.

    Twice the mean number of sequences, which a batch of very short ones passes: it has more, in a shape of
    its own. ``max_seqlen`` is that of all.
    """
    batch, tokens, longest = batches.packed(index), batches.batch_tokens, batches.seq_len
    real = len(batch.ids)
    bounds = [*batch.cu_seqlens.tolist(), *range(real + longest, tokens, longest)] + [tokens] * (
        real < tokens
    )
    usual = 2 * tokens * batches.num_sequences // batches.num_tokens + 3
    bounds += [tokens] * (usual + 1 - len(bounds))
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device="cpu")
    types = None if batch.type_ids is None else pad(batch.type_ids, (0, tokens - real))
    return Packed(pad(batch.ids, (0, tokens - real), value=batches.pad_id), cu_seqlens, longest, types)
