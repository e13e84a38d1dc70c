"""Token ids of a corpus, end to end, and which documents and lines they belong to."""

from array import array
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 1 << 20  # characters handed to the tokenizer at once: its own objects take 100 bytes for each


class Encoded(NamedTuple):
    """Documents end to end, no special ids: document d is ``ids[offsets[d]:offsets[d + 1]]``."""

    ids: Tensor  # [T] int32 or uint16
    offsets: Tensor  # [documents + 1] int64
    lines: Tensor | None = None  # [lines + 1] int64, a refinement of offsets; None: a line a document
    subset: Tensor | None = None  # the numbers of the documents that are meant; None: all
    text: str | None = None  # SHA-256 of the documents, where the ids come from a file

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
    ids = array("i")
    offsets, lines = encode_into(ids.extend, documents, tokenizer)
    return Encoded(torch.tensor(ids, dtype=torch.int32), _int64(offsets), _int64(lines))


def _int64(numbers: array) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64)


def encode_into(take: Callable[[array], None], documents: Iterable[str], tokenizer) -> tuple[array, array]:
    """Hand all ids to `take`, some at a time; return the offsets of the documents and of the lines.

    A line is tokenized by itself; its end separates words anyway, so the ids are those of whole documents.
    """
    offsets, lines = array("q", [0]), array("q", [0])
    for chunk in _chunks(documents):
        ids, number = array("i"), len(lines) - 1
        texts = [line for document in chunk for line in document]
        for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False):
            ids.extend(encoding.ids)
            lines.append(lines[-1] + len(encoding))
        take(ids)
        for document in chunk:
            number += len(document)
            offsets.append(lines[number])
    return offsets, lines


def _chunks(documents: Iterable[str]) -> Iterator[list[list[str]]]:
    """Yield documents as lists of lines, so many at a time as have CHUNK characters."""
    chunk, characters = [], 0
    for document in documents:
        chunk.append(document.split("\n"))
        characters += len(document)
        if characters >= CHUNK:
            yield chunk
            chunk, characters = [], 0
    yield chunk


def held_out(encoded: Encoded, every: int = 50) -> tuple[Encoded, Encoded]:
    """Split by document, without a copy: each ``every``-th is held out, the others are trained on."""
    documents = torch.arange(len(encoded.offsets) - 1) if encoded.subset is None else encoded.subset
    if not 2 <= every <= len(documents):
        rule = f"2 to {len(documents)}, the number of documents"
        raise ValueError(f"held_out: every must be {rule}, got {every}")
    held = torch.arange(len(documents)) % every == every - 1
    return encoded._replace(subset=documents[~held]), encoded._replace(subset=documents[held])
