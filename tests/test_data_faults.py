"""Files that cannot be read: each error names the file, its kind, and the faulty line, record or byte."""

import gzip
import lzma
import os
import socket
import sys
import tracemalloc

import pytest
from text_files import FORMATS, arrow, parquet, tar_of, zst

from electra_fast.data import documents, records, streams, text
from electra_fast.data import lines as line_files


@pytest.mark.parametrize(
    "content, message",
    [
        (b"%PDF-1.7\n", "is a PDF document; extract its text"),
        (b"PK\x03\x04 and more", "a zip archive; unpack it"),
        (b"SQLite format 3\0", "an SQLite database"),
        (b"\x7fELF\0", "a program"),
        (gzip.compress(b"%PDF-1.7\n", mtime=0), "a PDF document"),
        (tar_of({"inner.txt": b"%PDF-1.7\n"}), "inner.txt is a PDF document"),
        (b"\n<!DOCTYPE html>\n<html>", "is an HTML or XML document; extract its text"),
        (b"<HTML><body>", "is an HTML or XML document"),
        (b'<?xml version="1.0"?>', "is an HTML or XML document"),
        (b"binary \0", "NUL at byte 7"),
    ],
    ids=["PDF", "zip", "SQLite", "ELF", "PDF in gz", "PDF in tar", "HTML", "old HTML", "XML", "binary"],
)
def test_the_error_names_the_kind_of_an_unreadable_file(tmp_path, content, message):
    file = tmp_path / "corpus.txt"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"corpus\.txt.*{message}"):
        list(documents(file))


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", '{"text": "a"}\n{"text": \n', r"line 2: not JSON: .*one object per line"),
        ("a.jsonl", '{"text": "a"}\n[]\n', r"line 2 must be a JSON object with 'text', got \[\]"),
        ("a.jsonl", '{"text": "a"}\n{"txt": "b"}\n', r"line 2 must be .* with 'text', got {'txt'"),
        ("a.jsonl", '{"text": "a"}\n{"text": 3}\n', r"line 2: the text must be a string, got int"),
        ("a.jsonl", "[" * 100_000, r"record 1: not JSON"),
        ("a.jsonl", '{"text": "a"}\n' + "[" * 100_000, r"line 2: not JSON"),
        ("a.json", '{\n "data": []\n}', r"line 1: not JSON: .*one array of objects"),
        ("a.json", '[{"text": "a"}, {"text": "b"', r"record 2: not JSON"),
        ("a.json", '[{"text": "a"}, 7]', r"record 2 must be a JSON object with 'text', got 7"),
        ("a.json", '[{"text": "a"}] [{"text": "b"}]', r"text follows the JSON array, .* record 1"),
        ("a.csv", 'id,text\n1,"a\n', r"line 2: not CSV: unexpected end of data"),
        ("a.csv", 'id,text\n1,"a" b\n', r"line 2: not CSV: "),
        ("a.csv", "id,text\n1,a\n2,b,c\n", r"line 3 must have 2 fields, as the header, got 3"),
        ("a.tsv", "id\ttext\n1\ta\n2\n", r"line 3 must have 2 fields, as the header, got 1"),
        (
            "a.csv",
            "text,text\na,b\n",
            r"--text-column must be one of its columns, 'text', 'text', got 'text'",
        ),
        ("a.csv", "id,text\n", "must contain a document"),
        ("a.json", "[]", "must contain a document"),
    ],
)
def test_the_error_names_the_line_of_a_faulty_record(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=rf"a\..*{message}"):
        list(documents(tmp_path / name))


@pytest.mark.parametrize("form", ["parquet", "arrow", "tar", "zst"])
def test_the_error_names_a_damaged_file(tmp_path, form):
    whole = zst(FORMATS["txt"]()) if form == "zst" else FORMATS[form]()
    file = tmp_path / f"corpus.{form}"
    cuts = [len(whole) // 2, len(whole) - 3] if form != "tar" else [600, 1024, 1500, 2048]
    for cut in cuts:
        for pack in (bytes, gzip.compress):
            file.write_bytes(pack(whole[:cut]))
            with pytest.raises(ValueError, match=rf"corpus\.{form}.*damaged"):
                list(documents(file))
    if form == "tar":  # a header in the middle, which tarfile would treat as the end
        file.write_bytes(whole[:1024] + b"\xff" * 512 + whole[1536:])
        with pytest.raises(ValueError, match=r"corpus\.tar: damaged: .* at byte 1024"):
            list(documents(file))


def bomb(form: str) -> bytes:
    long = "a" * (50 << 20)
    if form == "txt":
        content = f"short\n\n{long}".encode()
    elif form == "a document":
        content = b"line\n" * (10 << 20)
    elif form == "csv":
        content = f'id,text\n0,short\n1,"{long}"\n'.encode()
    else:
        content = FORMATS[form]([{"text": "short"}, {"text": long}])
    return gzip.compress(content)


@pytest.mark.parametrize("form", ["txt", "jsonl", "json", "csv", "parquet", "arrow", "a document"])
def test_the_error_names_a_file_that_unpacks_to_gigabytes(tmp_path, monkeypatch, form):
    monkeypatch.setattr(line_files, "LIMIT", 1 << 20)
    monkeypatch.setattr(records, "LIMIT", 1 << 20)
    monkeypatch.setattr(text, "DOCUMENT", 4 << 20)
    file = tmp_path / "bomb.gz"
    file.write_bytes(bomb(form))
    assert file.stat().st_size < 1 << 20
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"bomb\.gz.*(longer than 1 MB|more than 4 MB)"):
        list(documents(file))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 << 20 or form in ("parquet", "arrow")  # pyarrow allocates the batch, which BATCH limits


def test_other_files_that_need_too_much_memory_are_refused(tmp_path, monkeypatch):
    content = b"text"
    for _ in range(streams.DEPTH + 1):
        content = gzip.compress(content)
    (tmp_path / "a.gz").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.gz: packed more than 4 times"):
        list(documents(tmp_path / "a.gz"))

    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(tar_of({"x" * (3 << 20): b"text"})))
    with pytest.raises(ValueError, match=r"a\.tar\.gz: a member's headers have more than 1048576 bytes"):
        list(documents(tmp_path / "a.tar.gz"))

    (tmp_path / "a.xz").write_bytes(lzma.compress(b"text"))
    monkeypatch.setattr(streams, "XZ_MEMORY", 1 << 20)
    with pytest.raises(ValueError, match=r"a\.xz: unpacking it needs more than 1 MB"):
        list(documents(tmp_path / "a.xz"))

    monkeypatch.setattr(records, "BATCH", 100)
    for form in ("parquet", "arrow"):
        (tmp_path / f"a.{form}.gz").write_bytes(gzip.compress(FORMATS[form]()))
        with pytest.raises(ValueError, match=rf"a\.{form}\.gz: .* has more than 0 GB; unpack the file"):
            list(documents(tmp_path / f"a.{form}.gz"))


def test_other_kinds_of_files_raise_an_error_instead_of_blocking(tmp_path):
    os.mkfifo(tmp_path / "a.txt")
    for path in (tmp_path / "a.txt", tmp_path):
        with pytest.raises(ValueError, match=r"a\.txt must be a regular file, got a FIFO"):
            documents(path)
    with socket.socket(socket.AF_UNIX) as found:
        found.bind(str(tmp_path / "b.txt"))
        with pytest.raises(ValueError, match=r"b\.txt must be a regular file, got a socket"):
            documents(tmp_path / "b.txt")
    with pytest.raises(ValueError, match=r"/dev/null must be a regular file, got a character device"):
        documents("/dev/null")


def test_the_error_without_pyarrow_names_it(tmp_path, monkeypatch):
    contents = {"a.parquet": parquet(), "a.arrow": arrow(), "a.txt.zst": zst(b"text")}
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ImportError, match=rf"{name}: .*pip install electra_fast\[text\]"):
            list(documents(tmp_path / name))
