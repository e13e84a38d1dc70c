"""Documents from text files: complete, repeatable, and errors that name files without valid text."""

import bz2
import gzip
import lzma
import tracemalloc
from pathlib import Path

import pytest

from electra_fast.data import cache_folder, documents
from electra_fast.data import manual as python_manual

pytest_plugins = ["corpus"]
pytestmark = pytest.mark.usefixtures("cache")


def test_the_manual_is_english_in_berts_format(manual):
    text = "\n\n".join(manual)
    assert len(manual) > 500 and len(text) > 1_500_000
    assert sum(text.count(word) for word in (" the ", " of ", " is ")) > 20_000
    assert all(line.strip() for document in manual for line in document.split("\n"))
    assert "\0" not in text
    assert list(documents()) == manual  # from the cache this time


def test_docstrings_are_read_in_order_from_anywhere_in_a_module():
    source = """
'module'
if True:
    class A:
        'class'
        async def f(self):
            'method'
            def inner(): 'inner'
    x = lambda: 'not a docstring'
def g(): 'function'
"""
    found = [text for text in python_manual._docstrings(source.encode()) if text]
    assert found == ["module", "class", "method", "inner", "function"]
    for unreadable in (b"print 'Python 2'", b"\0", b"\xff"):
        assert list(python_manual._docstrings(unreadable)) == []


def test_documents_are_read_as_they_were_written(tmp_path, manual):
    file = tmp_path / "corpus.txt"
    file.write_text("\n\n".join(manual), "utf-8")
    assert list(documents(file)) == list(documents(str(file))) == manual


@pytest.mark.parametrize(
    "text",
    [
        b"one\ntwo\n\nthree",
        b"\n\n one\ntwo\n\n\n \t\nthree\n\n",
        b"one\r\ntwo\r\n\r\nthree\r\n",
        b"one\rtwo\r\rthree\r",
        b"\xef\xbb\xbfone\ntwo\n\nthree\n",
    ],
    ids=["plain", "blank lines", "CRLF", "CR", "BOM"],
)
def test_documents_are_separated_by_blank_lines(tmp_path, text):
    file = tmp_path / "corpus.txt"
    file.write_bytes(text)
    assert list(documents(file)) == ["one\ntwo", "three"]


def test_a_folder_is_read_in_order_of_name(tmp_path):
    for name in ("b.txt", "a.txt", "c/d.txt", "notes.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"first of {name}\n\nsecond of {name}")
    names = ("a.txt", "b.txt", "c/d.txt")
    expected = [f"{nth} of {name}" for name in names for nth in ("first", "second")]
    assert list(documents(tmp_path)) == expected


@pytest.mark.parametrize(
    "content, message",
    [
        (b"good\n\nbad \xe9 Latin-1", r"not UTF-8 at byte 10 \(0xe9\); convert it; .*iconv -f ISO-8859-1"),
        ("UTF-16".encode("utf-16"), r"UTF-16 text; convert it: iconv -f UTF-16 -t UTF-8"),
        ("UTF-32".encode("utf-32"), r"UTF-32 text; convert it: iconv -f UTF-32 -t UTF-8"),
        (b"lone surrogate \xed\xa0\x80", r"not UTF-8 at byte 15 \(0xed\)"),
        (b"caf\xc3\xa9 \0", "NUL at byte 6"),
        (b"", "must contain a document"),
        (b" \r\n\t\n\n", "must contain a document"),
        (b"\xef\xbb\xbf", "must contain a document"),
    ],
    ids=["Latin-1", "UTF-16", "UTF-32", "surrogate", "NUL", "empty", "blank", "BOM"],
)
def test_a_file_that_is_not_text_is_named(tmp_path, content, message):
    (tmp_path / "a.txt").write_text("a good one")
    file = tmp_path / "b.txt"
    file.write_bytes(content)
    for path in (file, tmp_path):
        with pytest.raises(ValueError, match=rf"b\.txt.*{message}"):
            list(documents(path))


def test_a_folder_without_text_counts_its_files(tmp_path):
    (tmp_path / "a.md").write_text("a")
    with pytest.raises(ValueError, match="got only 1 other; name them by their own paths"):
        documents(tmp_path)
    (tmp_path / "b.md").write_text("b")
    with pytest.raises(ValueError, match="2 others"):
        documents(tmp_path)


def test_a_path_without_text_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path} must contain a file of text, got an empty folder"):
        documents(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"path must be on this machine, got .*missing, which"):
        documents(tmp_path / "missing")


def test_the_cache_keeps_results_and_replaces_damaged_ones(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder.cached("key", lambda: "made\nü") == "made\nü"
    assert cache_folder.cached("key", lambda: pytest.fail("made twice")) == "made\nü"
    for damage in (b"", b"\xff", b"no checksum", b"0" * 64 + b"\nmade"):
        for file in (tmp_path / "electra_fast").iterdir():
            file.write_bytes(damage)
        assert cache_folder.cached("key", lambda: "again") == "again"
    assert len(list((tmp_path / "electra_fast").iterdir())) == 1  # no temporary file is left


def test_results_are_returned_without_a_usable_cache_folder(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert cache_folder.cached("key", lambda: "made") == "made"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setattr(Path, "expanduser", lambda path: (_ for _ in ()).throw(RuntimeError))
    assert cache_folder.cached("key", lambda: "made") == "made"


@pytest.mark.parametrize(
    "ending, compress", {"gz": gzip.compress, "xz": lzma.compress, "bz2": bz2.compress}.items()
)
def test_a_compressed_file_is_read_as_its_unpacked_content(tmp_path, manual, ending, compress):
    file = tmp_path / f"corpus.txt.{ending}"
    whole = compress("\n\n".join(manual[:20]).encode())
    file.write_bytes(whole)
    assert list(documents(file)) == list(documents(tmp_path)) == manual[:20]
    file.write_bytes(compress(b"good\n\nbad \xe9 Latin-1"))
    with pytest.raises(ValueError, match=rf"corpus\.txt\.{ending} is not UTF-8 at byte 10 \(0xe9\)"):
        list(documents(file))
    # Only ASCII: with other characters, a wrong byte is often invalid UTF-8 before gzip checks its checksum.
    flipped = bytearray(compress("\n\n".join(manual[:20]).encode("ascii", "ignore")))
    flipped[len(flipped) // 2] ^= 1
    for damaged in (whole[:-20], whole[: len(whole) // 2], flipped):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"corpus\.txt\.{ending}: damaged after byte \d+"):
            list(documents(file))
    file.write_bytes(b"text that is already unpacked")
    assert list(documents(file)) == ["text that is already unpacked"]


def test_path_may_be_a_list_of_files_and_folders(tmp_path):
    (tmp_path / "folder").mkdir()
    for name in ("folder/b.txt", "folder/a.txt", "c"):
        (tmp_path / name).write_text(name)
    found = documents([tmp_path / "c", str(tmp_path / "folder")])
    assert list(found) == list(found) == ["c", "folder/a.txt", "folder/b.txt"]
    with pytest.raises(ValueError, match=r"documents: path must name .*got an empty list"):
        documents([])
    with pytest.raises(ValueError, match="documents: path must name a file or a folder, got ''"):
        documents("")


def test_errors_count_bytes_from_the_beginning_of_the_file(tmp_path):
    file = tmp_path / "corpus.txt"
    for bad, message in ((b"\xff", r"not UTF-8 at byte 3008 \(0xff\)"), (b"\0", "NUL at byte 3008")):
        file.write_bytes(b"\xef\xbb\xbf" + b"caf\xc3\xa9\n" * 500 + b"good " + bad)
        with pytest.raises(ValueError, match=message):
            list(documents(file))


def test_reading_needs_memory_for_one_document(tmp_path):
    file = tmp_path / "corpus.txt.xz"
    file.write_bytes(lzma.compress(b"\n\n".join([b"word " * 1000] * 4000), preset=0))  # 20 MB
    tracemalloc.start()
    assert sum(len(document) for document in documents(file)) == 4000 * 4999
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000


def test_one_long_line_and_one_short_document(tmp_path):
    file = tmp_path / "corpus.txt"
    file.write_bytes(b"word " * 2_000_000)
    assert [len(document) for document in documents(file)] == [9_999_999]
    file.write_bytes(b"a")
    assert list(documents(file)) == ["a"]
