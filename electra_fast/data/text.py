"""Documents, one after the other, out of files that may be larger than memory.

In plain text BERT's format: UTF-8, a paragraph per line, a blank line between two documents. In a table of
records (JSON, CSV, Parquet, Arrow) a document per record.
"""

import itertools
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from electra_fast.data import records
from electra_fast.data.files import regular
from electra_fast.data.kinds import kind
from electra_fast.data.lines import lines
from electra_fast.data.manual import python_manual
from electra_fast.data.streams import Leaf, leaves, wanted

DOCUMENT = 256 << 20  # bytes of a document in plain text, which is held in memory line by line
TABLES = {
    "json lines": records.json_lines,
    "json array": records.json_array,
    "csv": records.csv_rows,
    "tsv": records.tsv_rows,
    "parquet": records.parquet_rows,
    "arrow": records.arrow_rows,
}


@dataclass(frozen=True)
class Documents:
    """Yields a string per document, the same ones whenever it is iterated, reading record by record."""

    files: tuple[Path, ...] | None  # None: Python's manual
    text_column: str | None = None
    blanks_separate: bool = True
    passed_over: Counter = field(default_factory=Counter, compare=False)  # files by ending, splits by name
    passed_over_in_tars: Counter = field(default_factory=Counter, compare=False)  # filled while reading

    def __iter__(self) -> Iterator[str]:
        if self.files is None:
            yield from _split("Python's manual", python_manual().split("\n"))
            return
        self.passed_over_in_tars.clear()
        for file in self.files:
            empty = True
            for leaf in leaves(file, self.passed_over_in_tars):
                for document in _documents(leaf, self.text_column, self.blanks_separate):
                    empty = False
                    yield document
            if empty:
                raise ValueError(f"{file}: no document, only blank lines or none at all")

    @property
    def note(self) -> str | None:
        """What was passed over, in one line, or None; complete once the documents were read."""
        counts = self.passed_over + self.passed_over_in_tars
        if not counts:
            return None
        found = ", ".join(
            f"{n} {ending or 'without an ending'}{'s' * (n > 1 and ending == 'linked folder')}"
            for ending, n in counts.most_common(10)
        )
        named = "it is named by its own path" if counts.total() == 1 else "they are named by their own paths"
        return f"passed over: {found} (read if {named})"


def documents(
    path: str | os.PathLike | Sequence[str | os.PathLike] | None = None,
    *,
    text_column: str | None = None,
    blanks_separate: bool = True,
) -> Documents:
    """Return a corpus; a document has one paragraph per line and no blank line.

    ``path`` is a file, a folder, or a list of such. What a file holds is decided by its first bytes: plain
    text in UTF-8, in which the file's end and a blank line end a document (no blank line if
    ``blanks_separate`` is false, as ELECTRA read OpenWebText); JSON, one object per line or one array; CSV
    and TSV with a header; Parquet; Arrow. Each may be packed as gz, xz, bz2, zst or tar, several times. Of
    a table each record is a document, its text in ``text_column`` (None: in ``text``, or in the only column
    of strings).

    In a folder the files with the endings of these formats are read in order of name; the others are
    counted (`Documents.note`). A folder of Hugging Face's ``save_to_disk`` is read as it says, of a
    DatasetDict the split ``train``. ``None`` takes Python's own manual: the topics of ``help()`` and the
    standard library's docstrings, 2 MB that vary a little with the version.

    Raises:
        FileNotFoundError: at once.
        ImportError: while reading Parquet, Arrow or zst without pyarrow: ``pip install electra_fast[text]``.
        ValueError: at once if a folder holds no text or a path is no regular file. While reading if a file is
            something else, is damaged, holds no document, or has a line or record of over 64 MB or a
            document of over 256 MB; the message names the file, and the byte, line or record.
    """
    if path is None:
        return Documents(None)
    paths = [path] if isinstance(path, str | os.PathLike) else path
    if "" in paths:
        raise ValueError("documents: path must name a file or a folder, got ''")
    passed_over = Counter()
    files = tuple(file for path in paths for file in _files(Path(path), passed_over))
    if not files:
        raise ValueError("documents: path must name a file or a folder, got an empty list")
    return Documents(files, text_column, blanks_separate, passed_over)


def _files(path: Path, passed_over: Counter) -> list[Path]:
    if not path.is_dir():
        return [regular(path)]
    if (path / "dataset_dict.json").exists():
        splits = _listed(path / "dataset_dict.json", "splits")
        if len(splits) > 1 and "train" not in splits:
            raise ValueError(f"{path}: must have a split train, or name one's folder: {', '.join(splits)}")
        used = "train" if "train" in splits else splits[0]
        passed_over.update(f"split {split}" for split in splits if split != used)
        path /= used
    if (path / "state.json").exists():
        return [regular(path / name) for name in _listed(path / "state.json", "_data_files")]
    found = sorted(path.rglob("*"))
    passed_over["linked folder"] += sum(file.is_symlink() and file.is_dir() for file in found)
    found = [file for file in found if not file.is_dir()]
    files = [file for file in found if wanted(file.name)]
    if not files:
        others = f"{len(found)} other{'s' * (len(found) > 1)}"
        got = f"none among its files, {others}; name them by their own paths" if found else "an empty folder"
        raise ValueError(f"{path}: must hold a file of text, got {got}")
    passed_over.update(file.suffix for file in found if not wanted(file.name))
    return [regular(file) for file in files]


def _listed(file: Path, key: str) -> list[str]:
    """Return the names under a key of what Hugging Face's datasets writes beside the data."""
    try:
        found = json.loads(regular(file).read_bytes())[key]
        names = [entry["filename"] if key == "_data_files" else entry for entry in found]
        if names and all(Path(name).name == name for name in names):  # in this folder, not in another
            return names
    except (ValueError, LookupError, TypeError, RecursionError):
        pass
    raise ValueError(f"{file}: must list names under {key!r}, as datasets' save_to_disk writes it")


def _documents(leaf: Leaf, text_column: str | None, blanks: bool) -> Iterator[str]:
    what = kind(leaf.name, leaf.head, text_column)
    if what == "text":
        yield from _split(leaf.name, lines(leaf), blanks)
        return
    for text in TABLES[what](leaf, text_column):
        if not text.isascii():  # JSON can name half of a surrogate pair, which no encoding takes
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        paragraphs = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
        yield from _split(leaf.name, paragraphs, blanks=False)


def _split(name: str, lines: Iterable[str], blanks: bool = True) -> Iterator[str]:
    """Yield the documents that blank lines separate; or, without `blanks`, all lines as one."""
    document, size = [], 0
    for line in itertools.chain(lines, [None]):
        if line and not line.isspace():
            document.append(line)
            size += len(line) + 56  # of a string in Python
            if size > DOCUMENT:
                remedy = "separate its documents with blank lines"
                raise ValueError(f"{name}: a document of more than {DOCUMENT >> 20} MB; {remedy}")
        elif document and (blanks or line is None):
            yield "\n".join(document).strip()
            document, size = [], 0
