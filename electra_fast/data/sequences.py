"""Sequences cut from a corpus: every token is in exactly one, and no sequence spans two documents.

One segment, ``[CLS] A [SEP]``: a document is cut every ``seq_len - 2`` tokens.

Two segments, ``[CLS] A [SEP] B [SEP]``, after ELECTRA's build_pretraining_dataset.py. The target length of a
sequence is seq_len, but for 5 % of the sequences it is drawn from 5 … seq_len. The target of A is half of the
tokens, ``(length - 3) // 2``: A ends with the last line that ends before this target or, half of the time and
if there is no such line, with the next line. 10 % of the sequences have one segment, and so have those in
which no such line ends. The published code collects whole lines and discards tokens beyond the target length;
here a sequence ends at its target length or with the document, and the next one begins there.
"""

from bisect import bisect_left
from typing import NamedTuple

import numpy as np
import torch

from electra_fast.data.cache_folder import sha256
from electra_fast.data.encoded import Encoded

# These override a user's torch.set_default_device and set_default_dtype.
HOST = {"device": "cpu", "dtype": torch.float32}


class Sequences(NamedTuple):
    start: np.ndarray  # [n] int64, offset of the first token
    first: np.ndarray  # [n] int64, number of tokens in A
    second: np.ndarray  # [n] int64, number of tokens in B, 0 without B

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
    first = np.minimum(end[document] - start, longest)
    return Sequences(start, first, np.zeros_like(first))


def cut_pairs(encoded: Encoded, seq_len: int, seed: int) -> Sequences:
    """Cut into sequences of two segments, a function of the documents, seq_len and seed."""
    begin, end = (bound.numpy() for bound in encoded.bounds())
    length, single, longer = _draws(seq_len, seed, int((end - begin + seq_len).sum()))
    # The target lengths do not depend on the documents. before[i] is the number of tokens in the sequences
    # before i if each reaches its target: a document is cut into sequences until they have all its tokens.
    before = np.concatenate([[0], (length - 3 + single).cumsum()])
    bounds, before_view = [0], memoryview(before)
    for tokens in (end - begin).tolist():
        i = bounds[-1]
        bounds.append(bisect_left(before_view, before_view[i] + tokens, lo=i))
    document, nth = _numbers(np.diff(bounds))
    i = np.arange(len(document))
    start = begin[document] + before[i] - before[i - nth]
    stop = np.minimum(start + before[i + 1] - before[i], end[document])

    lines = (encoded.offsets if encoded.lines is None else encoded.lines).numpy()
    target = start + (length[i] - 3) // 2
    line = np.searchsorted(lines, target)
    below, above = lines[line - 1], lines.take(line, mode="clip")
    border = np.where(longer[i] | (below <= start), above, below)
    border = np.where(single[i], stop, np.minimum(border, stop))
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
        length = torch.where(short, drawn, seq_len)
        tokens -= int((length - 3).sum())
        blocks.append(torch.stack([length, single, longer]))
    length, single, longer = torch.cat(blocks, 1).numpy()
    return length, single.astype(bool), longer.astype(bool)
