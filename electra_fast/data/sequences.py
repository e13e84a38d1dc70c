"""Sequences cut from a corpus: every token is in exactly one, and no sequence spans two documents.

One segment, ``[CLS] A [SEP]``: a document is cut every ``seq_len - 2`` tokens.

Two segments, ``[CLS] A [SEP] B [SEP]``, after ELECTRA's build_pretraining_dataset.py. The target length of a
sequence is seq_len, but for 5 % of the sequences it is drawn from 5 … seq_len. The target of A is half of the
tokens, ``(length - 3) // 2``: A ends with the last line that ends before this target or, half of the time and
if there is no such line, with the next line. 10 % of the sequences have one segment, and so have those in
which no such line ends. The published code collects whole lines and discards tokens beyond the target length;
here a sequence ends at its target length or with the document, and the next one begins there.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from electra_fast.data.cache_folder import sha256
from electra_fast.data.encoded import Encoded

# These override a user's torch.set_default_device and set_default_dtype.
HOST = {"device": "cpu", "dtype": torch.float32}
BLOCK = 1 << 16  # documents whose sequences are computed together, which needs 100 bytes per sequence


class Sequences(NamedTuple):
    start: np.ndarray  # [n] int64, offset of the first token
    first: np.ndarray  # [n] int16 or int32, number of tokens in A
    second: np.ndarray  # [n] int16 or int32, number of tokens in B, 0 without B

    @staticmethod
    def dtypes(seq_len: int) -> dict[str, type]:
        segment = np.int16 if seq_len < 1 << 15 else np.int32
        return {"start": np.int64, "first": segment, "second": segment}

    @property
    def lengths(self) -> np.ndarray:
        """Numbers of tokens, including [CLS] and a [SEP] after each segment."""
        return self.first + self.second + 2 + (self.second > 0)


def seeded(*parts: object) -> torch.Generator:
    """Return a generator that differs for each tuple: epoch 1 of seed 0 is not epoch 0 of seed 1."""
    return torch.Generator().manual_seed(int(sha256(" ".join(map(str, parts)))[:15], 16))


def cut(encoded: Encoded, seq_len: int) -> Sequences:
    """Cut into sequences of one segment."""
    begin, end = (bound.numpy() for bound in encoded.bounds())
    longest = seq_len - 2  # without the special tokens
    counts = (end - begin + longest - 1) // longest
    document, nth = _numbers(counts)
    start = begin[document] + nth * longest
    first = np.minimum(end[document] - start, longest).astype(Sequences.dtypes(seq_len)["first"])
    return Sequences(start, first, np.zeros_like(first))


def cut_pairs(encoded: Encoded, seq_len: int, seed: int) -> Sequences:
    """Cut into sequences of two segments, a function of the documents, seq_len and seed."""
    begin, end = (bound.numpy() for bound in encoded.bounds())
    drawn = _draws(seq_len, seed, int((end - begin + seq_len).sum()))
    length, single, _ = drawn
    # The target lengths do not depend on the documents. before[i] is the number of tokens in the sequences
    # before i if each reaches its target: a document is cut into sequences until they have all its tokens.
    before = np.zeros(len(length) + 1, np.int64)
    np.cumsum(length - 3 + single, out=before[1:])
    bounds = np.fromiter(_bounds(before, end - begin, seq_len - 2), np.int64, len(begin))
    bounds = np.concatenate([[0], bounds])
    lines = (encoded.offsets if encoded.lines is None else encoded.lines).numpy()
    found = Sequences(*(np.empty(bounds[-1], dtype) for dtype in Sequences.dtypes(seq_len).values()))
    for low in range(0, len(begin), BLOCK):
        block, these = slice(low, low + BLOCK), bounds[low : low + BLOCK + 1]
        computed = _pairs(begin[block], end[block], these, before, drawn, lines)
        for column, values in zip(found, computed, strict=True):
            column[these[0] : these[-1]] = values
    return found


def _bounds(before: np.ndarray, tokens: np.ndarray, longest: int) -> Iterator[int]:
    """Yield for each document the number of sequences up to its end."""
    i, view = 0, memoryview(before)
    for n in memoryview(tokens):
        end = view[i] + n
        i += (n + longest - 1) // longest  # No sequence has more than `longest` tokens.
        while view[i] < end:
            i += 1
        yield i


def _pairs(
    begin: np.ndarray,
    end: np.ndarray,
    bounds: np.ndarray,
    before: np.ndarray,
    drawn: tuple[np.ndarray, np.ndarray, np.ndarray],
    lines: np.ndarray,
) -> Sequences:
    """Return the sequences of some documents, of which number d has the sequences from ``bounds[d]`` on."""
    document, nth = _numbers(np.diff(bounds))
    i = np.arange(bounds[0], bounds[-1])
    length, single, longer = (column[bounds[0] : bounds[-1]] for column in drawn)
    start = begin[document] + before[i] - before[i - nth]
    stop = np.minimum(start + before[i + 1] - before[i], end[document])

    target = start + (length - 3) // 2
    line = np.searchsorted(lines, target)
    below, above = lines[line - 1], lines.take(line, mode="clip")
    border = np.where(longer | (below <= start), above, below)
    border = np.where(single, stop, np.minimum(border, stop))
    return Sequences(start, border - start, stop - border)


def _numbers(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return for each sequence the number of its document, and its own number within the document."""
    document = np.repeat(np.arange(len(counts)), counts)
    return document, np.arange(len(document)) - (counts.cumsum() - counts)[document]


def _draws(seq_len: int, seed: int, tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return target length, whether there is one segment, and whether A exceeds its target.

    There are enough sequences for `tokens` tokens.
    """
    generator, blocks = seeded("pairs", seed), []
    while tokens > 0:
        n = 1 << 16
        shares = torch.tensor([[0.05], [0.1], [0.5]], **HOST)
        short, single, longer = torch.rand(3, n, generator=generator, **HOST) < shares
        drawn = torch.randint(5, seq_len + 1, (n,), generator=generator, device="cpu")
        length = torch.where(short, drawn, seq_len).int()
        tokens -= int((length - 3).sum())
        blocks.append((length.numpy(), single.numpy(), longer.numpy()))
    return tuple(map(np.concatenate, zip(*blocks, strict=True)))
