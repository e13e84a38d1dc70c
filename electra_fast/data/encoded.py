"""Token ids of a corpus, end to end, and which documents and lines they belong to."""

import itertools
from array import array
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from electra_fast.data.unknown import Counting, Unknown

CHUNK = 1 << 20  # characters handed to the tokenizer at once: its own objects take 100 bytes for each
LONGEST = 1 << 20  # of them in one text
PIECE, LINE, DOCUMENT = range(3)  # what a text ends: nothing, a line, or a document too


class Encoded(NamedTuple):
    """Documents end to end, no special ids: document d is ``ids[offsets[d]:offsets[d + 1]]``."""

    ids: Tensor  # [T] int32 or uint16
    offsets: Tensor  # [documents + 1] int64
    lines: Tensor | None = None  # [lines + 1] int64, a refinement of offsets; None: a line a document
    subset: Tensor | None = None  # the numbers of the documents that are meant; None: all
    text: str | None = None  # SHA-256 of the documents, where the ids come from a file
    unknown: Unknown | None = None  # how much of the text became [UNK]

    def bounds(self) -> tuple[Tensor, Tensor]:
        """Return where each of the documents begins and where it ends."""
        meant = slice(None) if self.subset is None else self.subset
        return self.offsets[:-1][meant], self.offsets[1:][meant]

    @property
    def num_tokens(self) -> int:
        begin, end = self.bounds()
        return int((end - begin).sum())

    def first_tokens(self, limit: int = 10_000_000) -> Tensor:
        """Return the ids of as many documents as have `limit` tokens, int64 ``[T]``."""
        begin, end = self.bounds()
        some = int(torch.searchsorted((end - begin).cumsum(0), limit)) + 1
        return torch.cat([self.ids[a:b].long() for a, b in zip(begin[:some], end[:some], strict=True)])


def encode(documents: Iterable[str], tokenizer) -> Encoded:
    """Turn documents into token ids, every one whole, in memory."""
    ids, unknown = array("i"), Counting(tokenizer)
    offsets, lines = encode_into(ids.extend, documents, tokenizer, unknown)
    ids = torch.tensor(ids, dtype=torch.int32, device="cpu")
    return Encoded(ids, _int64(offsets), _int64(lines), unknown=unknown.result())


def _int64(numbers: array) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64, device="cpu")


def encode_into(
    take: Callable[[array], None], documents: Iterable[str], tokenizer, unknown: Counting
) -> tuple[array, array]:
    """Hand all ids to `take`, some at a time; return the offsets of the documents and of the lines.

    A line is tokenized by itself; its end separates words anyway, so the ids are those of whole documents.
    """
    offsets, lines, tokens = array("q", [0]), array("q", [0]), 0
    for pieces in _chunks(documents):
        texts = [text for text, _ in pieces]
        ids, unknowns = array("i"), []
        encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        for (_, end), encoding in zip(pieces, encodings, strict=True):
            found = encoding.ids
            ids.extend(found)
            unknowns.append(found.count(unknown.id))
            tokens += len(found)
            if end >= LINE:
                lines.append(tokens)
            if end == DOCUMENT:
                offsets.append(tokens)
        unknown.add(texts, unknowns, len(ids))
        take(ids)
    return offsets, lines


def _chunks(documents: Iterable[str]) -> Iterator[list[tuple[str, int]]]:
    """Yield lists of texts of CHUNK characters together, each with what it ends."""
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
    """Yield a line in pieces of at most LONGEST characters, and whether it ends there.

    They end before a space, where words end anyway; a longer word is cut, of which WordPiece knows nothing.
    """
    begin = 0
    while len(line) - begin > LONGEST:
        end = line.rfind(" ", begin + 1, begin + LONGEST)
        end = begin + LONGEST if end < 0 else end
        yield line[begin:end], False
        begin = end
    yield line[begin:] if begin else line, True


def held_out(encoded: Encoded, every: int = 50) -> tuple[Encoded, Encoded]:
    """Split by document, without a copy: each ``every``-th is held out, the others are trained on."""
    documents = _range(len(encoded.offsets) - 1) if encoded.subset is None else encoded.subset
    if not 2 <= every <= len(documents):
        rule = f"2 to {len(documents)}, the number of documents"
        raise ValueError(f"held_out: every must be {rule}, got {every}")
    held = _range(len(documents)) % every == every - 1
    return encoded._replace(subset=documents[~held]), encoded._replace(subset=documents[held])


def _range(n: int) -> Tensor:
    return torch.arange(n, device="cpu")  # whatever torch.set_default_device says
