"""The order of the items of a data set over all epochs, cut into batches.

The items of all epochs, each epoch in its own random order, form one endless list. An item has a size: 1, or
its number of tokens if the size of a batch is given in tokens. Its offset is the sum of the sizes before it,
and it belongs to batch ``offset // capacity``. So a batch is found by its index, without those before it, and
there is no state to save.
"""

import functools
from dataclasses import dataclass

import numpy as np
import torch

from electra_fast.data.sequences import seeded


@dataclass(eq=False)
class Order:
    """Which items are in which batch; each batch is a pure function of (seed, index)."""

    sizes: np.ndarray  # [N] int64, of the items
    capacity: int  # of a batch
    seed: int

    def __post_init__(self) -> None:
        self.epoch_size = int(self.sizes.sum())

    def numbers(self, index: int) -> np.ndarray:
        """Return the numbers of the items in a batch."""
        begin, end = index * self.capacity, (index + 1) * self.capacity
        numbers = []
        for epoch in range(begin // self.epoch_size, (end - 1) // self.epoch_size + 1):
            order, offsets = _epoch(self, epoch)
            bounds = (begin - epoch * self.epoch_size, end - epoch * self.epoch_size)
            low, high = np.searchsorted(offsets, bounds)
            numbers.append(order[low:high])
        return np.concatenate(numbers)


# A batch may span two epochs, and batches of held-out text come in between.
@functools.lru_cache(maxsize=4)
def _epoch(order: Order, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the numbers of an epoch's items in their order, and the offset of each within the epoch."""
    generator = seeded(order.seed, epoch)
    numbers = torch.randperm(len(order.sizes), generator=generator, device="cpu").numpy()
    sizes = order.sizes[numbers]
    return numbers, sizes.cumsum() - sizes
