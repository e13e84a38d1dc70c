"""Batches of sequences, padded or packed; `order` says which sequences are in which batch."""

from dataclasses import KW_ONLY, dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from electra_fast.data.encoded import Encoded
from electra_fast.data.order import Order
from electra_fast.data.sequences import Sequences, cut, cut_pairs
from electra_fast.data.stored import index_key, stored
from electra_fast.errors import must


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
    """Endless batches of sequences ``[CLS] tokens [SEP]``; each is a pure function of (seed, index).

    A document is cut every ``seq_len - 2`` tokens; the last sequence has the tokens that remain, so batches
    contain padding. ``pairs`` makes ELECTRA's segment pairs ``[CLS] A [SEP] B [SEP]`` instead
    (`sequences.cut_pairs`). An epoch is all ``num_sequences`` sequences in a random order of its own. Batches
    continue from one epoch into the next: none is partial, and a corpus smaller than a batch repeats within
    it. Rank r of R uses the indices r, R + r, 2R + r, …; a resumed run continues at an index.

    A batch has ``batch_size`` sequences or, if ``batch_tokens`` is given, as many as fit into that number of
    tokens, special ones included; it then has more than ``batch_tokens - 2 * seq_len`` tokens.
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
        _require_at_least("seq_len", 5 if self.pairs else 3, self.seq_len)
        if self.batch_tokens is None:
            _require_at_least("batch_size", 1, self.batch_size)
            capacity = self.batch_size
        else:
            _require_at_least("batch_tokens", 2 * self.seq_len, self.batch_tokens)
            self.batch_size, capacity = None, self.batch_tokens - self.seq_len + 1
        key = index_key(self.documents, self.seq_len, self.pairs, self.seed)
        self._sequences = Sequences(*stored(key, Sequences.dtypes(self.seq_len), self._cut))
        (lengths,) = stored(key, {"lengths": self._sequences.first.dtype}, lambda: [self._sequences.lengths])
        self._parts = self.documents.parts
        self.num_sequences = len(lengths)
        if not self.num_sequences:
            raise ValueError(must("Batches: documents", "contain a token", "none"))
        self.num_tokens = int(lengths.sum())  # per epoch, special ones included
        sizes = self.num_sequences if self.batch_tokens is None else lengths
        self._order = Order(sizes, capacity, self.seed, key)

    def _cut(self) -> Sequences:
        if self.pairs:
            return cut_pairs(self.documents, self.seq_len, self.seed)
        return cut(self.documents, self.seq_len)

    @property
    def num_batches(self) -> int:
        """Whole batches in an epoch."""
        return self._order.epoch_size // self._order.capacity

    def padded(self, index: int) -> Padded:
        """Return batch ``index``, each sequence padded to ``seq_len``."""
        if index < 0:
            raise IndexError(must("Batches: index", "be 0 or more", index))
        numbers = self._order.numbers(index)
        start, first, second = (column[numbers, None] for column in self._sequences)  # [B, 1]
        position = np.arange(self.seq_len)  # [L]
        middle = first + 1  # position of the first [SEP]
        last = middle + np.where(second > 0, second + 1, 0)
        # The ids read for positions of special pieces and of padding are overwritten below.
        ids = self._parts.take(start + np.maximum(position - 1, 0) - (position > middle))
        ids[:, 0] = self.cls_id
        ids[(position == middle) | (position == last)] = self.sep_id
        ids[position > last] = self.pad_id
        type_ids = torch.from_numpy(((position > middle) & (position <= last)).astype(np.int64))
        key_mask = torch.from_numpy(position <= last)
        return Padded(torch.from_numpy(ids), key_mask, type_ids if self.pairs else None)

    def announce(self, index: int) -> None:
        """Let the operating system read the ids of batch ``index`` from the disk, in the background."""
        start, first, second = (column[self._order.numbers(index)] for column in self._sequences)
        self._parts.announce(start, first + second)

    def packed(self, index: int) -> Packed:
        """Return the same sequences end to end, without padding."""
        ids, key_mask, type_ids = self.padded(index)
        lengths = key_mask.sum(1)
        cu_seqlens = pad(lengths.cumsum(0), (1, 0)).int()
        type_ids = None if type_ids is None else type_ids[key_mask]
        return Packed(ids[key_mask], cu_seqlens, int(lengths.max()), type_ids)

    def fixed_shape(self, index: int) -> Packed:
        """Return packed batch ``index`` in the shape that almost all batches have, for a CUDA graph.

        One or two sequences of padding fill it up to ``batch_tokens`` tokens, and empty sequences fill it up
        to twice the mean number of sequences. A batch of more and very short sequences has another shape.
        ``max_seqlen`` is always ``seq_len``.

        Raises:
            ValueError: ``batch_tokens`` was not given.
        """
        if self.batch_tokens is None:
            raise ValueError(must("Batches.fixed_shape: batch_tokens", "be given", None))
        batch, tokens = self.packed(index), self.batch_tokens
        real = len(batch.ids)
        bounds = [*batch.cu_seqlens.tolist(), *range(real + self.seq_len, tokens, self.seq_len)]
        bounds += [tokens] * (real < tokens)
        usual = 2 * tokens * self.num_sequences // self.num_tokens + 3
        bounds += [tokens] * (usual + 1 - len(bounds))
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device="cpu")
        ids = pad(batch.ids, (0, tokens - real), value=self.pad_id)
        type_ids = None if batch.type_ids is None else pad(batch.type_ids, (0, tokens - real))
        return Packed(ids, cu_seqlens, self.seq_len, type_ids)


def _require_at_least(argument: str, least: int, got: int) -> None:
    if got < least:
        raise ValueError(must(f"Batches: {argument}", f"be {least} or more", got))
