"""Text files in every format and every packing, as bytes."""

import bz2
import csv
import gzip
import io
import json
import lzma
import tarfile

import pytest

TEXTS = ["Grüße aus Köln, 42", 'two\nparagraphs, "quoted"', "안녕하세요"]
ROWS = [{"id": i, "text": t} for i, t in enumerate(TEXTS)]


def tar_of(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


def zst(content: bytes) -> bytes:
    return pytest.importorskip("pyarrow").compress(content, "zstd", asbytes=True)


def table(rows: list[dict]):
    return pytest.importorskip("pyarrow").table({name: [row[name] for row in rows] for name in rows[0]})


def parquet(rows: list[dict] = ROWS) -> bytes:
    sink = io.BytesIO()
    pytest.importorskip("pyarrow.parquet").write_table(table(rows), sink)
    return sink.getvalue()


def arrow(rows: list[dict] = ROWS, of_streams: bool = True) -> bytes:
    pa, content, sink = pytest.importorskip("pyarrow"), table(rows), io.BytesIO()
    with (pa.ipc.new_stream if of_streams else pa.ipc.new_file)(sink, content.schema) as writer:
        writer.write_table(content, max_chunksize=2)
    return sink.getvalue()


def csv_of(rows: list[dict] = ROWS, delimiter: str = ",") -> bytes:
    sink = io.StringIO()
    writer = csv.DictWriter(sink, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return sink.getvalue().encode()


TABLES = {
    "jsonl": lambda rows=ROWS: "".join(f"{json.dumps(row)}\n" for row in rows).encode(),
    "json": lambda rows=ROWS: json.dumps(rows, indent=1, ensure_ascii=False).encode(),
    "csv": csv_of,
    "parquet": parquet,
    "arrow": arrow,
}
FORMATS = TABLES | {
    "txt": lambda: "\n\n".join(TEXTS).encode(),
    "tar": lambda: tar_of({f"{i}.txt": t.encode() for i, t in enumerate(TEXTS)}),
}
PACKINGS = {
    "": lambda content: content,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
    ".zst": zst,
    ".gz, in a tar": lambda content: tar_of({"folder/one.gz": gzip.compress(content)}),
}
