"""Files are read by what they hold: every format, packed in every way, and the rest named for what it is."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import socket
import sys
import tarfile
import tracemalloc

import pytest

from electra_fast.data import documents, records, streams, text
from electra_fast.data import lines as line_files

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


def table():
    return pytest.importorskip("pyarrow").table({name: [row[name] for row in ROWS] for name in ROWS[0]})


def parquet() -> bytes:
    sink, rows = io.BytesIO(), table()
    pytest.importorskip("pyarrow.parquet").write_table(rows, sink)
    return sink.getvalue()


def arrow(of_streams: bool = True) -> bytes:
    pa, rows, sink = pytest.importorskip("pyarrow"), table(), io.BytesIO()
    with (pa.ipc.new_stream if of_streams else pa.ipc.new_file)(sink, rows.schema) as writer:
        writer.write_table(rows, max_chunksize=2)
    return sink.getvalue()


def csv_of(delimiter: str = ",") -> bytes:
    sink = io.StringIO()
    writer = csv.DictWriter(sink, list(ROWS[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return sink.getvalue().encode()


FORMATS = {
    "txt": lambda: "\n\n".join(TEXTS).encode(),
    "jsonl": lambda: "".join(f"{json.dumps(row)}\n" for row in ROWS).encode(),
    "json": lambda: json.dumps(ROWS, indent=1, ensure_ascii=False).encode(),
    "csv": csv_of,
    "parquet": parquet,
    "arrow": arrow,
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


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("form", FORMATS)
def test_every_format_is_read_packed_or_not(tmp_path, form, packing):
    file = tmp_path / f"corpus.{form}{packing.split(',')[0]}"
    file.write_bytes(PACKINGS[packing](FORMATS[form]()))
    assert list(documents(file)) == list(documents(tmp_path)) == TEXTS
    misnamed = file.rename(tmp_path / "corpus.txt")
    assert list(documents(misnamed)) == TEXTS


def test_the_other_arrow_format_and_semicolons_and_tabs_are_read(tmp_path):
    for name, content in (
        ("a.arrow", arrow(of_streams=False)),
        ("a.arrow.gz", gzip.compress(arrow(of_streams=False))),
        ("a.csv", csv_of(";")),
        ("a.csv.xz", lzma.compress(b"\xef\xbb\xbf" + csv_of().replace(b"\r\n", b"\r"))),
    ):
        (tmp_path / name).write_bytes(content)
        assert list(documents(tmp_path / name)) == TEXTS, name
    # Quotes in a TSV are text, unless they enclose a field.
    (tmp_path / "a.tsv").write_text('id\ttext\n0\t"so he said\n1\t"a ""b"""\n\n2\tc"\n')
    assert list(documents(tmp_path / "a.tsv")) == ['"so he said', 'a "b"', 'c"']


def test_openwebtexts_layout_is_read(tmp_path):
    subsets = {}
    for s in range(2):
        pages = {f"{s}{i}.txt": f"page {s}{i}\n\nits end".encode() for i in range(3)}
        packed = lzma.compress(tar_of({"LICENSE": b"theirs"} | pages))
        subsets[f"openwebtext/urlsf_subset{s:02}_data.xz"] = packed
    pages = [f"page {s}{i}" for s in range(2) for i in range(3)]
    (tmp_path / "openwebtext.tar.xz").write_bytes(lzma.compress(tar_of(subsets)))
    for name, content in subsets.items():
        (tmp_path / "unpacked" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "unpacked" / name).write_bytes(content)
    for path in (tmp_path / "openwebtext.tar.xz", tmp_path / "unpacked"):
        found = documents(path)
        assert list(found) == [part for page in pages for part in (page, "its end")]
        assert list(documents(path, blanks_separate=False)) == [f"{page}\nits end" for page in pages]
        list(found)
        assert "passed over: 2 without an ending" in found.note  # counted once, however often it is read


@pytest.mark.parametrize("splits", [None, ["train"], ["test", "train"], ["test", "validation"]])
def test_a_folder_of_hugging_faces_datasets_is_read(tmp_path, splits):
    for split in splits or [""]:
        folder = tmp_path / split
        folder.mkdir(exist_ok=True)
        (folder / "dataset_info.json").write_text('{"features": {"text": {"dtype": "string"}}}')
        names = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
        (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": n} for n in names]}))
        for name in names:
            (folder / name).write_bytes(arrow())
        (folder / "cache-1234.arrow").write_bytes(arrow())  # that of a `map`, say
    if splits:
        (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": splits}))
    if splits and "train" not in splits:
        with pytest.raises(ValueError, match=r"must have a split train, .*: test, validation"):
            documents(tmp_path)
        assert list(documents(tmp_path / "test")) == TEXTS * 2
        return
    found = documents(tmp_path)
    assert list(found) == TEXTS * 2
    assert ("split test" in (found.note or "")) == (splits == ["test", "train"])
    (tmp_path / "train" if splits else tmp_path).joinpath("state.json").write_text(
        '{"_data_files": [{"filename": "../../etc/passwd"}]}'
    )
    with pytest.raises(ValueError, match=r"state\.json: must list names under '_data_files'"):
        documents(tmp_path)


def test_one_file_passed_over_is_named_in_the_singular(tmp_path):
    (tmp_path / "a.txt").write_text("words")
    (tmp_path / "sub").mkdir()
    (tmp_path / "linked").symlink_to(tmp_path / "sub")
    assert documents(tmp_path).note == "passed over: 1 linked folder (read if it is named by its own path)"
    (tmp_path / "again").symlink_to(tmp_path / "sub")
    expected = "passed over: 2 linked folders (read if they are named by their own paths)"
    assert documents(tmp_path).note == expected


def test_what_a_folder_has_beside_is_counted_in_a_line(tmp_path):
    for name in ("a.txt", "b.md", "c.md", "d.pdf", "LICENSE", ".hidden.txt", "e/f.JSONL"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"text": "words"}')
    (tmp_path / "linked").symlink_to(tmp_path / "e")
    found = documents(tmp_path)
    assert list(found) == ["words", "words"]
    for part in ("2 .md", "1 .pdf", "1 without an ending", "1 linked folder"):
        assert part in found.note
    assert documents(tmp_path / "b.md").note is None and list(documents(tmp_path / "b.md")) == ["words"]


@pytest.mark.parametrize(
    "content, message",
    [
        (b"%PDF-1.7\n", "is a PDF document; extract its text"),
        (b"PK\x03\x04 and more", "a zip archive; unpack it"),
        (b"SQLite format 3\0", "an SQLite database"),
        (b"\x7fELF\0", "a program"),
        (gzip.compress(b"%PDF-1.7\n"), "a PDF document"),
        (tar_of({"inner.txt": b"%PDF-1.7\n"}), "inner.txt is a PDF document"),
        (b"\n<!DOCTYPE html>\n<html>", "is an HTML or XML document; extract its text"),
        (b"<HTML><body>", "is an HTML or XML document"),
        (b'<?xml version="1.0"?>', "is an HTML or XML document"),
        (b"binary \0", "NUL at byte 7"),
    ],
    ids=["PDF", "zip", "SQLite", "ELF", "PDF in gz", "PDF in tar", "HTML", "old HTML", "XML", "binary"],
)
def test_what_cannot_be_read_is_named_for_what_it_is(tmp_path, content, message):
    file = tmp_path / "corpus.txt"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"corpus\.txt.*{message}"):
        list(documents(file))


def test_text_that_looks_a_little_like_a_table_is_text(tmp_path):
    for content in (
        "<b>Hello</b>",
        "Hello, world",
        "text, and more of it",
        "[1] a note",
        "{{cite}}",
        "a\tb\tc",
        "[[link]]",
    ):
        (tmp_path / "corpus.txt").write_text(content)
        assert list(documents(tmp_path / "corpus.txt")) == [content]


COLUMNS = [
    ({"id": 1, "body": "a"}, None, "a"),
    ({"title": "b", "text": "a"}, None, "a"),
    ({"title": "b", "text": "a"}, "title", "b"),
    (
        {"title": "b", "body": "a"},
        None,
        r"which column is the text\? .*--text-column: 'title', 'body'",
    ),
    (
        {"title": "b", "text": "a"},
        "body",
        r"--text-column must be one of .*'title', 'text', got 'body'",
    ),
]


@pytest.mark.parametrize("form", ["jsonl", "json", "csv", "parquet", "arrow"])
@pytest.mark.parametrize("row, wanted, expected", COLUMNS)
def test_the_column_of_the_text(tmp_path, form, row, wanted, expected, monkeypatch):
    monkeypatch.setitem(globals(), "ROWS", [row])
    file = tmp_path / f"corpus.{form}"
    file.write_bytes(FORMATS[form]())
    found = documents(file, text_column=wanted)
    if len(expected) == 1:
        assert list(found) == [expected]
    else:
        with pytest.raises(ValueError, match=rf"corpus\.{form}.*{expected}"):
            list(found)


@pytest.mark.parametrize(
    "rows, wanted, expected",
    [
        ([{"text": None}, {"text": "a"}], None, ["a"]),
        ([{"other": "x", "text": None}, {"other": "y", "text": "a"}], None, ["a"]),
        ([{"other": "x"}, {"text": "a"}], None, r"(record|line) 1: must be a JSON object with 'text'"),
        ([{"id": 1, "body": None}, {"id": 2, "body": "a"}], None, ["a"]),
        ([{"id": 1, "body": None}] * 2, None, r"must have a column of strings, got none; .*'id', 'body'"),
        ([{"id": 1, "a": "x", "b": "y"}], None, r"--text-column: 'a', 'b'$"),
        ([{"text": ["t"], "body": "a"}], None, ["a"]),
        ([{"id": 1}, {"id": 2, "body": "a"}], "body", r"1: must be a JSON object with 'body'"),
        ([{"n": None}] * 100 + [{"n": "a"}], None, r"must have a column of strings"),
        ([{"n": None}] * 99 + [{"n": "a"}], None, ["a"]),
    ],
)
@pytest.mark.parametrize("form", ["jsonl", "json"])
def test_the_first_records_of_json_decide_the_column(tmp_path, form, rows, wanted, expected):
    lines = list(map(json.dumps, rows))
    content = "\n".join(lines) if form == "jsonl" else f"[{', '.join(lines)}]"
    (tmp_path / f"a.{form}").write_text(content)
    found = documents(tmp_path / f"a.{form}", text_column=wanted)
    if isinstance(expected, list):
        assert list(found) == expected
    else:
        with pytest.raises(ValueError, match=expected):
            list(found)


def test_a_column_of_csv_named_text_may_begin_with_a_number(tmp_path):
    (tmp_path / "a.csv").write_text("id,text\n1,42\n2,words\n")
    assert list(documents(tmp_path / "a.csv")) == ["42", "words"]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", '{"text": "a"}\n{"text": \n', r"line 2: not JSON: .*one object per line"),
        ("a.jsonl", '{"text": "a"}\n[]\n', r"line 2: must be a JSON object with 'text', got \[\]"),
        (
            "a.jsonl",
            '{"text": "a"}\n{"txt": "b"}\n',
            r"line 2: must be .* with 'text', got {'txt'",
        ),
        ("a.jsonl", '{"text": "a"}\n{"text": 3}\n', r"line 2: the text must be a string, got int"),
        ("a.jsonl", "[" * 100_000, r"record 1: not JSON"),
        ("a.jsonl", '{"text": "a"}\n' + "[" * 100_000, r"line 2: not JSON"),
        ("a.json", '{\n "data": []\n}', r"line 1: not JSON: .*one array of objects"),
        ("a.json", '[{"text": "a"}, {"text": "b"', r"record 2: not JSON"),
        ("a.json", '[{"text": "a"}, 7]', r"record 2: must be a JSON object with 'text', got 7"),
        (
            "a.json",
            '[{"text": "a"}] [{"text": "b"}]',
            r"has text after its JSON array, .* record 1",
        ),
        ("a.csv", 'id,text\n1,"a\n', r"line 2: not CSV: unexpected end of data"),
        ("a.csv", 'id,text\n1,"a" b\n', r"line 2: not CSV: "),
        ("a.csv", "id,text\n1,a\n2,b,c\n", r"line 3: has 3 fields, the header has 2"),
        ("a.tsv", "id\ttext\n1\ta\n2\n", r"line 3: has 1 fields, the header has 2"),
        (
            "a.csv",
            "text,text\na,b\n",
            r"--text-column must be one of its columns, 'text', 'text', got 'text'",
        ),
        ("a.csv", "id,text\n", r"no document"),
        ("a.json", "[]", r"no document"),
    ],
)
def test_a_faulty_record_is_named_with_its_line(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=rf"a\..*{message}"):
        list(documents(tmp_path / name))


@pytest.mark.parametrize("form", ["parquet", "arrow", "tar", "zst"])
def test_a_damaged_file_is_named(tmp_path, form):
    whole = zst(FORMATS["txt"]()) if form == "zst" else FORMATS[form]()
    file = tmp_path / f"corpus.{form}"
    cuts = [len(whole) // 2, len(whole) - 3] if form != "tar" else [600, 1024, 1500, 2048]
    for cut in cuts:
        for pack in (bytes, gzip.compress):
            file.write_bytes(pack(whole[:cut]))
            with pytest.raises(ValueError, match=rf"corpus\.{form}.*damaged"):
                list(documents(file))
    if form == "tar":  # a header in the middle: tarfile takes it for the end
        file.write_bytes(whole[:1024] + b"\xff" * 512 + whole[1536:])
        with pytest.raises(ValueError, match=r"corpus\.tar: damaged: .* at byte 1024"):
            list(documents(file))


def test_records_without_text_are_no_documents_and_others_are_cleaned(tmp_path):
    rows = ["x", None, "", " \n ", "a\r\n\r\n b \rc\n", "\ud800half", "d\0e"]
    (tmp_path / "a.jsonl").write_text("".join(f"{json.dumps({'text': row})}\n" for row in rows))
    assert list(documents(tmp_path / "a.jsonl")) == ["x", "a\n b \nc", "\ufffdhalf", "d\0e"]


def bomb(form: str) -> bytes:
    long = "a" * (50 << 20)
    if form == "txt":
        content = f"short\n\n{long}".encode()
    elif form == "a document":
        content = b"line\n" * (10 << 20)
    elif form == "csv":
        content = f'id,text\n0,short\n1,"{long}"\n'.encode()
    else:
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(globals(), "ROWS", [{"text": "short"}, {"text": long}])
            content = FORMATS[form]()
    return gzip.compress(content)


@pytest.mark.parametrize("form", ["txt", "jsonl", "json", "csv", "parquet", "arrow", "a document"])
def test_a_line_that_unpacks_to_gigabytes_is_refused_by_name(tmp_path, monkeypatch, form):
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
    assert peak < 20 << 20 or form in ("parquet", "arrow")  # pyarrow has the batch, which BATCH bounds


def test_other_bombs_are_refused(tmp_path, monkeypatch):
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
    with pytest.raises(ValueError, match=r"a\.xz: unpacking it takes more than 1 MB"):
        list(documents(tmp_path / "a.xz"))

    monkeypatch.setattr(records, "BATCH", 100)
    for form in ("parquet", "arrow"):
        (tmp_path / f"a.{form}.gz").write_bytes(gzip.compress(FORMATS[form]()))
        with pytest.raises(ValueError, match=rf"a\.{form}\.gz: .* has more than 0 GB; unpack the file"):
            list(documents(tmp_path / f"a.{form}.gz"))


def test_what_is_no_regular_file_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.txt")
    for path in (tmp_path / "a.txt", tmp_path):
        with pytest.raises(ValueError, match=r"a\.txt: must be a regular file, got a FIFO"):
            documents(path)
    with socket.socket(socket.AF_UNIX) as found:
        found.bind(str(tmp_path / "b.txt"))
        with pytest.raises(ValueError, match=r"b\.txt: must be a regular file, got a socket"):
            documents(tmp_path / "b.txt")
    with pytest.raises(ValueError, match=r"/dev/null: must be a regular file, got a character device"):
        documents("/dev/null")


def test_without_pyarrow_the_remedy_is_named(tmp_path, monkeypatch):
    contents = {"a.parquet": parquet(), "a.arrow": arrow(), "a.txt.zst": zst(b"text")}
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ImportError, match=rf"{name}: .*pip install electra_fast\[text\]"):
            list(documents(tmp_path / name))


def test_large_records_cross_the_buffers(tmp_path):
    rows = [{"text": "word " * n} for n in (1, 100_000, 3, 200_000, 5)] * 3
    expected = [row["text"].strip() for row in rows]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (tmp_path / "a.csv").write_text("text\n" + "".join(f"{row['text']}\n" for row in rows))
    for name in ("a.json", "a.jsonl", "a.csv"):
        assert list(documents(tmp_path / name)) == expected
