"""Batches as a model takes them, on its device, each made while the one before is computed with."""

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from electra_fast.data import Batches

Batch = dict[str, Any]  # keyword arguments of Electra.forward


class Feed:
    """`feed[index]` is a batch, a function of the batches' seed and the index."""

    def __init__(self, batches: Batches, packed: bool, device: torch.device):
        self.batches, self.packed, self.device = batches, packed, device

    def __getitem__(self, index: int) -> Batch:
        return self._send(self._make(index))

    @contextlib.contextmanager
    def ahead(self) -> Iterator[Callable[[int], tuple[Batch, int]]]:
        """Yield index -> (batch, real tokens in it); a thread makes index + 1 meanwhile.

        One thread suffices: it makes 20 million tokens a second, and what it raises comes up in the caller.
        """
        with ThreadPoolExecutor(1) as pool:
            waiting: dict[int, Future[Batch]] = {}

            def take(index: int) -> tuple[Batch, int]:
                batch = (waiting.pop(index, None) or pool.submit(self._make, index)).result()
                waiting[index + 1] = pool.submit(self._make, index + 1)
                tokens = batch["ids"].numel() if self.packed else int(batch["key_mask"].sum())
                return self._send(batch), tokens

            yield take

    def _make(self, index: int) -> Batch:
        batch = self.batches.packed(index) if self.packed else self.batches.padded(index)
        pin = self.device.type == "cuda"
        named = {name: x for name, x in batch._asdict().items() if x is not None}
        return {name: x.pin_memory() if pin and isinstance(x, Tensor) else x for name, x in named.items()}

    def _send(self, batch: Batch) -> Batch:
        to = {"device": self.device, "non_blocking": True}
        return {name: x.to(**to) if isinstance(x, Tensor) else x for name, x in batch.items()}
