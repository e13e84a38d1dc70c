"""Text in JSON, CSV, Parquet and Arrow, one document per record, read in bounded memory."""

import csv
import io
import itertools
import json
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any

from electra_fast.data.kinds import ARROW_FILE
from electra_fast.data.lines import LIMIT, lines, too_long
from electra_fast.data.streams import Leaf, pyarrow
from electra_fast.errors import must

ROWS = 16  # rows of a Parquet file per read: with a dictionary each can be as long as LIMIT
BATCH = 2 << 30  # bytes per Arrow message or per packed Parquet file
FIRST = 100  # JSON records that decide which column has the text, because each record names its own columns
BETWEEN = re.compile(r"\s*,?\s*")


def json_lines(leaf: Leaf, wanted: str | None) -> Iterator[str]:
    """Yield the texts of a file with one JSON object per line."""
    yield from _texts(leaf, _lines_of_json(leaf), wanted)


def _lines_of_json(leaf: Leaf) -> Iterator[tuple[str, Any, int]]:
    for number, line in enumerate(lines(leaf), start=1):
        if not line.strip():
            continue
        where = f"{leaf.name}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            remedy = "write one object per line, or one array of objects"
            raise ValueError(f"{where}: not JSON: {error}; {remedy}") from None
        yield where, record, len(line)


def json_array(leaf: Leaf, wanted: str | None) -> Iterator[str]:
    """Yield the texts of a file with one JSON array of objects."""
    yield from _texts(leaf, _array_of_json(leaf), wanted)


def _array_of_json(leaf: Leaf) -> Iterator[tuple[str, Any, int]]:
    stream = io.TextIOWrapper(leaf.buffered(), "utf-8-sig", newline="")
    number, decoder = 0, json.JSONDecoder()
    try:
        buffer = stream.read(1 << 16).lstrip()
        start = 1  # after the bracket
        while True:
            number += 1
            where = f"{leaf.name}, record {number}"
            begin = start = BETWEEN.match(buffer, start).end()
            try:
                record, start = decoder.raw_decode(buffer, start)
            except RecursionError as error:
                raise ValueError(f"{where}: not JSON: {error}") from None
            except json.JSONDecodeError as error:
                if buffer.startswith("]", start):
                    break
                buffer, start = buffer[start:], 0
                if len(buffer) > LIMIT:
                    raise ValueError(f"{where}: {too_long()}, or not JSON") from None
                if not (more := stream.read(max(1 << 16, len(buffer)))):
                    raise ValueError(f"{where}: not JSON: {error}") from None
                buffer += more
                number -= 1
                continue
            yield where, record, start - begin
        if (buffer[start + 1 :] + stream.read(1 << 16)).strip():
            raise ValueError(f"{leaf.name}: text follows the JSON array, which ends with record {number - 1}")
    except UnicodeDecodeError as error:
        remedy = "convert it: iconv -t UTF-8"
        raise ValueError(f"{leaf.name}, record {number}: not UTF-8: {error}; {remedy}") from None


def _texts(leaf: Leaf, found: Iterator[tuple[str, Any, int]], wanted: str | None) -> Iterator[str]:
    """Yield the texts of JSON records, given as (where, record, length).

    The first records decide the column: all up to one that has column `wanted`, or ``text`` if that is None,
    but at most FIRST records or LIMIT characters. They stay in memory until the column is known.
    """
    first, columns, texts, size = [], {}, {}, 0
    for where, record, length in found:
        if not isinstance(record, dict):
            raise ValueError(must(where, "be a JSON object", _shown(record)))
        first.append((where, record))
        columns |= dict.fromkeys(record)
        texts |= {k: 0 for k, v in record.items() if isinstance(v, str) or (k == "text" and v is None)}
        size += length
        if (wanted or "text") in (columns if wanted else texts) or len(first) == FIRST or size > LIMIT:
            break
    if not first:
        return
    column = choose(leaf.name, list(columns), list(texts), wanted)
    for where, record in itertools.chain(first, (pair[:2] for pair in found)):
        if not isinstance(record, dict) or column not in record:
            raise ValueError(must(where, f"be a JSON object with {column!r}", _shown(record)))
        yield _text(where, record[column])


def _shown(record: Any) -> str:
    return str(record)[:80]


def csv_rows(leaf: Leaf, wanted: str | None) -> Iterator[str]:
    """Yield the texts of a comma-separated file whose first row names the columns."""
    csv.field_size_limit(max(csv.field_size_limit(), LIMIT))  # The default is 131,072.
    first = leaf.head.split(b"\n", 1)[0]
    delimiter = ";" if first.count(b";") > first.count(b",") else ","
    rows = csv.reader((f"{line}\n" for line in lines(leaf)), delimiter=delimiter, strict=True)
    try:
        yield from _rows(leaf, ((rows.line_num, row) for row in rows), wanted)
    except csv.Error as error:
        raise ValueError(f"{leaf.name}, line {rows.line_num}: not CSV: {error}") from None


def tsv_rows(leaf: Leaf, wanted: str | None) -> Iterator[str]:
    """Yield the texts of a tab-separated file; quotes have a meaning only around a whole field."""
    rows = (line.split("\t") if line else [] for line in lines(leaf))
    yield from _rows(leaf, enumerate(rows, start=1), wanted, unquote=True)


def _rows(
    leaf: Leaf, rows: Iterable[tuple[int, list[str]]], wanted: str | None, unquote: bool = False
) -> Iterator[str]:
    names, column = None, None
    for number, row in rows:
        if not row:
            continue
        if names is None:
            names = [_unquoted(name) for name in row] if unquote else row
            continue
        where = f"{leaf.name}, line {number}"
        if len(row) != len(names):
            raise ValueError(must(where, f"have {len(names)} fields, as the header", len(row)))
        if column is None:
            pairs = zip(names, row, strict=True)
            texts = [name for name, value in pairs if name == "text" or not _is_number(value)]
            column = names.index(choose(leaf.name, names, texts, wanted))
        yield _unquoted(row[column]) if unquote else row[column]


def _unquoted(field: str) -> str:
    if len(field) > 1 and field[0] == field[-1] == '"' and '"' not in field[1:-1].replace('""', ""):
        return field[1:-1].replace('""', '"')
    return field


def _is_number(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True


def arrow_rows(leaf: Leaf, wanted: str | None) -> Iterator[str]:
    """Yield the texts of an Arrow file, in the file format or in the stream format."""
    pa = pyarrow(leaf.name)

    def batches():
        source = pa.memory_map(str(leaf.path)) if leaf.path else pa.PythonFile(_Bounded(leaf), "r")
        if leaf.head.startswith(ARROW_FILE):  # a stream, and then a footer that this code does not need
            source.read(len(ARROW_FILE))
        with pa.ipc.open_stream(source) as reader:
            column = choose(leaf.name, *_columns(pa, reader.schema), wanted)
            for batch in reader:
                values = batch.column(column)
                values.validate(full=True)  # Wrong offsets would crash the process.
                yield values

    yield from _values(leaf, pa, batches())


def parquet_rows(leaf: Leaf, wanted: str | None) -> Iterator[str]:
    """Yield the texts of a Parquet file. A packed one is first unpacked to a temporary file."""
    pa = pyarrow(leaf.name)
    from pyarrow.parquet import ParquetFile

    def batches():
        with tempfile.TemporaryFile() if leaf.path is None else open(leaf.path, "rb") as source:
            if leaf.path is None:
                shutil.copyfileobj(_Bounded(leaf, whole=True), source, 1 << 20)
                source.seek(0)
            file = ParquetFile(source, buffer_size=1 << 20)
            column = choose(leaf.name, *_columns(pa, file.schema_arrow), wanted)
            for batch in file.iter_batches(ROWS, columns=[column], use_threads=False):
                yield batch.column(0)

    yield from _values(leaf, pa, batches())


def _columns(pa, schema) -> tuple[list[str], list[str]]:
    """Return the names of all columns, and the names of those that contain strings."""

    def is_text(kind) -> bool:
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
        return any(test(kind) for test in tests)

    return schema.names, [field.name for field in schema if is_text(field.type)]


def _values(leaf: Leaf, pa, batches: Iterator) -> Iterator[str]:
    number = 0
    try:
        for batch in batches:
            for value in batch:
                number += 1
                yield _text(f"{leaf.name}, row {number}", value.as_py())
    except (pa.ArrowException, OSError, MemoryError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # an error of the disk, not of the format
            raise
        reason = " ".join(str(error).split())
        raise ValueError(f"{leaf.name}: damaged after row {number}: {reason}") from error


class _Bounded:
    """A leaf for pyarrow, which reads a message per call; wrong lengths in damaged files raise an error."""

    closed = False

    def __init__(self, leaf: Leaf, whole: bool = False):
        self._name, self._stream, self._whole, self._read = leaf.name, leaf.buffered(), whole, 0

    def read(self, size: int) -> bytes:
        self._read = self._read + size if self._whole else size
        if self._read > BATCH:
            what = "the file" if self._whole else "one of its batches"
            raise ValueError(f"{self._name}: {what} has more than {BATCH >> 30} GB; unpack the file")
        return self._stream.read(size)


class NoTextColumn(ValueError):
    """A table has no column of text, or several, of which none is named."""


def choose(where: str, columns: list[str], texts: list[str], wanted: str | None) -> str:
    """Return the name of the column with the text.

    Raises:
        NoTextColumn: there is no column of strings, or there are several; the message lists them.
        ValueError: there is no column `wanted`.
    """
    names = ", ".join(map(repr, columns)) or "none"
    if wanted is None:
        wanted = "text" if "text" in texts else texts[0] if len(texts) == 1 else None
    if wanted is None and not texts:
        raise NoTextColumn(must(where, "have a column of strings", "none", f"its columns are {names}"))
    if wanted is None:
        candidates = ", ".join(map(repr, texts))
        remedy = "name one with --text-column"
        raise NoTextColumn(must(where, "have one column of strings", candidates, remedy))
    if columns.count(wanted) != 1:
        raise ValueError(must(f"{where}: --text-column", f"be one of its columns, {names}", repr(wanted)))
    return wanted


def _text(where: str, value: Any) -> str:
    """Return the text of a record; None is an empty text."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(must(f"{where}: the text", "be a string", type(value).__name__))
    if len(value) > LIMIT:
        raise ValueError(f"{where}: {too_long()}")
    return value
