"""Tagged sentences of CoNLL's files, utterances of SNIPS, both of JSON, and the errors about them."""

import gzip
import json

import pytest
from text_files import parquet, tar_of

from electra_fast.tasks.items import Tagged, Utterance
from electra_fast.tasks.tagged import tagged, utterances

PLAY = [{"text": "Play "}, {"text": "Like A", "entity": "album"}, {"text": ", now"}]


def jsonl(*rows) -> str:
    return "".join(f"{json.dumps(row)}\n" for row in rows)


def snips(*utterances, intent="PlayMusic", **options) -> str:
    return json.dumps({intent: [{"data": parts} for parts in utterances]}, **options)


@pytest.fixture
def file(tmp_path, monkeypatch):
    """Writes a file into the current folder and returns a list with its name."""
    monkeypatch.chdir(tmp_path)

    def write(name: str, content: str | bytes) -> list[str]:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return [name]

    return write


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_sentences_of_wnut17(file, end):
    """Tabs, and a line with only a tab between two sentences; "#" is a word."""
    content = end.join(
        ["#\tO", "Empire\tB-location", "State\tI-location", "\t", "", "from\tO", "#NFL\tB-group"]
    )
    expected = [
        Tagged(["#", "Empire", "State"], ["O", "B-location", "I-location"], "a.conll, line 1"),
        Tagged(["from", "#NFL"], ["O", "B-group"], "a.conll, line 6"),
    ]
    assert tagged(file("a.conll", content)) == tagged(file("a.conll", content + end + end)) == expected
    packed = tagged(file("a.conll.gz", gzip.compress(content.encode())))
    assert [s.tags for s in packed] == [s.tags for s in expected]


def test_sentences_of_conll_2003(file):
    """Blanks, several columns, -DOCSTART- and comments; "#" is a word here too."""
    first = "# text = An O\n-DOCSTART- -X- O O\n\nEU NNP B-NP B-ORG\n# # I-NP O\n# newdoc id = 3\n"
    content = first + "-DOCSTART- -X- O O\na DT O O\n"
    assert tagged(file("a.txt", content)) == [
        Tagged(["EU", "#"], ["B-ORG", "O"], "a.txt, line 4"),
        Tagged(["a"], ["O"], "a.txt, line 8"),
    ]
    assert tagged(file("b.txt", content), column=2)[0].tags == ["B-NP", "I-NP"]
    assert tagged(file("c.txt", "# O\n# an O\nb  B-x\n"))[0].words == ["#", "b"]


def test_sentences_of_litbank(file):
    """One column per level of nesting, a tab at the end of each line, and a tar of files."""
    content = b"Lord\tB-PER\tB-PER\tO\t\nChancellor\tO\tI-PER\tO\t\n"
    paths = file("a.tar", tar_of({"x/a.tsv": content, "x/b.tsv": content}))
    expected = [
        Tagged(["Lord", "Chancellor"], ["B-PER", "O"], f"a.tar/x/{name}.tsv, line 1") for name in "ab"
    ]
    assert tagged(paths, column=1) == expected
    assert tagged(paths)[0].tags == ["O", "O"]


def test_sentences_of_records(file):
    rows = [{"tokens": ["New", "York"], "tags": ["B-x", "I-x"]}, {"tokens": ["a"], "tags": ["O"]}]
    for name, content, place in (("a.jsonl", jsonl(*rows), "line"), ("a.parquet", parquet(rows), "row")):
        assert tagged(file(name, content)) == [
            Tagged(["New", "York"], ["B-x", "I-x"], f"{name}, {place} 1"),
            Tagged(["a"], ["O"], f"{name}, {place} 2"),
        ]
    assert tagged(file("a.jsonl", jsonl({"tokens": ["a"]}))) == [Tagged(["a"], None, "a.jsonl, line 1")]


def test_iob1_is_converted_and_counted_if_asked_for(file):
    content = "a I-x\nb I-x\nc B-x\nd I-y\n\ne I-y\nf O\ng I-x\n"
    with pytest.warns(UserWarning, match=r"^4 tags I-x that began an entity became B-x$"):
        found = tagged(file("a.conll", content), repair=True)
    assert [s.tags for s in found] == [["B-x", "I-x", "B-x", "B-y"], ["B-y", "O", "B-x"]]
    rows = {"text": "a b", "intent": "i", "slots": ["I-x", "I-x"]}
    with pytest.warns(UserWarning, match=r"^1 tags"):
        assert utterances(file("a.jsonl", jsonl(rows)), repair=True)[0].slots == ["B-x", "I-x"]
    assert tagged(file("b.conll", "a B-x\nb I-x\n"), repair=True)[0].tags == ["B-x", "I-x"]  # no warning


@pytest.mark.parametrize(
    "content, message",
    [
        (
            "a O\nb I-x\n",
            "a.conll, line 2: I-x must follow B-x or I-x, got O; "
            "change line 2 to B-x, or convert IOB1 with --repair",
        ),
        (
            "a B-x\nb I-y\n",
            "a.conll, line 2: I-y must follow B-y or I-y, got B-x; "
            "change line 2 to B-y, or convert IOB1 with --repair",
        ),
        (
            "a B-x\n\nb I-x\n",
            "a.conll, line 3: I-x must follow B-x or I-x, got the start of the sentence; "
            "change line 3 to B-x, or convert IOB1 with --repair",
        ),
        ("a O\nb S-x\n", "a.conll, line 2: the tag must be O, B-type or I-type, got 'S-x'"),
        ("a O\nb B-\n", "a.conll, line 2: the tag must be O, B-type or I-type, got 'B-'"),
        ("a\tO\nb\t\n", "a.conll, line 2 must have a word and a tag, got 'b'"),
        ("a\tO\nb\n", "a.conll, line 2 must have a word and a tag, got 'b'"),
        ("a\tO\n\tO\n", "a.conll, line 2: the word must not be empty, got ''"),
        ("a\tO\n O\n", "a.conll, line 2: the word must not be empty, got ''"),
        ("a\tO\tO\nb\t\tO\nc\tO\n", "a.conll, line 3 must have 3 columns, as the lines before it, got 2"),
        ("", "a.conll must contain a sentence, got none"),
        ("# only a comment\n\n", "a.conll must contain a sentence, got none"),
    ],
)
def test_the_error_about_a_tag_names_the_line(file, content, message):
    with pytest.raises(ValueError) as raised:
        tagged(file("a.conll", content))
    assert str(raised.value) == message


def test_the_column_of_the_tags_must_exist(file):
    message = r"^a\.conll, line 1 must have a column 2, got 2 columns, of which the first is 0$"
    with pytest.raises(ValueError, match=message):
        tagged(file("a.conll", "a\tO\n"), column=2)
    with pytest.raises(ValueError, match=r"^a\.conll, line 1: the tag must not be empty, got ''$"):
        tagged(file("a.conll", "a\t\tO\n"), column=1)


@pytest.mark.parametrize(
    "row, message",
    [
        ({"text": "a"}, "a.jsonl, line 1 must have a column 'tokens', got text"),
        ({"tokens": []}, "a.jsonl, line 1 must have a word, got none"),
        ({"tokens": ["a", ""]}, "a.jsonl, line 1: words[1] must not be empty, got ''"),
        ({"tokens": ["a"], "tags": [3]}, "a.jsonl, line 1: tags[0] must be a string, got 3"),
        (
            {"tokens": ["a", "b"], "tags": ["O"]},
            "a.jsonl, line 1 must have one tag per word, got 1 tags for 2 words",
        ),
        (
            {"tokens": ["a", "b"], "tags": ["O", "I-x"]},
            "a.jsonl, line 1, word 2: I-x must follow B-x or I-x, got O; "
            "change word 2 to B-x, or convert IOB1 with --repair",
        ),
    ],
)
def test_the_error_about_a_tagged_record_names_the_line(file, row, message):
    with pytest.raises(ValueError) as raised:
        tagged(file("a.jsonl", jsonl(row)))
    assert str(raised.value) == message


@pytest.mark.parametrize("indent", [None, 2])
def test_utterances_of_snips(file, indent):
    paths = file("a.json", snips(PLAY, [{"text": "Stop"}], indent=indent))
    paths += file("b.json.gz", gzip.compress(snips([{"text": "hi"}], intent="Greet").encode()))
    assert utterances(paths) == [
        Utterance(
            ["Play", "Like", "A", ",", "now"],
            "PlayMusic",
            ["O", "B-album", "I-album", "O", "O"],
            "a.json, utterance 1 of PlayMusic",
        ),
        Utterance(["Stop"], "PlayMusic", ["O"], "a.json, utterance 2 of PlayMusic"),
        Utterance(["hi"], "Greet", ["O"], "b.json.gz, utterance 1 of Greet"),
    ]


def test_a_span_that_ends_inside_a_word_splits_it(file):
    parts = [
        {"text": "x"},
        {"text": "Blues ", "entity": "album"},
        {"text": "Queen", "entity": "artist"},
        {"text": "'s"},
    ]
    found = utterances(file("a.json", snips(parts)))[0]
    assert found.words == ["x", "Blues", "Queen", "'s"]
    assert found.slots == ["O", "B-album", "B-artist", "O"]


def test_bytes_that_are_not_utf8_are_decoded_and_counted(file):
    """SNIPS has U+1F355 as two surrogates of three bytes each; other bytes are taken for Latin-1."""
    content = snips([{"text": "Grüße PIZZA, BYTE"}], ensure_ascii=False).encode()
    pizza = "\ud83c\udf55".encode("utf-8", "surrogatepass")
    first = file("a.json", b"\xef\xbb\xbf" + content.replace(b"PIZZA", pizza).replace(b"BYTE", b"caf\xe9"))
    second = file("b.json", content.replace(b"BYTE", b"\xed\xa0\xbc"))
    message = r"^a\.json, b\.json: 10 bytes that are not UTF-8 were decoded as surrogates or Latin-1$"
    with pytest.warns(UserWarning, match=message):
        found = utterances(first + second)
    assert found[0].words == ["Grüße", "🍕,", "café"]
    assert found[1].words == ["Grüße", "PIZZA,", "í", "¼"]  # Latin-1's byte a0 is a blank.


def test_utterances_of_records(file):
    text = {"text": "play  the Blues", "intent": "Play", "slots": ["O", "O", "B-album"]}
    words = {"words": ["play", "the", "Blues"], "intent": "Play", "slots": ["O", "O", "B-album"]}
    expected = [Utterance(["play", "the", "Blues"], "Play", ["O", "O", "B-album"], "a.jsonl, line 1")]
    assert utterances(file("a.jsonl", jsonl(text))) == utterances(file("a.jsonl", jsonl(words))) == expected
    assert utterances(file("a.jsonl", jsonl({"text": "hi"}))) == [
        Utterance(["hi"], None, None, "a.jsonl, line 1")
    ]
    assert utterances(file("a.csv", "text,intent\nhi you,Greet\n")) == [
        Utterance(["hi", "you"], "Greet", None, "a.csv, line 2")
    ]


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "a.json must contain an utterance, got none"),
        ('{"Play": []}', "a.json, line 1 must have a column 'text', got Play"),
        (
            '{"Play": [{"data": [{"text": "a"}]}, 3]}',
            "a.json, utterance 2 of Play must be a list of parts with a text under 'data', got 3",
        ),
        (
            '{"Play": [{"data": [{"txt": "a"}]}]}',
            "a.json, utterance 1 of Play must be a list of parts with a text under 'data', "
            "got {'data': [{'txt': 'a'}]}",
        ),
        (snips([{"text": " "}], intent="Play"), "a.json, utterance 1 of Play must have a word, got none"),
        (
            snips([{"text": "a", "entity": "my type"}], intent="Play"),
            "a.json, utterance 1 of Play, word 1: the tag must be O, B-type or I-type, got 'B-my type'",
        ),
        (snips([{"text": "a"}], intent=" "), "a.json, utterance 1 of  : intent must not be empty, got ' '"),
        (
            snips([{"text": "\ud83c"}], intent="Play"),
            "a.json, utterance 1 of Play: words[0] must be Unicode, got \\ud83c, half of a surrogate pair",
        ),
        (jsonl({"text": ""}), "a.json, line 1: text must not be empty, got ''"),
        (jsonl({"text": "a", "intent": None}), "a.json, line 1: intent must be a string, got None"),
        (
            jsonl({"text": "a b", "slots": ["O"]}),
            "a.json, line 1 must have one tag per word, got 1 tags for 2 words",
        ),
        (jsonl({"text": "a", "slots": "O"}), "a.json, line 1: tags must be a list of strings, got 'O'"),
        (
            '{"Play": \n',
            "a.json, line 1: not JSON: Expecting value; write one object per line, or one array of objects",
        ),
    ],
)
def test_the_error_about_an_utterance_names_its_place(file, content, message):
    with pytest.raises(ValueError) as raised:
        utterances(file("a.json", content))
    assert str(raised.value) == message
