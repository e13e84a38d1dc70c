"""Documents, one after the other, out of files that may be larger than memory.

BERT's format: UTF-8, a paragraph a line, a blank line between two documents.
"""

import ast
import gzip
import itertools
import os
import sys
import sysconfig
import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from electra_fast.data.files import cached

ENDINGS = (".txt", ".txt.gz", ".txt.xz")


@dataclass(frozen=True)
class Documents:
    """Yields a string a document, the same ones whenever it is iterated, reading line by line."""

    files: tuple[Path, ...] | None  # None: Python's manual

    def __iter__(self) -> Iterator[str]:
        if self.files is None:
            # Read in 4 seconds. The version says when it was built, so any other build is read anew.
            manual = cached(f"manual 1 {sys.version} {sys.base_prefix}", _python_manual)
            yield from _split(manual.split("\n"))
            return
        for file in self.files:
            empty = True
            for document in _split(lines(file)):
                empty = False
                yield document
            if empty:
                raise ValueError(f"{file}: no document, only blank lines or none at all")


def documents(path: str | os.PathLike | Sequence[str | os.PathLike] | None = None) -> Documents:
    """Return a corpus; a document has one paragraph a line and no blank line.

    ``path`` is a UTF-8 file, which may be compressed (``.gz``, ``.xz``), a folder, whose ``.txt``,
    ``.txt.gz`` and ``.txt.xz`` files are read in order of name, or a list of such; a blank line ends a
    document, the end of a file too. ``None`` takes Python's own manual: the topics of ``help()`` and the
    standard library's docstrings, 2 MB that vary a little with the version.

    Raises:
        FileNotFoundError: at once.
        ValueError: at once where a folder holds no text, and while reading where a file is not text, or holds
            none; the message names it and the byte's offset, in what it unpacks to if it is compressed.
    """
    if path is None:
        return Documents(None)
    paths = [path] if isinstance(path, str | os.PathLike) else path
    files = tuple(file for path in paths for file in _files(Path(path)))
    if not files:
        raise ValueError("documents: path must name a file or a folder, got an empty list")
    return Documents(files)


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        path.stat()  # raises where it is missing
        return [path]
    files = sorted(file for file in path.rglob("*.txt*") if file.name.endswith(ENDINGS) and file.is_file())
    if not files:
        raise ValueError(f"{path}: no .txt file in this folder")
    return files


def _split(lines: Iterable[str]) -> Iterator[str]:
    """Yield the documents that blank lines separate."""
    document = []
    for line in itertools.chain(lines, [""]):
        if line.strip():
            document.append(line)
        elif document:
            yield "\n".join(document).strip()
            document = []


def lines(file: Path) -> Iterator[str]:
    """Yield a text file's lines, whichever of LF, CRLF and CR ends them."""
    stream, damages = _open(file)
    offset = 0  # of the line, in bytes
    with stream:
        try:
            for line in stream:  # up to each LF
                text = _decode(file, line, offset).replace("\r\n", "\n").replace("\r", "\n")
                if not offset:
                    text = text.removeprefix("\ufeff")
                yield from text.removesuffix("\n").split("\n")
                offset += len(line)
        except damages as error:
            raise ValueError(f"{file}: damaged after byte {offset} of its text: {error}") from error


def _open(file: Path):
    """Return the file's bytes as a stream, and the errors by which that says that it is damaged."""
    if file.suffix == ".gz":
        return gzip.open(file), (EOFError, gzip.BadGzipFile, zlib.error)
    if file.suffix == ".xz":
        import lzma  # not above: some Pythons are built without it

        return lzma.open(file), (EOFError, lzma.LZMAError)
    return open(file, "rb"), ()


def _decode(file: Path, line: bytes, offset: int) -> str:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        bad = f"byte {offset + error.start} (0x{line[error.start]:02x})"
        raise ValueError(f"{file}: not UTF-8 at {bad}") from None
    if "\0" in text:
        raise ValueError(f"{file}: NUL at byte {offset + line.index(0)}; is it a binary or UTF-16 file?")
    return text


def _python_manual() -> str:
    from pydoc_data.topics import topics

    texts = [topics[name] for name in sorted(topics)]
    for folder, subfolders, names in os.walk(sysconfig.get_paths()["stdlib"]):
        # Tests are code more than prose, partly malformed on purpose, and not installed everywhere.
        skip = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
        subfolders[:] = sorted(set(subfolders) - skip)
        for name in sorted(names):
            if name.endswith(".py"):
                texts.append("\n\n".join(_docstrings(Path(folder, name).read_bytes())))
    # Hard-wrapped paragraphs become one line each.
    documents = ("\n".join(" ".join(p.split()) for p in _split(text.split("\n"))) for text in texts)
    return "\n\n".join(document for document in documents if document)


def _docstrings(source: bytes) -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's, about other people's code
        try:
            nodes = [ast.parse(source)]
        except (SyntaxError, ValueError):  # some distributions leave files of an older Python there
            return
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node, clean=False) or ""
        # Expressions are most of the tree and hold no definition.
        nodes += [n for n in ast.iter_child_nodes(node) if isinstance(n, ast.stmt)][::-1]
