"""Records of CSV, TSV, JSON and Parquet: their fields, the line on which each begins, and the errors."""

import gzip
import json

import pytest
from text_files import PACKINGS, csv_of, parquet, tar_of

from electra_fast.tasks.records import Record, column, known, named, number, records, string, strings

ROWS = [{"text": "Grüße, Köln", "label": "a"}, {"text": 'two\nlines, "quoted"', "label": "b"}]
FORMS = {
    "csv": csv_of,
    "jsonl": lambda rows: "".join(f"{json.dumps(row)}\n" for row in rows).encode(),
    "json": lambda rows: json.dumps(rows, indent=1, ensure_ascii=False).encode(),
    "parquet": parquet,
}
PLACES = {
    "csv": ["line 2", "line 3"],
    "jsonl": ["line 1", "line 2"],
    "json": ["record 1", "record 2"],
    "parquet": ["row 1", "row 2"],
}


def read(tmp_path, name, content, **options):
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return [(r.fields, r.where.removeprefix(f"{tmp_path}/")) for r in records([file], **options)]


def error_of(tmp_path, name, content, **options):
    with pytest.raises(ValueError) as raised:
        read(tmp_path, name, content, **options)
    return str(raised.value).removeprefix(f"{tmp_path}/")


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("form", FORMS)
def test_every_format_is_read_packed_or_not(tmp_path, form, packing):
    name = f"a.{form}{packing.split(',')[0]}"
    content = PACKINGS[packing](FORMS[form](ROWS))
    found = read(tmp_path, name, content)
    assert [fields for fields, _ in found] == ROWS
    if "tar" not in packing:
        assert [where for _, where in found] == [f"{name}, {place}" for place in PLACES[form]]


def test_several_files_are_read_in_order(tmp_path):
    for name in "ba":
        (tmp_path / f"{name}.csv").write_text(f"text\n{name}\n")
    found = records([tmp_path / "b.csv", str(tmp_path / "a.csv")])
    assert [r.fields["text"] for r in found] == ["b", "a"]


def test_the_line_is_the_one_on_which_a_record_begins(tmp_path):
    content = '\ufefftext,label\r\n"one\r\ntwo",a\r\n\r\nthree,b\r\n"",c\r\n'
    assert read(tmp_path, "a.csv", content) == [
        ({"text": "one\ntwo", "label": "a"}, "a.csv, line 2"),
        ({"text": "three", "label": "b"}, "a.csv, line 5"),
        ({"text": "", "label": "c"}, "a.csv, line 6"),
    ]
    content = '\ufeff\n{"text": "a"}\r\n\r\n{"text": "b"}'
    assert [where for _, where in read(tmp_path, "a.jsonl", content)] == [
        "a.jsonl, line 2",
        "a.jsonl, line 4",
    ]


def test_quotes_are_text_in_tsv_unless_asked_for(tmp_path):
    content = 'text\tlabel\n"so he said\t1\n"a"\t2\n'
    assert [f["text"] for f, _ in read(tmp_path, "a.tsv", content)] == ['"so he said', '"a"']
    content = 'text\tlabel\n"a\tb\nc"\t1\n'
    assert read(tmp_path, "a.tsv", content, quoted=True)[0][0]["text"] == "a\tb\nc"
    assert read(tmp_path, "a.csv", 'text\n"a\nb"\n', quoted=False) == [
        ({"text": '"a'}, "a.csv, line 2"),
        ({"text": 'b"'}, "a.csv, line 3"),
    ]


def test_columns_name_those_of_a_file_without_a_header(tmp_path):
    content = "one, two, three, four\t3,7\tx\n#5; six\t0\ty\n"  # more commas than tabs
    found = read(tmp_path, "a.tsv", content, columns=["text", "labels", "id"])
    assert found[0] == ({"text": "one, two, three, four", "labels": "3,7", "id": "x"}, "a.tsv, line 1")
    assert found[1][0]["text"] == "#5; six"
    assert read(tmp_path, "a.csv", "a; b; c,1\n", columns=["t", "l"]) == [
        ({"t": "a; b; c", "l": "1"}, "a.csv, line 1")
    ]


def test_semicolons_separate_if_the_header_has_them(tmp_path):
    assert read(tmp_path, "a.csv", "text;label\na, b;c\n")[0][0] == {"text": "a, b", "label": "c"}


def test_the_first_bytes_decide_before_the_ending(tmp_path):
    assert read(tmp_path, "a.txt", '{"text": "a"}\n') == [({"text": "a"}, "a.txt, line 1")]
    assert read(tmp_path, "a.csv", parquet(ROWS))[1][0] == ROWS[1]
    assert read(tmp_path, "a.txt", "text\tlabel\na, b\tc\n")[0][0] == {"text": "a, b", "label": "c"}


def test_one_object_over_several_lines_is_a_record(tmp_path):
    content = '\n{\n "train": [],\n "test": []\n}\n'
    assert read(tmp_path, "a.json", content) == [({"train": [], "test": []}, "a.json, line 2")]


def test_broken_rows_are_collected_if_asked_for(tmp_path):
    broken = []
    found = read(tmp_path, "a.tsv", "a\tb\n1\t2\n3\n4\t5\t6\n7\t8\n", broken=broken)
    assert [fields["a"] for fields, _ in found] == ["1", "7"]
    assert broken == [f"{tmp_path}/a.tsv, line 3", f"{tmp_path}/a.tsv, line 4"]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.csv", "a,b\n1,2\n3\n", "a.csv, line 3 must have 2 cells, one per column, got 1"),
        ("a.tsv", "a\tb\n1\t2\t3\n", "a.tsv, line 2 must have 2 cells, one per column, got 3"),
        ("a.csv", 'a,b\n"1\n",2\n3\n', "a.csv, line 4 must have 2 cells, one per column, got 1"),
        ("a.csv", "a,b,a\n1,2,3\n", "a.csv, line 1 must name each column once, got a, b, a"),
        ("a.csv", 'a\nb\n"c\nd\n', "a.csv, line 3: not CSV: unexpected end of data"),
        ("a.csv", 'a\n"b" c\n', "a.csv, line 2: not CSV: ',' expected after '\"'"),
        ("a.csv", "", "a.csv must contain a record, got none"),
        ("a.csv", "a,b\n", "a.csv must contain a record, got none"),
        ("a.json", "", "a.json must contain a record, got none"),
        ("a.json", "[]", "a.json must contain a record, got none"),
        ("a.parquet", parquet([{"a": 1}])[:-9], "a.parquet: damaged after row 0: "),
        ("a.jsonl", '{"a": 1}\n{"a": \n', "a.jsonl, line 2: not JSON: Expecting value; write one object per"),
        ("a.jsonl", '{"a": 1}\n[2]\n', "a.jsonl, line 2 must be a JSON object, got [2]"),
        ("a.jsonl", "7", "a.jsonl, line 1 must be a JSON object, got 7"),
        ("a.json", '[\n{"a": 1}\n{"a": 2}]', "a.json, line 3: not JSON: Expecting ',' delimiter; write one"),
        ("a.json", '[{"a": 1}, 2]', "a.json, record 2 must be a JSON object, got 2"),
        ("a.jsonl", "[" * 100_000, "a.jsonl, line 1: not JSON: "),
        ("a.jsonl", '{"a": 1}\n' + "[" * 100_000, "a.jsonl, line 2: not JSON: "),
        ("a.jsonl", '{"a": ' + "1" * 5000 + "}", "a.jsonl, line 1: not JSON: Exceeds the limit"),
        ("a.csv", b"a\n\xe9\n", "a.csv is not UTF-8 at byte 2 (0xe9); convert it"),
        ("a.txt", "words", "a.txt must be CSV, TSV, JSON or Parquet, got text; if it is CSV or TSV, give it"),
        ("a.csv", b"%PDF-1.7\n", "a.csv is a PDF document; extract its text"),
        ("a.csv.gz", gzip.compress(b"a\n" * 9, mtime=0)[:-9], "a.csv.gz: damaged after byte 0"),
        ("a.tar", tar_of({"a.conll": b"a\n"}), "a.tar must contain a record, got none"),
    ],
)
def test_the_error_names_the_file_and_the_line(tmp_path, name, content, message):
    assert error_of(tmp_path, name, content).startswith(message)


def test_files_that_are_not_there_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.csv must be a regular file, got nothing there"):
        list(records([tmp_path / "none.csv"]))
    with pytest.raises(ValueError, match=r"must be a regular file, got a folder"):
        list(records([tmp_path]))


def test_columns_are_found_by_name():
    found = [Record({"a": 1, "b": 2}, "x, y.csv, line 2"), Record({"b": 3, "c": 4}, "x, y.csv, line 3")]
    assert known(found, ("c", "a")) == "c" and known(found, ("d",)) is None
    assert named(found, ("d", "b")) == "b"
    message = r"^x, y\.csv must have a column 'text', got a, b; name it with --text$"
    with pytest.raises(ValueError, match=message):
        named(found, ("text", "d"), "--text")
    assert column(found[1], "c") == 4
    message = r"^x, y\.csv, line 3 must have a column 'a', got b, c; name it with --text$"
    with pytest.raises(ValueError, match=message):
        column(found[1], "a", "--text")
    with pytest.raises(ValueError, match=r"must have a column 'a', got b, c$"):
        column(found[1], "a")


@pytest.mark.parametrize(
    "of, value, message",
    [
        (string, None, "x: a must be a string, got None"),
        (string, 3, "x: a must be a string, got 3"),
        (string, " \n", r"x: a must not be empty, got ' \\n'"),
        (string, "b\ud83cc", r"x: a must be Unicode, got \\ud83c, half of a surrogate pair"),
        (strings, "b c", "x: a must be a list of strings, got 'b c'"),
        (strings, ["b", ""], r"x: a\[1\] must not be empty, got ''"),
        (number, "three", "x: a must be a finite number, got 'three'"),
        (number, "1_000", "x: a must be a finite number, got '1_000'"),
        (number, "nan", "x: a must be a finite number, got 'nan'"),
        (number, float("inf"), "x: a must be a finite number, got inf"),
        (number, 10**400, "x: a must be a finite number, got 1000"),
        (number, True, "x: a must be a finite number, got True"),
        (number, [1], r"x: a must be a finite number, got \[1\]"),
    ],
)
def test_values_of_another_kind_are_refused(of, value, message):
    with pytest.raises(ValueError, match=message):
        of("x", "a", value)


def test_values_are_returned():
    assert string("x", "a", " b") == " b"
    assert strings("x", "a", ["b", "c"]) == ["b", "c"] and strings("x", "a", []) == []
    assert number("x", "a", " 3.5 ") == 3.5 and number("x", "a", 2) == 2.0
