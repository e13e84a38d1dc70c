"""Files as unpacked streams of bytes; archives may contain archives, and every error names the file."""

import gzip
import io
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from electra_fast.data.kinds import HEAD, UNPACKED_NAME, packing
from electra_fast.local import regular_file

DEPTH = 4  # layers of packing: OpenWebText is a tar of xz files of tar files
TAR_HEADER = 1 << 20  # bytes per member for its headers, which tarfile reads into memory
XZ_MEMORY = 512 << 20  # bytes; `xz -9` needs 65 MB
# Files that Hugging Face's datasets writes in addition to the data.
DESCRIPTIONS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
ENDINGS = ("txt", "jsonl", "ndjson", "json", "csv", "tsv", "parquet", "arrow", "tar", "tgz", "txz", "tbz2")


class Leaf(io.RawIOBase):
    """The stream of an unpacked file; `head` has its first bytes, which can be examined before they are read.

    Errors of the decompression are raised as a ValueError with the name of the file.
    """

    def __init__(self, name: str, source: BinaryIO, path: Path | None = None):
        self.name = name
        self.path = path  # None for a file that was packed
        self._source = source
        self._offset = 0  # bytes read from the source
        self.head = b""
        while len(self.head) < HEAD and (data := self._read_source(HEAD - len(self.head))):
            self.head += data
        self._rest_of_head = self.head

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        if self._rest_of_head:
            data = self._rest_of_head[: len(buffer)]
            self._rest_of_head = self._rest_of_head[len(buffer) :]
        else:
            data = self._read_source(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def buffered(self) -> io.BufferedReader:
        return io.BufferedReader(self, 1 << 18)

    def _read_source(self, size: int) -> bytes:
        try:
            data = self._source.read(size)
        except (EOFError, OSError, zlib.error, tarfile.TarError, *_lzma_errors()) as error:
            if isinstance(error, OSError) and error.errno is not None:  # of the disk, not of the format
                raise OSError(error.errno, error.strerror, self.name) from error
            raise ValueError(f"{self.name}: damaged after byte {self._offset}: {error}") from error
        self._offset += len(data)
        return data


def leaves(path: Path, skipped: Counter) -> Iterator[Leaf]:
    """Yield the unpacked contents of a file: one stream, or for a tar one per member, in order.

    Read each stream before you ask for the next. Members of a tar that are not `wanted` are counted in
    ``skipped`` by their endings.

    Raises:
        ValueError: the file is not regular, is damaged, or is packed more than DEPTH times.
    """
    with open(regular_file(path), "rb") as file:
        yield from _unpacked(Leaf(str(path), file, path), 0, skipped)


def wanted(name: str) -> bool:
    """Return whether a file in a folder or a tar is read; its name without ``.gz`` and the like decides."""
    path = PurePosixPath(name)
    unpacked = PurePosixPath(UNPACKED_NAME.sub("", path.name))
    ending = unpacked.suffix.lower()
    known = ending[1:] in ENDINGS if ending else unpacked.name != path.name
    return known and not path.name.startswith(".") and path.name not in DESCRIPTIONS


def _unpacked(leaf: Leaf, depth: int, skipped: Counter) -> Iterator[Leaf]:
    how = packing(leaf.head)
    if how is None:
        yield leaf
    elif depth == DEPTH:
        raise ValueError(f"{leaf.name}: packed more than {DEPTH} times")
    elif how == "tar":
        for inner in _members(leaf, skipped):
            yield from _unpacked(inner, depth + 1, skipped)
    else:
        with _decompressed(leaf, how) as source:
            yield from _unpacked(Leaf(leaf.name, source), depth + 1, skipped)


def _decompressed(leaf: Leaf, how: str) -> BinaryIO:
    if how == "gz":
        return gzip.GzipFile(fileobj=leaf.buffered())
    if how == "zst":
        # The streams of the package zstandard end without an error if the file is truncated.
        return pyarrow(leaf.name).CompressedInputStream(leaf.buffered(), "zstd")
    try:
        if how == "bz2":
            import bz2

            return bz2.BZ2File(leaf.buffered())
        import lzma
    except ImportError:
        raise ImportError(f"{leaf.name}: this Python was built without {how}; unpack the file") from None
    try:
        lzma.LZMADecompressor(memlimit=XZ_MEMORY).decompress(leaf.head, max_length=1)
    except lzma.LZMAError as error:
        if "limit" in str(error).lower():
            raise ValueError(f"{leaf.name}: unpacking it needs more than {XZ_MEMORY >> 20} MB") from None
    return lzma.LZMAFile(leaf.buffered())


def _members(leaf: Leaf, skipped: Counter) -> Iterator[Leaf]:
    budget = _Budget(leaf)
    try:
        tar = tarfile.open(fileobj=budget, mode="r|", tarinfo=_Member)
        while (member := _next(tar, budget)) is not None:
            if not member.isreg():
                continue
            if member.issparse() or not wanted(member.name):
                skipped[PurePosixPath(member.name).suffix] += 1
                continue
            yield Leaf(f"{leaf.name}/{member.name}", tar.extractfile(member))
    except tarfile.TarError as error:
        raise ValueError(f"{leaf.name}: damaged: {error}") from error


def _next(tar: tarfile.TarFile, budget: "_Budget") -> tarfile.TarInfo | None:
    if tar.firstmember is None:  # otherwise tarfile has already read the header of the next member
        budget.left = None
        tar.fileobj.seek(tar.offset)  # skips the unread rest of the last member
    tar.members.clear()  # tarfile would keep the header of every member, and there may be millions.
    budget.left = TAR_HEADER
    member = tar.next()
    budget.left = None
    return member


class _Member(tarfile.TarInfo):
    """A header that raises an error if it is damaged; tarfile would treat it as the end of the file."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> tarfile.TarInfo:
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error} at byte {tar.offset}") from error


class _Budget:
    """A stream that raises an error after `left` bytes, if that is set."""

    def __init__(self, leaf: Leaf):
        self.name, self._stream = leaf.name, leaf.buffered()
        self.left: int | None = TAR_HEADER

    def read(self, size: int) -> bytes:
        data = self._stream.read(size)
        if self.left is not None:
            self.left -= len(data)
            if self.left < 0:
                raise ValueError(f"{self.name}: a member's headers have more than {TAR_HEADER} bytes")
        return data


def _lzma_errors() -> tuple[type[Exception], ...]:
    try:
        from lzma import LZMAError
    except ImportError:
        return ()
    return (LZMAError,)


def pyarrow(name: str):
    try:
        import pyarrow
    except ImportError:
        raise ImportError(f"{name}: reading it needs a package: pip install electra_fast[text]") from None
    return pyarrow
