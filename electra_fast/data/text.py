"""Documents, one at a time, from files that may be larger than memory.

Plain text has BERT's format: UTF-8, one paragraph per line, a blank line between two documents. A table of
records (JSON, CSV, Parquet, Arrow) has one document per record.
"""

import itertools
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from electra_fast.data import records
from electra_fast.data.cache_folder import remembered, text_hash
from electra_fast.data.kinds import UNPACKED_NAME, kind
from electra_fast.data.lines import lines
from electra_fast.data.manual import python_manual
from electra_fast.data.streams import Leaf, leaves, wanted
from electra_fast.errors import must
from electra_fast.local import existing, json_object, regular_file

DOCUMENT = 256 << 20  # bytes per document in plain text, whose lines are in memory together
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
    """Yields one string per document; each iteration reads the files again, record by record."""

    files: tuple[Path, ...] | None  # None: Python's manual
    text_column: str | None = None
    blanks_separate: bool = True
    skipped: Counter = field(default_factory=Counter, compare=False)  # files by ending, splits by name
    skipped_while_reading: Counter = field(default_factory=Counter, compare=False)  # in tars, and tables
    may_lack_text: frozenset[Path] = frozenset()  # tables next to files of text, such as an index of these

    def __iter__(self) -> Iterator[str]:
        if self.files is None:
            yield from _split("Python's manual", python_manual().split("\n"))
            return
        self.skipped_while_reading.clear()
        for file in self.files:
            empty = True
            try:
                for leaf in leaves(file, self.skipped_while_reading):
                    for document in _documents(leaf, self.text_column, self.blanks_separate):
                        empty = False
                        yield document
            except records.NoTextColumn:
                if file not in self.may_lack_text:
                    raise
                self.skipped_while_reading["table without one column of text"] += 1
                continue
            if empty:
                raise ValueError(must(str(file), "contain a document", "no text or only blank lines"))

    @property
    def note(self) -> str | None:
        """The skipped files in one line, or None; complete after the documents were read."""
        counts = self.skipped + self.skipped_while_reading
        if not counts:
            return None
        found = ", ".join(
            f"{n} {ending or 'without an ending'}{'s' * (n > 1 and ending == 'linked folder')}"
            for ending, n in counts.most_common(10)
        )
        remedy = "it, name its own path" if counts.total() == 1 else "them, name their own paths"
        return f"skipped: {found} (to read {remedy})"


def corpus_hash(documents: Iterable[str], again: bool = False) -> tuple[str, int]:
    """Return `text_hash`; that of files is `remembered`, unless ``again`` is true."""
    if not isinstance(documents, Documents) or documents.files is None:
        return text_hash(documents)

    def read() -> str:
        return json.dumps([*text_hash(documents), documents.skipped_while_reading])

    how = f"text 1 {documents.text_column!r} {documents.blanks_separate}"
    text, characters, skipped = json.loads(remembered(how, documents.files, read, again))
    documents.skipped_while_reading.clear()
    documents.skipped_while_reading.update(skipped)
    return text, characters


def documents(
    path: str | os.PathLike | Sequence[str | os.PathLike] | None = None,
    *,
    text_column: str | None = None,
    blanks_separate: bool = True,
) -> Documents:
    """Return a corpus; a document has one paragraph per line and no blank line.

    ``path`` is a file, a folder, or a list of both; None is Python's own manual: the topics of ``help()`` and
    the standard library's docstrings, 2 MB that vary a little with the version.

    The first bytes of a file decide its format: plain text in UTF-8, in which a document ends at a blank line
    and at the end of the file (only there if ``blanks_separate`` is false, as ELECTRA read OpenWebText);
    JSON, one object per line or one array; CSV and TSV with a header; Parquet; Arrow. Each may be packed as
    gz, xz, bz2, zst or tar, several times. Each record of a table is a document; its text is in
    ``text_column`` (None: in ``text``, or in the only column of strings).

    In a folder the files with the endings of these formats are read in order of name; the others are counted
    (`Documents.note`), and so are tables without one column of strings if the folder has files of text too. A
    folder of Hugging Face's ``save_to_disk`` is read as its description says, and of a DatasetDict the split
    ``train``.

    Raises:
        FileNotFoundError: at once if a path does not exist.
        ImportError: while reading Parquet, Arrow or zst without pyarrow: ``pip install electra_fast[text]``.
        ValueError: at once if a folder has no text or a path is not a regular file. While reading if a file
            has another format, is damaged, contains no document, or has a line or record of over 64 MB or a
            document of over 256 MB; the message names the file, and the byte, line or record.
    """
    if path is None:
        return Documents(None)
    paths = [path] if isinstance(path, str | os.PathLike) else path
    if not paths or "" in paths:
        got = "''" if paths else "an empty list"
        raise ValueError(must("documents: path", "name a file or a folder", got))
    skipped = Counter()
    of_path = [_files(Path(path), skipped) for path in paths]
    files = tuple(file for found in of_path for file in found)
    may_lack_text = frozenset().union(*map(_tables_next_to_text, of_path)) - set(map(Path, paths))
    return Documents(files, text_column, blanks_separate, skipped, may_lack_text=may_lack_text)


def _tables_next_to_text(files: list[Path]) -> frozenset[Path]:
    """Return the tables among the files of a folder if it contains plain text too."""
    is_text = {file: UNPACKED_NAME.sub("", file.name).lower().endswith(".txt") for file in files}
    return frozenset(file for file in files if any(is_text.values()) and not is_text[file])


def _files(path: Path, skipped: Counter) -> list[Path]:
    if not existing("documents: path", path, hub=False).is_dir():
        return [regular_file(path)]
    if (path / "dataset_dict.json").exists():
        splits = _listed(path / "dataset_dict.json", "splits")
        if len(splits) > 1 and "train" not in splits:
            got, remedy = ", ".join(splits), "name the folder of a split"
            raise ValueError(must(str(path), "have a split train", got, remedy))
        used = "train" if "train" in splits else splits[0]
        skipped.update(f"split {split}" for split in splits if split != used)
        path /= used
    if (path / "state.json").exists():
        return [regular_file(path / name) for name in _listed(path / "state.json", "_data_files")]
    found = sorted(path.rglob("*"))
    skipped["linked folder"] += sum(file.is_symlink() and file.is_dir() for file in found)
    found = [file for file in found if not file.is_dir()]
    files = [file for file in found if wanted(file.name)]
    if not files:
        others = f"only {len(found)} other{'s' * (len(found) > 1)}"
        got, remedy = (others, "name them by their own paths") if found else ("an empty folder", "")
        raise ValueError(must(str(path), "contain a file of text", got, remedy))
    skipped.update(file.suffix for file in found if not wanted(file.name))
    return [regular_file(file) for file in files]


def _listed(file: Path, key: str) -> list[str]:
    """Return the names under a key of a description that Hugging Face's datasets wrote."""
    try:
        found = json_object("documents", file)[key]
        names = [entry["filename"] if key == "_data_files" else entry for entry in found]
        if names and all(Path(name).name == name for name in names):  # only files of this folder
            return names
    except (ValueError, LookupError, TypeError):
        pass
    raise ValueError(f"{file} must list names under {key!r}, as datasets' save_to_disk writes it")


def _documents(leaf: Leaf, text_column: str | None, blanks: bool) -> Iterator[str]:
    what = kind(leaf.name, leaf.head, text_column)
    if what == "text":
        yield from _split(leaf.name, lines(leaf), blanks)
        return
    for text in TABLES[what](leaf, text_column):
        if not text.isascii():  # JSON allows half of a surrogate pair, which cannot be encoded.
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        paragraphs = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
        yield from _split(leaf.name, paragraphs, blanks=False)


def _split(name: str, lines: Iterable[str], blanks: bool = True) -> Iterator[str]:
    """Yield the documents between blank lines or, without `blanks`, all lines as one document."""
    document, size = [], 0
    for line in itertools.chain(lines, [None]):
        if line and not line.isspace():
            document.append(line)
            size += len(line) + 56  # bytes that Python adds per string
            if size > DOCUMENT:
                remedy = "separate its documents with blank lines"
                raise ValueError(f"{name}: a document has more than {DOCUMENT >> 20} MB; {remedy}")
        elif document and (blanks or line is None):
            yield "\n".join(document).strip()
            document, size = [], 0
