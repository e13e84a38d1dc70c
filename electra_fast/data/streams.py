"""Files as streams of bytes: unpacked, however often they are packed, and every error names the file."""

import gzip
import io
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from electra_fast.data.files import regular
from electra_fast.data.kinds import HEAD, UNPACKED_NAME, packed

DEPTH = 4  # layers of packing: OpenWebText has a tar of xz of tar
TAR_HEADER = 1 << 20  # bytes of a member's headers, which tarfile reads into memory
XZ_MEMORY = 512 << 20  # bytes; `xz -9` needs 65 MB
# What Hugging Face's datasets writes beside the data.
DESCRIPTIONS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
READ = ("txt", "jsonl", "ndjson", "json", "csv", "tsv", "parquet", "arrow", "tar", "tgz", "txz", "tbz2")


class Leaf(io.RawIOBase):
    """A stream of which `head`, the first bytes, can be looked at before they are read.

    What goes wrong in the decompression below it is raised as a ValueError with the name.
    """

    def __init__(self, name: str, source: BinaryIO, path: Path | None = None):
        self.name, self.path = name, path  # the path of a file that is not packed
        self._source, self._taken = source, 0
        self.head = self._rest = b""
        while len(self.head) < HEAD and (data := self._take(HEAD - len(self.head))):
            self.head += data
        self._rest = self.head

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        if self._rest:
            data, self._rest = self._rest[: len(buffer)], self._rest[len(buffer) :]
        else:
            data = self._take(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def buffered(self) -> io.BufferedReader:
        return io.BufferedReader(self, 1 << 18)

    def _take(self, size: int) -> bytes:
        try:
            data = self._source.read(size)
        except (EOFError, OSError, zlib.error, tarfile.TarError, *_lzma_errors()) as error:
            if isinstance(error, OSError) and error.errno is not None:  # of the disk, not of the format
                raise OSError(error.errno, error.strerror, self.name) from error
            raise ValueError(f"{self.name}: damaged after byte {self._taken}: {error}") from error
        self._taken += len(data)
        return data


def leaves(path: Path, passed_over: Counter) -> Iterator[Leaf]:
    """Yield what a file holds once it is unpacked: itself, or the files of a tar in their order.

    Each is to be read before the next is asked for. Members of a tar that are not `wanted` are counted in
    ``passed_over`` by their endings.

    Raises:
        ValueError: it is no regular file, is damaged, or is packed more than DEPTH times.
    """
    with open(regular(path), "rb") as file:
        yield from _unpacked(Leaf(str(path), file, path), 0, passed_over)


def wanted(name: str) -> bool:
    """Return whether a file in a folder or a tar is read, by its name without ``.gz`` and the like."""
    path = PurePosixPath(name)
    unpacked = PurePosixPath(UNPACKED_NAME.sub("", path.name))
    ending = unpacked.suffix.lower()
    known = ending[1:] in READ if ending else unpacked.name != path.name
    return known and not path.name.startswith(".") and path.name not in DESCRIPTIONS


def _unpacked(leaf: Leaf, depth: int, passed_over: Counter) -> Iterator[Leaf]:
    how = packed(leaf.head)
    if how is None:
        yield leaf
    elif depth == DEPTH:
        raise ValueError(f"{leaf.name}: packed more than {DEPTH} times")
    elif how == "tar":
        for inner in _members(leaf, passed_over):
            yield from _unpacked(inner, depth + 1, passed_over)
    else:
        with _decompressed(leaf, how) as source:
            yield from _unpacked(Leaf(leaf.name, source), depth + 1, passed_over)


def _decompressed(leaf: Leaf, how: str) -> BinaryIO:
    if how == "gz":
        return gzip.GzipFile(fileobj=leaf.buffered())
    if how == "zst":
        # Not the package zstandard, whose streams end without an error where the file is cut off.
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
            raise ValueError(f"{leaf.name}: unpacking it takes more than {XZ_MEMORY >> 20} MB") from None
    return lzma.LZMAFile(leaf.buffered())


def _members(leaf: Leaf, passed_over: Counter) -> Iterator[Leaf]:
    budget = _Budget(leaf)
    try:
        tar = tarfile.open(fileobj=budget, mode="r|", tarinfo=_Member)
        while (member := _next(tar, budget)) is not None:
            if not member.isreg():
                continue
            if member.issparse() or not wanted(member.name):
                passed_over[PurePosixPath(member.name).suffix] += 1
                continue
            yield Leaf(f"{leaf.name}/{member.name}", tar.extractfile(member))
    except tarfile.TarError as error:
        raise ValueError(f"{leaf.name}: damaged: {error}") from error


def _next(tar: tarfile.TarFile, budget: "_Budget") -> tarfile.TarInfo | None:
    if tar.firstmember is None:  # else it is the next one
        budget.left = None
        tar.fileobj.seek(tar.offset)  # over what was not read of the last member
    tar.members.clear()  # a tar of millions of files would keep the header of each
    budget.left = TAR_HEADER
    member = tar.next()
    budget.left = None
    return member


class _Member(tarfile.TarInfo):
    """A header; one that is damaged raises, where tarfile takes it for the end."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> tarfile.TarInfo:
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error} at byte {tar.offset}") from error


class _Budget:
    """A stream that refuses to give more than `left` bytes, if that is set."""

    def __init__(self, leaf: Leaf):
        self.name, self._stream, self.left = leaf.name, leaf.buffered(), TAR_HEADER

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
        raise ImportError(f"{name}: reading it takes a package: pip install electra_fast[text]") from None
    return pyarrow
