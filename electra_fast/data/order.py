"""The order of the items of a data set over all epochs, cut into batches.

The items of all epochs, each epoch in its own random order, form one endless list. An item has a size: 1, or
its number of tokens if the size of a batch is given in tokens. Its offset is the sum of the sizes before it,
and it belongs to batch ``offset // capacity``. So a batch is found by its index, without those before it, and
there is no state to save.
"""

import contextlib
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from electra_fast.data.sequences import seeded
from electra_fast.data.stored import forget, stored


@dataclass(eq=False)
class Order:
    """Which items are in which batch; each batch is a pure function of (seed, index)."""

    sizes: np.ndarray | int  # [N] integers, of the items; or their number N, if each has size 1
    capacity: int  # of a batch
    seed: int
    key: str | None = None  # names the items and the seed in the cache folder; None: the order is not stored

    def __post_init__(self) -> None:
        self.count = self.sizes if isinstance(self.sizes, int) else len(self.sizes)
        self.epoch_size = self.sizes if isinstance(self.sizes, int) else int(self.sizes.sum())

    def numbers(self, index: int) -> np.ndarray:
        """Return the numbers of the items in a batch."""
        begin, end = index * self.capacity, (index + 1) * self.capacity
        numbers = []
        for epoch in range(begin // self.epoch_size, (end - 1) // self.epoch_size + 1):
            order, *offsets = _epoch(self, epoch)
            bounds = np.clip(
                [begin - epoch * self.epoch_size, end - epoch * self.epoch_size], 0, self.epoch_size
            )
            low, high = np.searchsorted(*offsets, bounds) if offsets else bounds
            numbers.append(order[low:high])
        return np.concatenate(numbers)


# A batch may span two epochs, and batches of held-out text come in between.
@functools.lru_cache(maxsize=4)
def _epoch(order: Order, epoch: int) -> Sequence[np.ndarray]:
    """Return the numbers of an epoch's items in their order, and the offset of each within the epoch.

    There are no offsets if each item has size 1. The numbers are int32 if possible. If they are stored, those
    of other epochs are deleted, except the epoch before, which a batch may also need.
    """
    dtypes = {"numbers": np.int32 if order.count < 2**31 else np.int64}
    if not isinstance(order.sizes, int):
        dtypes["offsets"] = np.int64
    if order.key is None:
        return _permuted(order, epoch, **dtypes)

    def make() -> Sequence[np.ndarray]:
        with contextlib.suppress(OSError, RuntimeError):
            forget(f"{order.key}-epoch-", keep=f"{order.key}-epoch-{epoch - 1}-")
        return _permuted(order, epoch, **dtypes)

    return stored(f"{order.key}-epoch-{epoch}", dtypes, make)


def _permuted(order: Order, epoch: int, numbers: type, offsets: type | None = None) -> Sequence[np.ndarray]:
    permuted = np.empty(order.count, numbers)
    generator = seeded(order.seed, epoch)
    torch.randperm(order.count, generator=generator, device="cpu", out=torch.from_numpy(permuted))
    if offsets is None:
        return [permuted]
    sizes = order.sizes[permuted]
    begins = sizes.cumsum(dtype=offsets)
    begins -= sizes
    return [permuted, begins]
