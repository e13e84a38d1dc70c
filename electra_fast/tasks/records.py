"""The records of a task's files: the rows of CSV, TSV and Parquet, and the objects of JSON.

The files of fine-tuning fit into memory, so each one is read at once.
"""

import csv
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from electra_fast.data.kinds import UNPACKED_NAME, kind
from electra_fast.data.lines import LIMIT, lines
from electra_fast.data.streams import Leaf, leaves, pyarrow
from electra_fast.errors import must

Item = TypeVar("Item")


class Record(NamedTuple):
    """A row of a table or an object of JSON."""

    fields: dict[str, Any]
    where: str  # "train.csv, line 12": where it begins; "x.parquet, row 3"; "x.json, record 3" of an array

    @property
    def file(self) -> str:
        return self.where.rpartition(", ")[0]


def records(
    paths: Sequence[str | Path],
    columns: Sequence[str] | None = None,
    quoted: bool | None = None,
    broken: list[str] | None = None,
) -> Iterator[Record]:
    """Yield the records of files in CSV, TSV, Parquet or JSON; each may be packed as gz, xz, bz2, zst or tar.

    The first bytes of a file decide its format, and its ending if they leave a choice. JSON is one object per
    line, one array of objects, or one object. Blank lines are skipped.

    Args:
        columns: the names of the columns of CSV and TSV; None: the first row has them.
        quoted: whether quotes enclose cells; None: they do in CSV. In GLUE's TSV quotes are text.
        broken: a list to which the places of rows with too few or too many cells are added; None: such a row
            is an error.

    Raises:
        FileNotFoundError: a file does not exist.
        ImportError: Parquet or zst without pyarrow.
        ValueError: a file has another format, is damaged, or contains no record; the message names the file
            and the line.
    """
    yield from read(paths, "a record", lambda leaf: records_of(leaf, columns, quoted, broken))


def read(paths: Iterable[str | Path], what: str, items: Callable[[Leaf], Iterator[Item]]) -> Iterator[Item]:
    """Yield what `items` finds in each file; if it finds nothing in one, the error names `what`."""
    for path in paths:
        empty = True
        for leaf in leaves(Path(path), Counter()):
            for item in items(leaf):
                empty = False
                yield item
        if empty:
            raise ValueError(must(str(path), f"contain {what}", "none"))


def records_of(
    leaf: Leaf,
    columns: Sequence[str] | None = None,
    quoted: bool | None = None,
    broken: list[str] | None = None,
) -> Iterator[Record]:
    """Yield the records of one unpacked file, as `records` does."""
    what = form(leaf)
    if what in ("csv", "tsv"):
        quoted = what == "csv" if quoted is None else quoted
        delimiter = "\t" if what == "tsv" else _delimiter(leaf, columns)
        yield from _rows(leaf, delimiter, columns, quoted, broken)
    elif what == "parquet":
        yield from _parquet(leaf)
    elif what == "json":
        yield from json_records(leaf.name, "\n".join(lines(leaf)))
    else:
        remedy = "if it is CSV or TSV, give it the ending .csv or .tsv"
        raise ValueError(must(leaf.name, "be CSV, TSV, JSON or Parquet", what, remedy))


def form(leaf: Leaf) -> str:
    """Return csv, tsv, json, parquet, arrow or text."""
    what = kind(leaf.name, leaf.head, None)
    if what in ("csv", "text") and UNPACKED_NAME.sub("", leaf.name).lower().endswith(".tsv"):
        return "tsv"  # The first row may be a text with more commas than tabs.
    return what.split()[0]


def named(found: Sequence[Record], names: Sequence[str], option: str = "") -> str:
    """Return the first of `names` that is a column of a record.

    `option` of the command line names another column.

    Raises:
        ValueError: no record has one of these columns.
    """
    name = known(found, names)
    if name is None:
        remedy = f"name it with {option}" if option else ""
        got = ", ".join(found[0].fields)
        raise ValueError(must(found[0].file, f"have a column {names[0]!r}", got, remedy))
    return name


def known(found: Sequence[Record], names: Sequence[str]) -> str | None:
    """Return the first of `names` that is a column of a record, or None."""
    columns = {column for record in found for column in record.fields}
    return next((name for name in names if name in columns), None)


def column(record: Record, name: str, option: str = "") -> Any:
    """Return a field; if there is none, raise a ValueError that names the fields and the `option`."""
    if name not in record.fields:
        remedy = f"name it with {option}" if option else ""
        raise ValueError(must(record.where, f"have a column {name!r}", ", ".join(record.fields), remedy))
    return record.fields[name]


def string(where: str, name: str, value: Any) -> str:
    """Return a value with a name if it is a string that is not blank; else raise a ValueError."""
    if not isinstance(value, str):
        raise ValueError(must(f"{where}: {name}", "be a string", _shown(value)))
    if not value.strip():
        raise ValueError(must(f"{where}: {name}", "not be empty", repr(value)))
    require_unicode(f"{where}: {name}", value)
    return value


def require_unicode(subject: str, text: str) -> None:
    """Raise a ValueError for half of a surrogate pair, which JSON and the command line allow."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise ValueError(must(subject, "be Unicode", f"{half}, half of a surrogate pair")) from None


def strings(where: str, name: str, value: Any) -> list[str]:
    """Return a value with a name if it is a list of such strings; else raise a ValueError."""
    if not isinstance(value, list):
        raise ValueError(must(f"{where}: {name}", "be a list of strings", _shown(value)))
    return [string(where, f"{name}[{i}]", each) for i, each in enumerate(value)]


def number(where: str, name: str, value: Any) -> float:
    """Return a value with a name if it is a finite number or its digits; else raise a ValueError."""
    try:
        refused = isinstance(value, bool) or "_" in str(value)  # Python reads 1_000 as a number.
        found = math.nan if refused else float(value)
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    if not math.isfinite(found):
        raise ValueError(must(f"{where}: {name}", "be a finite number", _shown(value)))
    return found


def json_records(name: str, text: str) -> Iterator[Record]:
    """Yield the objects of JSON: one array of objects, one object, or one object per line."""
    if text.lstrip().startswith("["):
        for number, found in enumerate(_json(name, text), start=1):
            yield _object(found, f"{name}, record {number}")
        return
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError):
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                yield _object(_json(name, line, number), f"{name}, line {number}")
    else:
        first = text[: len(text) - len(text.lstrip())].count("\n") + 1
        yield _object(whole, f"{name}, line {first}")


def _json(name: str, text: str, line: int = 1) -> Any:
    """Return the value of JSON that begins on a line of a file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        remedy = "write one object per line, or one array of objects"
        raise ValueError(f"{name}, line {line + error.lineno - 1}: not JSON: {error.msg}; {remedy}") from None
    except (ValueError, RecursionError) as error:  # an integer of 5000 digits, brackets in brackets
        raise ValueError(f"{name}, line {line}: not JSON: {error}") from None


def _object(found: Any, where: str) -> Record:
    if not isinstance(found, dict):
        raise ValueError(must(where, "be a JSON object", _shown(found)))
    return Record(found, where)


def _shown(value: Any) -> str:
    return repr(value)[:80]


def _delimiter(leaf: Leaf, columns: Sequence[str] | None) -> str:
    """Return the delimiter of CSV; only a header can show that it is a semicolon."""
    first = leaf.head.split(b"\n", 1)[0]
    return ";" if columns is None and first.count(b";") > first.count(b",") else ","


def _rows(
    leaf: Leaf, delimiter: str, columns: Sequence[str] | None, quoted: bool, broken: list[str] | None
) -> Iterator[Record]:
    csv.field_size_limit(max(csv.field_size_limit(), LIMIT))  # The default is 131,072.
    quoting = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    rows = csv.reader(
        (f"{line}\n" for line in lines(leaf)), delimiter=delimiter, quoting=quoting, strict=True
    )
    where = f"{leaf.name}, line 1"
    try:
        for row in rows:
            if not row:
                pass
            elif columns is None:
                columns = _header(row, where)
            elif row == list(columns) and where.endswith(", line 1"):
                raise ValueError(must(where, "be a record", "the names of --columns", "leave --columns out"))
            elif len(row) == len(columns):
                yield Record(dict(zip(columns, row, strict=True)), where)
            elif broken is None:
                raise ValueError(must(where, f"have {len(columns)} cells, one per column", len(row)))
            else:
                broken.append(where)
            where = f"{leaf.name}, line {rows.line_num + 1}"
    except csv.Error as error:
        raise ValueError(f"{where}: not CSV: {error}") from None


def _header(row: list[str], where: str) -> list[str]:
    if len(set(row)) < len(row):
        raise ValueError(must(where, "name each column once", ", ".join(row)))
    return row


def _parquet(leaf: Leaf) -> Iterator[Record]:
    pa = pyarrow(leaf.name)
    from pyarrow.parquet import ParquetFile

    row = 0
    try:
        file = ParquetFile(pa.BufferReader(leaf.buffered().read()))
        for batch in file.iter_batches(use_threads=False):
            for fields in batch.to_pylist():
                row += 1
                yield Record(fields, f"{leaf.name}, row {row}")
    except (pa.ArrowException, OSError, MemoryError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # an error of the disk, not of the format
            raise
        reason = " ".join(str(error).split())
        raise ValueError(f"{leaf.name}: damaged after row {row}: {reason}") from error
