"""The decoded lines of a text file, in bounded memory per line."""

from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from electra_fast.data.streams import Leaf, leaves

LIMIT = 64 << 20  # bytes per line or record: a small packed file may unpack to a line of gigabytes


def too_long() -> str:
    return f"longer than {LIMIT >> 20} MB, the limit of a line or record"


def lines(leaf: Leaf) -> Iterator[str]:
    """Yield the lines of UTF-8 text; they end with LF, CRLF or CR.

    Raises:
        ValueError: a line is not UTF-8, has a NUL, or is longer than LIMIT; the message names the file and
            the byte, counted in the unpacked text.
    """
    offset = 0  # of the line, in bytes
    for line in iter(partial(leaf.buffered().readline, LIMIT + 1), b""):  # each up to an LF
        if len(line) > LIMIT:
            raise ValueError(f"{leaf.name}: the line at byte {offset} is {too_long()}")
        text = _decode(leaf.name, line, offset)
        if "\r" in text:
            text = text.replace("\r\n", "\n").replace("\r", "\n")
        if not offset:
            text = text.removeprefix("\ufeff")
        yield from text.removesuffix("\n").split("\n")
        offset += len(line)


def lines_of(path: Path) -> Iterator[str]:
    """Yield the lines of one file, which may be compressed."""
    for leaf in leaves(path, Counter()):
        yield from lines(leaf)


def _decode(name: str, line: bytes, offset: int) -> str:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        bad = f"byte {offset + error.start} (0x{line[error.start]:02x})"
        remedy = "convert it; if it is Latin-1: iconv -f ISO-8859-1 -t UTF-8"
        raise ValueError(f"{name} is not UTF-8 at {bad}; {remedy}") from None
    if "\0" in text:
        raise ValueError(f"{name} has a NUL at byte {offset + line.index(0)}; is it a binary or UTF-16 file?")
    return text
