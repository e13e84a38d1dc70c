"""A corpus is cut into sequences: every token is in exactly one, and none reaches over a document's end.

One segment, ``[CLS] A [SEP]``: a document is cut every ``seq_len - 2`` tokens.

Two, ``[CLS] A [SEP] B [SEP]``, after ELECTRA's build_pretraining_dataset.py. A sequence aims at a length of
seq_len, 5 % of them at one drawn from 5 … seq_len. A aims at half of the tokens, ``(length - 3) // 2``: it
ends with the last line that stays below or, half of the time and where there is none, with the next line.
10 % have one segment, and so have those in which no such line ends. Published code takes whole lines and
trims away what is too long; here a sequence takes what it aims at, and the next begins where it ended.
"""

from bisect import bisect_left
from typing import NamedTuple

import numpy as np
import torch

from electra_fast.data.encoded import Encoded
from electra_fast.data.files import sha256

# Where a user's torch.set_default_device or set_default_dtype says otherwise.
HOST = {"device": "cpu", "dtype": torch.float32}


class Sequences(NamedTuple):
    start: np.ndarray  # [n] int64, of its first token
    first: np.ndarray  # [n] int64, tokens of A
    second: np.ndarray  # [n] int64, tokens of B, 0 where there is none

    @property
    def lengths(self) -> np.ndarray:
        """[CLS] and a [SEP] behind each segment included."""
        return self.first + self.second + 2 + (self.second > 0)


def seeded(*parts: object) -> torch.Generator:
    """Return a generator of its own for each tuple: epoch 1 of seed 0 is not epoch 0 of seed 1."""
    return torch.Generator().manual_seed(int(sha256(" ".join(map(str, parts)))[:15], 16))


def cut(encoded: Encoded, seq_len: int) -> Sequences:
    """Cut into one segment a sequence."""
    begin, end = (bound.numpy() for bound in encoded.bounds())
    room = seq_len - 2
    counts = (end - begin + room - 1) // room
    document, nth = _numbers(counts)
    start = begin[document] + nth * room
    first = np.minimum(end[document] - start, room)
    return Sequences(start, first, np.zeros_like(first))


def cut_pairs(encoded: Encoded, seq_len: int, seed: int) -> Sequences:
    """Cut into two segments a sequence, a function of the documents, seq_len and seed."""
    begin, end = (bound.numpy() for bound in encoded.bounds())
    length, single, longer = _draws(seq_len, seed, int((end - begin + seq_len).sum()))
    # Sequence i wants its tokens from whatever document; `behind[i]` is what those before it want.
    behind = np.concatenate([[0], (length - 3 + single).cumsum()])
    bounds, places = [0], memoryview(behind)
    for tokens in (end - begin).tolist():
        i = bounds[-1]
        bounds.append(bisect_left(places, places[i] + tokens, lo=i))
    document, nth = _numbers(np.diff(bounds))
    i = np.arange(len(document))
    start = begin[document] + behind[i] - behind[i - nth]
    stop = np.minimum(start + behind[i + 1] - behind[i], end[document])

    lines = (encoded.offsets if encoded.lines is None else encoded.lines).numpy()
    aim = start + (length[i] - 3) // 2
    line = np.searchsorted(lines, aim)
    below, above = lines[line - 1], lines.take(line, mode="clip")
    border = np.where(longer[i] | (below <= start), above, below)
    border = np.where(single[i], stop, np.minimum(border, stop))
    return Sequences(start, border - start, stop - border)


def _numbers(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return for each sequence the number of its document, and its own number in that."""
    document = np.repeat(np.arange(len(counts)), counts)
    return document, np.arange(len(document)) - (counts.cumsum() - counts)[document]


def _draws(seq_len: int, seed: int, tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return length, whether it is single, whether A is longer; of so many as take `tokens` and more."""
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
