"""The texts of a file for the command line."""

from collections.abc import Iterator, Sequence

from electra_fast.data.lines import lines
from electra_fast.data.streams import Leaf
from electra_fast.tasks.readers import TEXTS
from electra_fast.tasks.records import column, form, named, read, records_of, string


def read_texts(paths: Sequence[str], name: str | None = None) -> list[str]:
    """Return the texts of files: one per line, or one per record of CSV, TSV, JSON or Parquet.

    Args:
        paths: files, which may be packed.
        name: the column of a file with columns; None: the first of TEXTS that it has.

    Raises:
        FileNotFoundError, ValueError: as in `records.records`, or a record has no text.
    """

    def texts(leaf: Leaf) -> Iterator[str]:
        if form(leaf) == "text":
            yield from (line for line in lines(leaf) if line.strip())
            return
        found = list(records_of(leaf))
        if found:
            wanted = named(found, (name,) if name else TEXTS, "--text")
            for record in found:
                yield string(record.where, wanted, column(record, wanted, "--text"))

    return list(read(paths, "a text", texts))
