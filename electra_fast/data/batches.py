"""Batches of sequences, padded or packed, found by their number alone.

The sequences of all epochs, each epoch's in an order of its own, lie end to end. A sequence takes one place
or, where a batch is to be of so many tokens, as many as it has, and is in batch `place // room`. So a batch
is found without those before it, and there is no state to save.
"""

import functools
from dataclasses import KW_ONLY, dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from electra_fast.data.encoded import Encoded
from electra_fast.data.sequences import cut, cut_pairs, seeded


class Padded(NamedTuple):
    ids: Tensor  # [B, L] int64
    key_mask: Tensor  # [B, L] bool, True = real
    type_ids: Tensor | None = None  # [B, L] int64, 1 = second segment


class Packed(NamedTuple):
    ids: Tensor  # [T] int64
    cu_seqlens: Tensor  # [B + 1] int32
    max_seqlen: int
    type_ids: Tensor | None = None  # [T] int64, 1 = second segment


@dataclass(eq=False)
class Batches:
    """An endless stream of batches of ``[CLS] tokens [SEP]``, a pure function of (seed, index).

    A document is cut every ``seq_len - 2`` tokens; its tail is as short as it comes, so padding is
    real. ``pairs`` makes ELECTRA's segment pairs ``[CLS] A [SEP] B [SEP]`` instead (`sequences.cut_pairs`).
    An epoch is all ``num_sequences`` sequences in an order of its own. Batches run on from
    one into the next: none is partial, and a corpus smaller than a batch repeats within it.
    Rank r of R takes the indices r, R + r, 2R + r, …; to resume is to go on at an index.

    A batch has ``batch_size`` sequences or, if ``batch_tokens`` is given, as many as have at most so many
    tokens, special ones included, and more than ``batch_tokens - 2 * seq_len``.
    """

    documents: Encoded
    _: KW_ONLY
    seq_len: int = 128
    batch_size: int | None = 32  # None if batch_tokens is given
    batch_tokens: int | None = None
    pairs: bool = False
    seed: int = 0
    pad_id: int = 0
    cls_id: int = 101
    sep_id: int = 102

    def __post_init__(self):
        least = 5 if self.pairs else 3
        if self.seq_len < least:
            raise ValueError(f"Batches: seq_len must be {least} or more, got {self.seq_len}")
        if self.batch_tokens is not None:
            self.batch_size, self._room = None, self.batch_tokens - self.seq_len + 1
            if self._room <= self.seq_len:
                least = 2 * self.seq_len
                raise ValueError(f"Batches: batch_tokens must be {least} or more, got {self.batch_tokens}")
        else:
            self._room = self.batch_size
            if self._room < 1:
                raise ValueError(f"Batches: batch_size must be 1 or more, got {self.batch_size}")
        if self.pairs:
            self._sequences = cut_pairs(self.documents, self.seq_len, self.seed)
        else:
            self._sequences = cut(self.documents, self.seq_len)
        self.num_sequences = len(self._sequences.start)
        if not self.num_sequences:
            raise ValueError("Batches: documents must hold a token, got none")
        lengths = self._sequences.lengths
        self.num_tokens = int(lengths.sum())  # of an epoch, special ones included
        self._sizes = np.ones_like(lengths) if self.batch_tokens is None else lengths
        self._size = int(self._sizes.sum())  # of an epoch

    @property
    def num_batches(self) -> int:
        """Whole batches in an epoch."""
        return self._size // self._room

    def padded(self, index: int) -> Padded:
        """Return batch ``index``, each sequence padded to ``seq_len``."""
        if index < 0:
            raise IndexError(f"Batches: index must be 0 or more, got {index}")
        rows = self._rows(index)
        start, first, second = (column[rows, None] for column in self._sequences)  # [B, 1]
        place = np.arange(self.seq_len)
        middle = first + 1  # where the first [SEP] stands
        last = middle + np.where(second > 0, second + 1, 0)
        # What is read where a special piece or padding goes is overwritten.
        source = start + place - 1 - (place > middle)
        ids = self.documents.ids.numpy().take(source, mode="clip").astype(np.int64)
        ids[:, 0] = self.cls_id
        ids[(place == middle) | (place == last)] = self.sep_id
        ids[place > last] = self.pad_id
        type_ids = torch.from_numpy(((place > middle) & (place <= last)).astype(np.int64))
        return Padded(
            torch.from_numpy(ids), torch.from_numpy(place <= last), type_ids if self.pairs else None
        )

    def packed(self, index: int) -> Packed:
        """Return the same sequences end to end, without padding."""
        ids, key_mask, type_ids = self.padded(index)
        lengths = key_mask.sum(1)
        cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
        type_ids = None if type_ids is None else type_ids[key_mask]
        return Packed(ids[key_mask], cu_seqlens, int(lengths.max()), type_ids)

    def _rows(self, index: int) -> np.ndarray:
        """Return the numbers of the sequences in a batch."""
        low, high = index * self._room, (index + 1) * self._room
        rows = []
        for epoch in range(low // self._size, (high - 1) // self._size + 1):
            order, places = _epoch(self, epoch)
            begin, end = np.searchsorted(places, (low - epoch * self._size, high - epoch * self._size))
            rows.append(order[begin:end])
        return np.concatenate(rows)


@functools.lru_cache(maxsize=4)  # a batch may lie across two epochs, and batches of held-out text between
def _epoch(batches: Batches, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the order of an epoch's sequences, and the place at which each begins."""
    order = torch.randperm(batches.num_sequences, generator=seeded(batches.seed, epoch), device="cpu").numpy()
    sizes = batches._sizes[order]
    return order, sizes.cumsum() - sizes
