"""Texts, choices and candidates from files as people have them, and the errors about their contents."""

import json

import pytest
from text_files import parquet

from electra_fast.tasks.items import Candidates, Choice, Text
from electra_fast.tasks.readers import candidates, choices, texts

CLINC150 = {
    "oos_val": [["a show", "oos"]],
    "val": [["hi", "greet"]],
    "train": [["hello", "greet"], ["bye", "leave"]],
    "oos_train": [["who won", "oos"]],
    "test": [["good bye", "leave"]],
}


def jsonl(*rows) -> str:
    return "".join(f"{json.dumps(row)}\n" for row in rows)


@pytest.fixture
def file(tmp_path, monkeypatch):
    """Writes a file into the current folder and returns a list with its name."""
    monkeypatch.chdir(tmp_path)

    def write(name: str, content: str | bytes) -> list[str]:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return [name]

    return write


def test_texts_of_csv(file):
    """Banking77's form: CRLF, quoted newlines, and the label in `category`."""
    paths = file("a.csv", 'text,category\r\nHow?,card_arrival\r\n"When,\r\nhow?",top_up \r\n')
    assert texts(paths) == [
        Text("How?", None, "card_arrival", "a.csv, line 2"),
        Text("When,\nhow?", None, "top_up", "a.csv, line 3"),
    ]


@pytest.mark.parametrize("name", ["text", "sentence", "utterance", "query", "question"])
@pytest.mark.parametrize("label", ["label", "category", "intent", "labels", "emotion"])
def test_columns_are_found_by_their_usual_names(file, name, label):
    paths = file("a.csv", f"id,{name},{label}\n7,words,x\n")
    assert texts(paths) == [Text("words", None, "x", "a.csv, line 2")]


def test_named_columns_are_used(file):
    paths = file("a.csv", "text,label,a,b,c\n1,2,first,second,x\n")
    assert texts(paths, text="a", pair="b", label="c") == [Text("first", "second", "x", "a.csv, line 2")]


def test_several_labels_in_a_cell(file):
    """GoEmotions' form: TSV without a header."""
    paths = file("a.tsv", 'He said "no, no, no"\t3,7\tx\nWhat?\t27\ty\n')
    assert texts(paths, columns=["text", "labels", "id"], separator=",") == [
        Text('He said "no, no, no"', None, ["3", "7"], "a.tsv, line 1"),
        Text("What?", None, ["27"], "a.tsv, line 2"),
    ]


def test_labels_of_json_and_parquet(file):
    paths = file("a.jsonl", jsonl({"text": "a", "label": 3}, {"text": "b", "label": True}))
    assert [item.label for item in texts(paths)] == ["3", "True"]
    rows = [{"text": "a", "labels": ["x", "y"]}, {"text": "b", "labels": []}]
    for paths in (file("b.jsonl", jsonl(*rows)), file("b.parquet", parquet(rows))):
        assert [item.label for item in texts(paths)] == [["x", "y"], []]


def test_without_a_column_of_labels_they_are_unknown(file):
    paths = file("a.csv", "text,other\na,b\n")
    assert texts(paths) == texts(paths, score=True) == [Text("a", None, None, "a.csv, line 2")]


def test_scores_become_floats(file):
    paths = file("a.csv", "text,label,score\na,x,0.5\nb,y,3\n")
    assert [item.label for item in texts(paths, score=True)] == [0.5, 3.0]
    assert [item.label for item in texts(paths)] == ["x", "y"]
    paths = file("a.jsonl", jsonl({"text": "a", "label": 4}, {"text": "b", "label": 1.25}))
    assert [item.label for item in texts(paths, score=True)] == [4.0, 1.25]


def test_integers_are_labels(file):
    assert [t.label for t in texts(file("a.csv", "text,label\na,-1\nb,+2\n"))] == ["-1", "+2"]
    assert [t.label for t in texts(file("a.csv", "text,label\na,0.5\nb,half\n"))] == ["0.5", "half"]


@pytest.mark.parametrize("indent", [None, 1])
def test_clinc150_has_all_splits_in_a_file(file, indent):
    paths = file("c.json", json.dumps(CLINC150, indent=indent))
    assert texts(paths) == [
        Text("hello", None, "greet", "c.json, text 1 of train"),
        Text("bye", None, "leave", "c.json, text 2 of train"),
        Text("who won", None, "oos", "c.json, text 1 of oos_train"),
    ]
    assert [(t.text, t.label) for t in texts(paths, role="dev")] == [("hi", "greet"), ("a show", "oos")]
    assert [(t.text, t.label) for t in texts(paths, role="test")] == [("good bye", "leave")]


@pytest.mark.parametrize(
    "name, content, options, message",
    [
        ("a.csv", "a,b,c\n1,2,3\n", {}, "a.csv must have a column 'text', got a, b, c; name it with --text"),
        ("a.csv", "a,b\n1,2\n", {"text": "x"}, "a.csv must have a column 'x', got a, b; name it with --text"),
        (
            "a.csv",
            "text,b\n1,2\n",
            {"label": "x"},
            "a.csv must have a column 'x', got text, b; name it with --label",
        ),
        (
            "a.csv",
            "text\n1\n",
            {"pair": "x"},
            "a.csv, line 2 must have a column 'x', got text; name it with --pair",
        ),
        (
            "a.jsonl",
            jsonl({"text": "a"}, {"txt": "b"}),
            {},
            "a.jsonl, line 2 must have a column 'text', got txt; name it with --text",
        ),
        (
            "a.jsonl",
            jsonl({"text": "a"}, {"text": "b", "label": "x"}),
            {},
            "a.jsonl, line 1 must have a column 'label', got text; name it with --label",
        ),
        ("a.csv", 'text,label\na,x\n" ",y\n', {}, "a.csv, line 3: text must not be empty, got ' '"),
        ("a.csv", "text,p\na,\n", {"pair": "p"}, "a.csv, line 2: p must not be empty, got ''"),
        ("a.csv", "text,label\na,x\nb,\n", {}, "a.csv, line 3: label must not be empty, got ''"),
        (
            "a.csv",
            'text,label\na,"3,"\n',
            {"separator": ","},
            "a.csv, line 2: label must not be empty, got ''",
        ),
        ("a.jsonl", jsonl({"text": 3}), {}, "a.jsonl, line 1: text must be a string, got 3"),
        (
            "a.jsonl",
            jsonl({"text": "a", "label": None}),
            {},
            "a.jsonl, line 1: label must be a string, got None",
        ),
        (
            "a.jsonl",
            jsonl({"text": "a", "label": [{}]}),
            {},
            "a.jsonl, line 1: label must be a string, got {}",
        ),
        (
            "a.jsonl",
            jsonl({"text": "a", "label": ["x"]}, {"text": "b", "label": "y"}),
            {},
            "a.jsonl, line 2: the label must be a list, as in other records, got 'y'",
        ),
        (
            "a.csv",
            "text,score\na,1\nb,good\n",
            {"score": True},
            "a.csv, line 3: score must be a finite number, got 'good'",
        ),
        (
            "a.csv",
            "text,score\na,inf\n",
            {"score": True},
            "a.csv, line 2: score must be a finite number, got 'inf'",
        ),
        (
            "a.jsonl",
            jsonl({"text": "a", "label": 1.0}),
            {},
            "a.jsonl, line 1: label must not be a float for classify, got 1.0; use regress for scores",
        ),
        (
            "a.csv",
            "text,label\na,3\nb,0.5\n",
            {},
            "a.csv, line 3: the label must not be a float for classify, got 0.5; use regress for scores",
        ),
        (
            "c.json",
            json.dumps({"train": [["a", "b"]]}),
            {"role": "dev"},
            "c.json must contain texts under 'val', got train",
        ),
        (
            "c.json",
            json.dumps({"train": [["a"]]}),
            {},
            "c.json, text 1 of train must be a list of a text and a label, got ['a']",
        ),
        (
            "c.json",
            json.dumps({"train": [["", "a"]]}),
            {},
            "c.json, text 1 of train: text must not be empty, got ''",
        ),
        ("a.csv", "text\na\n", {"role": "val"}, "texts: role must be one of train, dev, test, got 'val'"),
    ],
)
def test_the_error_about_a_text_names_the_line(file, name, content, options, message):
    with pytest.raises(ValueError) as raised:
        texts(file(name, content), **options)
    assert str(raised.value) == message


def test_a_column_that_only_the_first_file_has_is_missed_in_the_second(file):
    paths = file("a.csv", "text,label\na,x\n") + file("b.csv", "text,other\nb,y\n")
    with pytest.raises(
        ValueError, match=r"^b\.csv, line 2 must have a column 'label', got text, other; name"
    ):
        texts(paths)


def test_choices_of_swag(file):
    header = ",video-id,fold-ind,startphrase,sent1,sent2,gold-source,ending0,ending1,ending2,ending3,label"
    paths = file("a.csv", f'{header}\n0,v,1,"She opens, and",She opens,and,gold,a,b,c,d,2\n')
    assert choices(paths) == [Choice("She opens, and", ["a", "b", "c", "d"], 2, "a.csv, line 2")]


def test_choices_of_hellaswag_and_of_the_general_form(file):
    row = {"ind": 4, "ctx_a": "A man", "ctx": "A man runs. He", "endings": ["a", "b", "c"], "label": 1}
    expected = [Choice("A man runs. He", ["a", "b", "c"], 1, "a.jsonl, line 1")]
    assert choices(file("a.jsonl", jsonl(row))) == expected
    assert choices(file("a.jsonl", jsonl(row | {"label": "1"}))) == expected
    rows = [
        {"prompt": "p", "options": ["a", "b"], "label": 0},
        {"prompt": "q", "options": ["c", "d", "e"], "label": 2},
    ]
    assert choices(file("a.parquet", parquet(rows))) == [
        Choice("p", ["a", "b"], 0, "a.parquet, row 1"),
        Choice("q", ["c", "d", "e"], 2, "a.parquet, row 2"),
    ]
    assert choices(file("a.jsonl", jsonl({"prompt": "p", "options": ["a", "b"]})))[0].label is None


@pytest.mark.parametrize(
    "row, message",
    [
        ({"x": "p", "options": []}, "a.jsonl must have a column 'prompt', got x, options"),
        ({"prompt": "p"}, "a.jsonl must have a column 'options', got prompt"),
        ({"prompt": "p", "options": ["a"]}, "a.jsonl, line 1 must have 2 or more options, got 1"),
        (
            {"prompt": "p", "ending0": "a", "ending2": "c"},
            "a.jsonl, line 1 must have 2 or more options, got 1",
        ),
        ({"prompt": "p", "options": "ab"}, "a.jsonl, line 1: options must be a list of strings, got 'ab'"),
        ({"prompt": "p", "options": ["a", ""]}, "a.jsonl, line 1: options[1] must not be empty, got ''"),
        (
            {"prompt": "p", "ending0": "a", "ending1": ""},
            "a.jsonl, line 1: ending1 must not be empty, got ''",
        ),
        ({"prompt": "", "options": ["a", "b"]}, "a.jsonl, line 1: prompt must not be empty, got ''"),
    ],
)
def test_the_error_about_a_choice_names_the_line(file, row, message):
    with pytest.raises(ValueError) as raised:
        choices(file("a.jsonl", jsonl(row)))
    assert str(raised.value) == message


@pytest.mark.parametrize("label", [2, -1, "B", "", None, True, 1.0])
def test_the_label_of_a_choice_is_the_number_of_an_option(file, label):
    paths = file("a.jsonl", jsonl({"prompt": "p", "options": ["a", "b"], "label": label}))
    with pytest.raises(ValueError) as raised:
        choices(paths)
    rule = "a.jsonl, line 1: label must be the number of an option, 0 to 1, got"
    assert str(raised.value) == f"{rule} {label!r}"


def test_candidates_of_rows_are_grouped_by_their_query(file):
    paths = file("a.tsv", "query\tpassage\tlabel\nq\ta\t0\nr\tb\t1\nq\tc\t2.5\n")
    expected = [
        Candidates("q", ["a", "c"], [0.0, 2.5], "a.tsv, line 2"),
        Candidates("r", ["b"], [1.0], "a.tsv, line 3"),
    ]
    assert candidates(paths) == expected
    assert candidates(file("b.tsv", "query\tdocument\nq\ta\n")) == [
        Candidates("q", ["a"], None, "b.tsv, line 2")
    ]


def test_candidates_of_rows_are_grouped_by_their_id(file):
    paths = file("a.csv", "qid,question,candidate,relevance\n1,q,a,1\n2,q,b,0\n1,q,c,0\n")
    assert candidates(paths) == [
        Candidates("q", ["a", "c"], [1.0, 0.0], "a.csv, line 2"),
        Candidates("q", ["b"], [0.0], "a.csv, line 3"),
    ]


def test_candidates_of_one_record_per_query(file):
    objects = {"query": "q", "candidates": [{"text": "a", "relevance": 1}, {"text": "b", "relevance": 0}]}
    strings = {"query": "q", "candidates": ["a", "b"], "relevance": [1, 0]}
    for row in (objects, strings):
        paths = file("a.jsonl", jsonl(row, row))  # The same query twice is not grouped.
        assert candidates(paths) == [
            Candidates("q", ["a", "b"], [1.0, 0.0], f"a.jsonl, line {line}") for line in (1, 2)
        ]
    paths = file("a.jsonl", jsonl({"query": "q", "candidates": ["a", "b"]}))
    assert candidates(paths) == [Candidates("q", ["a", "b"], None, "a.jsonl, line 1")]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.csv", "a,b\n1,2\n", "a.csv must have a column 'query', got a, b"),
        ("a.csv", "query,b\n1,2\n", "a.csv must have a column 'candidate', got query, b"),
        ("a.csv", "query,passage\nq,a\n,b\n", "a.csv, line 3: query must not be empty, got ''"),
        ("a.csv", "query,passage\nq,a\nq,\n", "a.csv, line 3: passage must not be empty, got ''"),
        ("a.csv", "query,passage,label\nq,a,x\n", "a.csv, line 2: label must be a finite number, got 'x'"),
        ("a.csv", "query,passage,label\nq,a,-1\n", "a.csv, line 2: label must be 0 or more, got -1.0"),
        (
            "a.csv",
            "qid,query,passage\n1,q,a\n1,r,b\n",
            "a.csv, line 3 must have the query of a.csv, line 2, which has the same id, 'q', got 'r'",
        ),
        (
            "a.jsonl",
            jsonl({"query": "q", "candidates": ["a"]}, {"query": "r"}),
            "a.jsonl, line 2 must have a column 'candidates', got query",
        ),
        (
            "a.jsonl",
            jsonl({"query": "q", "candidates": []}),
            "a.jsonl, line 1: candidates must be a list that is not empty, got []",
        ),
        (
            "a.jsonl",
            jsonl({"query": "q", "candidates": [3]}),
            "a.jsonl, line 1: text must be a string, got 3",
        ),
        (
            "a.jsonl",
            jsonl({"query": "q", "candidates": ["a"], "relevance": [1, 2]}),
            "a.jsonl, line 1: relevance must have one number per candidate, got [1, 2]",
        ),
        (
            "a.jsonl",
            jsonl({"query": "q", "candidates": [{"text": "a", "relevance": 1}, {"text": "b"}]}),
            "a.jsonl, line 1 must have a column 'relevance', got text, query",
        ),
    ],
)
def test_the_error_about_candidates_names_the_line(file, name, content, message):
    with pytest.raises(ValueError) as raised:
        candidates(file(name, content))
    assert str(raised.value) == message


@pytest.mark.parametrize("of", [texts, choices, candidates])
def test_a_file_without_records_is_an_error(file, of):
    for content in ("", "text,label\n"):
        with pytest.raises(ValueError, match=r"^a\.csv must contain a record, got none$"):
            of(file("a.csv", content))
