"""The token ids of a corpus, with the offsets of its documents and lines."""

import itertools
from array import array
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from electra_fast.data.parts import Parts
from electra_fast.data.unknown import Unknown, UnknownCounter
from electra_fast.data.words import WordEncoder
from electra_fast.errors import must

CHUNK = 1 << 20  # characters per call of the tokenizer, whose objects need 100 bytes per character
LONGEST = 1 << 20  # characters per text in such a call
PIECE, LINE, DOCUMENT = range(3)  # what ends with a text: no line, a line, or a document


class Encoded(NamedTuple):
    """Documents end to end, without special ids: document d is ``ids[offsets[d]:offsets[d + 1]]``."""

    ids: Tensor | Parts  # [T] int32 or uint16
    offsets: Tensor  # [documents + 1] int64
    lines: Tensor | None = None  # [lines + 1] int64, a refinement of offsets; None: one line per document
    subset: Tensor | None = None  # the numbers of the selected documents; None: all
    text: str | None = None  # SHA-256 of the documents, if the ids come from a file
    vocab: str | None = None  # `vocab_hash` of their tokenizer, if the ids come from a file
    unknown: Unknown | None = None  # how much of the text became [UNK]

    def bounds(self) -> tuple[Tensor, Tensor]:
        """Return the offsets at which each selected document begins and ends."""
        selected = slice(None) if self.subset is None else self.subset
        return self.offsets[:-1][selected], self.offsets[1:][selected]

    @property
    def num_tokens(self) -> int:
        begin, end = self.bounds()
        return int((end - begin).sum())

    @property
    def parts(self) -> Parts:
        """The ids in one form."""
        return self.ids if isinstance(self.ids, Parts) else Parts([self.ids.numpy()])

    def first_tokens(self, limit: int = 10_000_000) -> Tensor:
        """Return the ids of the first documents that together have `limit` tokens or more, int64 ``[T]``."""
        begin, end = (bound.numpy() for bound in self.bounds())
        count = int(np.searchsorted((end - begin).cumsum(), limit)) + 1
        return torch.from_numpy(self.parts.take_runs(begin[:count], (end - begin)[:count]))


def encode(documents: Iterable[str], tokenizer) -> Encoded:
    """Return the token ids of complete documents, in memory."""
    ids, unknown = array("i"), UnknownCounter(tokenizer)
    offsets, lines = encode_into(
        lambda found: ids.frombytes(found.tobytes()), documents, WordEncoder(tokenizer), unknown
    )
    ids = torch.tensor(ids, dtype=torch.int32, device="cpu")
    return Encoded(ids, _int64(offsets), _int64(lines), unknown=unknown.result())


def _int64(numbers: array) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64, device="cpu")


def encode_into(
    write: Callable[[np.ndarray], None],
    documents: Iterable[str],
    encoder: WordEncoder,
    unknown: UnknownCounter,
) -> tuple[array, array]:
    """Pass all ids to `write` in chunks, int32; return the offsets of the documents and of the lines.

    Each line is tokenized by itself. The end of a line separates words, so the ids are the same as those of
    the whole document.
    """
    offsets, lines, tokens = array("q", [0]), array("q", [0]), 0
    for pieces in _chunks(documents):
        texts = [text for text, _ in pieces]
        ends = np.array([end for _, end in pieces])
        ids, counts, unknowns = encoder.encode(texts)
        after = tokens + counts.cumsum()
        lines.frombytes(after[ends >= LINE].tobytes())
        offsets.frombytes(after[ends == DOCUMENT].tobytes())
        tokens += len(ids)
        unknown.add(texts, unknowns.tolist(), len(ids))
        write(ids)
    return offsets, lines


def _chunks(documents: Iterable[str]) -> Iterator[list[tuple[str, int]]]:
    """Yield lists of texts with CHUNK characters in total; each text comes with PIECE, LINE or DOCUMENT."""
    chunk, characters = [], 0
    for document in documents:
        *inner, last = document.split("\n")
        for line, end in itertools.chain(zip(inner, itertools.repeat(LINE)), [(last, DOCUMENT)]):
            for piece, ends_line in _pieces(line):
                chunk.append((piece, end if ends_line else PIECE))
                characters += len(piece)
                if characters >= CHUNK:
                    yield chunk
                    chunk, characters = [], 0
    yield chunk


def _pieces(line: str) -> Iterator[tuple[str, bool]]:
    """Yield a line in pieces of at most LONGEST characters, and whether the piece ends the line.

    A piece ends before a space, which separates words anyway. Only a word longer than that is cut; WordPiece
    makes [UNK] of it in any case.
    """
    begin = 0
    while len(line) - begin > LONGEST:
        end = line.rfind(" ", begin + 1, begin + LONGEST)
        end = begin + LONGEST if end < 0 else end
        yield line[begin:end], False
        begin = end
    yield line[begin:] if begin else line, True


def held_out(encoded: Encoded, every: int = 50) -> tuple[Encoded, Encoded]:
    """Return (training, held-out): every ``every``-th document is held out. Nothing is copied."""
    documents = _range(len(encoded.offsets) - 1) if encoded.subset is None else encoded.subset
    if not 2 <= every <= len(documents):
        rule = f"be 2 to {len(documents)}, the number of documents"
        raise ValueError(must("held_out: every", rule, every))
    held = _range(len(documents)) % every == every - 1
    return encoded._replace(subset=documents[~held]), encoded._replace(subset=documents[held])


def _range(n: int) -> Tensor:
    return torch.arange(n, device="cpu")  # independent of torch.set_default_device
