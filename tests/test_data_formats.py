"""Files are read by their content: every format, with every packing."""

import gzip
import json
import lzma

import pytest
from text_files import FORMATS, PACKINGS, TABLES, TEXTS, arrow, csv_of, tar_of

from electra_fast.data import documents


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
        ("a.arrow.gz", gzip.compress(arrow(of_streams=False), mtime=0)),
        ("a.csv", csv_of(delimiter=";")),
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
        assert "skipped: 2 without an ending" in found.note  # counted once after several readings


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
        (folder / "cache-1234.arrow").write_bytes(arrow())  # as `map` writes it
    if splits:
        (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": splits}))
    if splits and "train" not in splits:
        with pytest.raises(
            ValueError, match=r"must have a split train, got test, validation; name the folder"
        ):
            documents(tmp_path)
        assert list(documents(tmp_path / "test")) == TEXTS * 2
        return
    found = documents(tmp_path)
    assert list(found) == TEXTS * 2
    assert ("split test" in (found.note or "")) == (splits == ["test", "train"])
    (tmp_path / "train" if splits else tmp_path).joinpath("state.json").write_text(
        '{"_data_files": [{"filename": "../../etc/passwd"}]}'
    )
    with pytest.raises(ValueError, match=r"state\.json must list names under '_data_files'"):
        documents(tmp_path)


def test_one_skipped_file_is_named_in_the_singular(tmp_path):
    (tmp_path / "a.txt").write_text("words")
    (tmp_path / "sub").mkdir()
    (tmp_path / "linked").symlink_to(tmp_path / "sub")
    assert documents(tmp_path).note == "skipped: 1 linked folder (to read it, name its own path)"
    (tmp_path / "again").symlink_to(tmp_path / "sub")
    assert documents(tmp_path).note == "skipped: 2 linked folders (to read them, name their own paths)"


def test_an_index_next_to_text_is_skipped(tmp_path):
    """As in a corpus with the titles and addresses of its documents."""
    (tmp_path / "a.txt").write_text("one text")
    index = tmp_path / "index.tsv"
    index.write_text("title\turl\na\thttps://a\n")
    found = documents(tmp_path)
    assert list(found) == ["one text"]
    assert found.note == "skipped: 1 table without one column of text (to read it, name its own path)"
    for paths in (index, [tmp_path, index], [tmp_path / "a.txt", index]):
        with pytest.raises(ValueError, match="must have one column of strings, got 'title', 'url'"):
            list(documents(paths))


def test_skipped_files_are_counted_in_one_line(tmp_path):
    for name in ("a.txt", "b.md", "c.md", "d.pdf", "LICENSE", ".hidden.txt", "e/f.JSONL"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"text": "words"}')
    (tmp_path / "linked").symlink_to(tmp_path / "e")
    found = documents(tmp_path)
    assert list(found) == ["words", "words"]
    for part in ("2 .md", "1 .pdf", "1 without an ending", "1 linked folder"):
        assert part in found.note
    assert documents(tmp_path / "b.md").note is None and list(documents(tmp_path / "b.md")) == ["words"]


def test_text_that_resembles_a_table_is_text(tmp_path):
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
        r"must have one column of strings, got 'title', 'body'; name one with --text-column",
    ),
    ({"title": "b", "text": "a"}, "body", r"--text-column must be one of .*'title', 'text', got 'body'"),
]


@pytest.mark.parametrize("form", TABLES)
@pytest.mark.parametrize("row, wanted, expected", COLUMNS)
def test_the_column_of_the_text(tmp_path, form, row, wanted, expected):
    file = tmp_path / f"corpus.{form}"
    file.write_bytes(TABLES[form]([row]))
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
        ([{"other": "x"}, {"text": "a"}], None, r"(record|line) 1 must be a JSON object with 'text'"),
        ([{"id": 1, "body": None}, {"id": 2, "body": "a"}], None, ["a"]),
        ([{"id": 1, "body": None}] * 2, None, r"must have a column of strings, got none; .*'id', 'body'"),
        ([{"id": 1, "a": "x", "b": "y"}], None, r"must have one column of strings, got 'a', 'b'; name"),
        ([{"text": ["t"], "body": "a"}], None, ["a"]),
        ([{"id": 1}, {"id": 2, "body": "a"}], "body", r"1 must be a JSON object with 'body'"),
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


def test_records_without_text_are_skipped_and_others_are_cleaned(tmp_path):
    rows = ["x", None, "", " \n ", "a\r\n\r\n b \rc\n", "\ud800half", "d\0e"]
    (tmp_path / "a.jsonl").write_text("".join(f"{json.dumps({'text': row})}\n" for row in rows))
    assert list(documents(tmp_path / "a.jsonl")) == ["x", "a\n b \nc", "\ufffdhalf", "d\0e"]


def test_records_larger_than_the_buffers(tmp_path):
    rows = [{"text": "word " * n} for n in (1, 100_000, 3, 200_000, 5)] * 3
    expected = [row["text"].strip() for row in rows]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (tmp_path / "a.csv").write_text("text\n" + "".join(f"{row['text']}\n" for row in rows))
    for name in ("a.json", "a.jsonl", "a.csv"):
        assert list(documents(tmp_path / name)) == expected
