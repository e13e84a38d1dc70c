"""Questions of SQuAD's files, their windows, and the spans that logits choose."""

import gzip
import json
import lzma
import re
import string

import numpy as np
import pytest

from electra_fast.data import load_tokenizer
from electra_fast.tasks.items import Answer, Question
from electra_fast.tasks.spans import Prediction, best_spans
from electra_fast.tasks.squad_files import questions
from electra_fast.tasks.windows import Window, all_windows, windows

CONTEXT = "The Ohre rises in Bavaria. It ends in the Elbe, near Litoměřice."


def record(name="q1", answers=(("Bavaria", 18),), **more):
    answers = [{"text": text, "answer_start": start} for text, start in answers]
    return {"id": name, "question": "Where?", "answers": answers} | more


def squad(*records, context=CONTEXT):
    return {
        "version": "v2.0",
        "data": [{"title": "Ohre", "paragraphs": [{"context": context, "qas": records}]}],
    }


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
    return path


# The reader.


def test_questions_of_squad_1_and_2(tmp_path):
    impossible = record("q2", (), is_impossible=True, plausible_answers=[{"text": "Elbe", "answer_start": 0}])
    possible = record("q3", (("Elbe", 42), ("the Elbe", 38)), is_impossible=False)
    one = write(tmp_path / "one.json", squad(record()))
    two = write(tmp_path / "two.json", squad(impossible, possible))
    at = "article 1, paragraph 1, question"
    assert questions([one, two]) == [
        Question("q1", "Where?", CONTEXT, [Answer("Bavaria", 18)], f"{one}, {at} 'q1'"),
        Question("q2", "Where?", CONTEXT, [], f"{two}, {at} 'q2'"),
        Question("q3", "Where?", CONTEXT, [Answer("Elbe", 42), Answer("the Elbe", 38)], f"{two}, {at} 'q3'"),
    ]


def test_packed_files_contain_the_same_questions(tmp_path):
    text = json.dumps(squad(record()), indent=1).encode()
    found = []
    for name, packed in (
        ("a.json", text),
        ("a.json.gz", gzip.compress(text)),
        ("a.json.xz", lzma.compress(text)),
    ):
        (tmp_path / name).write_bytes(packed)
        found += [question._replace(where="") for question in questions([tmp_path / name])]
    assert len(found) == 3 and found[0] == found[1] == found[2]


def test_without_any_answers_they_are_unknown(tmp_path):
    plain = {"id": "q1", "question": "Where?"}
    assert [q.answers for q in questions([write(tmp_path / "a.json", squad(plain))])] == [None]
    path = write(tmp_path / "b.json", squad(record("q0"), plain))
    with pytest.raises(ValueError, match=r"question 'q1' must be a JSON object with 'answers'"):
        questions([path])


def test_half_of_a_surrogate_pair_is_replaced(tmp_path):
    path = tmp_path / "a.json"
    found = questions([write(path, squad(record(answers=[("\ud83d b", 2)]), context="a \ud83d b"))])
    assert found[0].context == "a \ufffd b" and found[0].answers == [Answer("\ufffd b", 2)]


BAD = [
    (
        squad(record(answers=[("Bavaria", 17)])),
        "{a1}: 'Bavaria' must be in the context at character 17, got it at 18",
    ),
    (squad(record(answers=[("in", 33)])), "{a1}: 'in' must be in the context at character 33, got it at 35"),
    (
        squad(record(answers=[("Elbe", -22)])),
        "{a1}: 'Elbe' must be in the context at character -22, got it at 42",
    ),
    (
        squad(record(answers=[("Rhine", 4)])),
        "{a1}: 'Rhine' must be in the context at character 4, got a text that does",
    ),
    (squad(record(answers=[(" ", 3)])), "{a1}: 'text' must contain text, got ' '"),
    (squad(record(answers=[("The", True)])), "{a1}: 'answer_start' must be an integer, got True"),
    (
        squad(record(is_impossible=True)),
        "{q1}: 'is_impossible' must be true exactly if there are no answers, got true",
    ),
    (
        squad(record(answers=[], is_impossible=False)),
        "{q1}: 'is_impossible' must be true exactly if there are no",
    ),
    (squad(record(is_impossible=1)), "{q1}: 'is_impossible' must be true or false, got 1"),
    (squad(record(), record("q2"), record()), "{q1}: this id is already that of {q1}"),
    (squad(record(), context=" \n"), "{p1}: 'context' must contain text, got ' \\n'"),
    (squad({"question": "?"}), "{p1}, question 1 must be a JSON object with 'id', got {{'question'"),
    (squad({"id": 7}), "{p1}, question 1: 'id' must be a string, got 7"),
    (squad({"id": "q1"}), "{q1} must be a JSON object with 'question'"),
    ({"data": [{"paragraphs": 3}]}, "{path}, article 1: 'paragraphs' must be a list, got 3"),
    ({"data": []}, "{path} must contain a question, got none"),
    ([], "{path} must be a JSON object with 'data', got []"),
    ("{", "{path}: not JSON: Expecting property name"),
    ("[" * 100_000, "{path}: not JSON: "),
]


@pytest.mark.parametrize("content, message", BAD, ids=range(len(BAD)))
def test_a_bad_file_is_one_sentence(tmp_path, content, message):
    path = write(tmp_path / "dev.json", content)
    names = {"path": path, "p1": f"{path}, article 1, paragraph 1"}
    names["q1"] = f"{names['p1']}, question 'q1'"
    names["a1"] = f"{names['q1']}, answer 1"
    with pytest.raises(ValueError, match="^" + re.escape(message.format(**names))):
        questions([path])


def test_a_file_that_is_missing_or_damaged(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"dev\.json must be a regular file, got nothing there"):
        questions([tmp_path / "dev.json"])
    (tmp_path / "dev.json.xz").write_bytes(lzma.compress(json.dumps(squad(record())).encode())[:-20])
    with pytest.raises(ValueError, match=r"dev\.json\.xz: damaged"):
        questions([tmp_path / "dev.json.xz"])


# Windows.


@pytest.fixture(scope="module", params=["uncased", "cased"])
def tokenizer(request, tmp_path_factory):
    pytest.importorskip("tokenizers")
    letters = [*string.ascii_letters, *string.digits, "é", "\u0301"]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *string.punctuation, *letters]
    path = tmp_path_factory.mktemp("vocab") / "vocab.txt"
    path.write_text("\n".join([*pieces, *(f"##{letter}" for letter in letters)]), "utf-8")
    return load_tokenizer(path, special_ids=None, lowercase=request.param == "uncased")


def ask(context, answer=None, question="who ?"):
    answers = None if answer is None else [Answer(answer, context.index(answer))]
    return Question("q", question, context, answers, "dev.json, question 'q'")


def words(count):
    return " ".join(string.ascii_lowercase[i % 26] for i in range(count))


def test_a_short_context_is_one_window(tokenizer):
    (window,) = windows(ask("ab c.", "c"), tokenizer)
    tokens = ["[CLS]", "w", "##h", "##o", "?", "[SEP]", "a", "##b", "c", ".", "[SEP]"]
    assert [tokenizer.id_to_token(i) for i in window.ids] == tokens and window.ids.dtype == np.int32
    assert window.context == 6 and (window.start, window.end) == (8, 8)
    assert window.spans.tolist() == [[0, 1], [1, 2], [3, 4], [4, 5]] and window.spans.dtype == np.int32
    assert window.best.all()


def test_pieces_and_maximum_context(tokenizer):
    # 9 tokens of context fit: pieces 0 … 9, 4 … 13, 8 … 16.
    found = windows(ask(words(16), question="?"), tokenizer, max_len=13, stride=4, max_query=1)
    assert [w.spans[[0, -1], 0].tolist() for w in found] == [[0, 16], [8, 24], [16, 30]]
    # Tokens 6 and 10 have 2 neighbours on the shorter side in two pieces: the first one wins, as does the
    # longer piece at token 10.
    assert [np.flatnonzero(w.best).tolist() for w in found] == [[*range(7)], [3, 4, 5, 6], [3, 4, 5, 6, 7]]
    assert [(w.start, w.end) for w in found] == [(0, 0)] * 3


def test_a_much_shorter_last_piece_has_no_maximum_context_in_the_overlap(tokenizer):
    first, last = windows(ask(words(301), question="?"), tokenizer, max_len=304, stride=200, max_query=1)
    assert (len(first.best), len(last.best)) == (300, 101)
    assert first.best.all() and np.flatnonzero(last.best).tolist() == [100]


@pytest.mark.parametrize(
    "tokens, max_len, stride", [(16, 13, 4), (17, 13, 4), (9, 13, 9), (18, 13, 99), (60, 9, 1)]
)
def test_windows_cover_every_token_once(tokenizer, tokens, max_len, stride):
    found = windows(ask(words(tokens), question="?"), tokenizer, max_len=max_len, stride=stride, max_query=1)
    assert all(len(w.ids) <= max_len and len(w.spans) == len(w.best) == len(w.ids) - 4 for w in found)
    owned = np.concatenate([w.spans[w.best, 0] for w in found])
    assert owned.tolist() == list(range(0, 2 * tokens, 2))
    assert found[-1].spans[-1, 1] == 2 * tokens - 1


def test_labels_are_the_answer_if_it_is_in_the_window(tokenizer):
    context = words(26)
    found = windows(ask(context, "h i j", "?"), tokenizer, max_len=13, stride=4, max_query=1)
    texts = [_text(context, window, window.start, window.end) for window in found]
    assert texts == [None, "h i j", None, None, None, None]


def _text(context, window, start, end):
    first, last = start - window.context, end - window.context
    return context[window.spans[first, 0] : window.spans[last, 1]] if start else None


@pytest.mark.parametrize(
    "context, answer, text",
    [
        ("In PARIS, Café Ünï is $3.", "Café", "Café"),
        ("In PARIS, Café Ünï is $3.", "3", "3"),
        ("a cafe\u0301 b", "cafe\u0301", "cafe\u0301"),
        ("a cafe\u0301\u0302. b", "cafe\u0301\u0302", "cafe\u0301\u0302"),
        ("a\u200bb\0 日本 \u0130x", "日本", "日本"),
        ("a\u200bb\0 日本 \u0130x", "\u0130x", "\u0130x"),
        ("a  b\n c", " b\n ", "b"),  # white space is not a token
        ("born in 1990 日", "in 1990 日", "in 1990 日"),
    ],
)
def test_labels_decode_to_the_original_characters(tokenizer, context, answer, text):
    (window,) = windows(ask(context, answer), tokenizer)
    assert _text(context, window, window.start, window.end) == text


def test_an_accent_that_is_a_token_is_not_of_the_token_before(tokenizer):
    (window,) = windows(ask("e\u0301 b"), tokenizer)
    kept = not tokenizer.normalizer.lowercase
    assert window.spans.tolist() == ([[0, 1], [1, 2], [3, 4]] if kept else [[0, 2], [3, 4]])


def test_an_answer_inside_a_token_becomes_the_token(tokenizer):
    (window,) = windows(ask("x €190s y", "190"), tokenizer)  # Neither vocabulary has the euro: one [UNK].
    assert _text("x €190s y", window, window.start, window.end) == "€190s"


def test_texts_are_tokenized_once(tokenizer):
    class Counting:
        texts = ()

        def __getattr__(self, name):
            return getattr(tokenizer, name)

        def encode_batch(self, texts, **options):
            self.texts += tuple(texts)
            return tokenizer.encode_batch(texts, **options)

    items = [ask("a b", question=question) for question in ("c", "d", "c")] + [
        ask(f"{i}") for i in range(300)
    ]
    counting = Counting()
    found = all_windows(items, counting)
    assert sorted(counting.texts) == sorted(["a b", "c", "d", "who ?", *map(str, range(300))])
    alone = [windows(item, tokenizer) for item in items]
    assert [[w.ids.tolist() for w in ws] for ws in found] == [[w.ids.tolist() for w in ws] for ws in alone]


def test_a_long_question_is_cut(tokenizer):
    found = windows(ask(words(5), question=words(9)), tokenizer, max_len=7, max_query=3)
    assert [w.context for w in found] == [5] * 5 and all(len(w.ids) == 7 for w in found)


def test_errors_of_windows(tokenizer):
    for options, message in (
        ({"max_len": 67}, "windows: max_len must be 68 or more, got 67"),
        ({"stride": 0}, "windows: stride must be 1 or more, got 0"),
        ({"max_query": 0}, "windows: max_query must be 1 or more, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            windows(ask("a"), tokenizer, **options)
    with pytest.raises(
        ValueError, match=r"^dev\.json, question 'q': the context must have a token, got none"
    ):
        windows(ask("\u200b"), tokenizer)
    with pytest.raises(ValueError, match=r"^dev\.json, question 'q': the answer '\\u200b' must have a token"):
        windows(ask("a \u200b b", "\u200b"), tokenizer)


# Spans.


def brute_force(context, found, starts, ends, max_tokens):
    """Every allowed span of every window, the best first."""
    null = min(float(s[0] + e[0]) for s, e in zip(starts, ends, strict=True))
    spans = []
    for window, start, end in zip(found, starts, ends, strict=True):
        for first in range(len(window.spans)):
            for last in range(first, min(first + max_tokens, len(window.spans))):
                if window.best[first]:
                    score = float(start[window.context + first] + end[window.context + last])
                    a, b = int(window.spans[first, 0]), int(window.spans[last, 1])
                    spans.append(Prediction(context[a:b], a, score, null - score))
    return sorted(spans, key=lambda span: -span.score)


@pytest.mark.parametrize("max_tokens", [1, 3, 30])
def test_best_spans_are_those_of_all_spans(tokenizer, max_tokens, seed):
    random, context = np.random.default_rng(seed), words(26)
    found = windows(ask(context, question="?"), tokenizer, max_len=13, stride=4, max_query=1)
    for levels in (3, 1000):  # few levels: many equal scores
        draws = random.integers(0, levels, (2, len(found), 15)).astype(np.float32)  # two of padding
        expected = brute_force(context, found, *draws, max_tokens)
        for n_best in (1, 20, 1000):
            options = {"n_best": n_best, "max_tokens": max_tokens}
            assert best_spans(context, found, *draws, **options) == expected[:n_best]


def test_the_labels_of_any_window_decode_to_the_answer(tokenizer):
    context = words(20)
    item = ask(context, "f g", "?")
    found = windows(item, tokenizer, max_len=13, stride=4, max_query=1)
    starts = [np.zeros(len(w.ids), np.float32) for w in found]
    ends = [np.zeros(len(w.ids), np.float32) for w in found]
    for window, start, end in zip(found, starts, ends, strict=True):
        start[window.start] = end[window.end] = 5
    best = best_spans(context, found, starts, ends)[0]
    assert best == Prediction("f g", 10, 10.0, -10.0)


def test_padding_query_and_long_spans_are_no_answers():
    spans = np.array([[0, 1], [2, 3], [4, 5]], np.int32)
    window = Window(np.zeros(7, np.int32), 3, spans, np.array([True, True, False]), 0, 0)
    start = np.array([1, 9, 9, 0, 2, 9, 9, np.inf], np.float32)
    end = np.array([4, 9, 9, 3, 0, 1, 9, np.nan], np.float32)
    got = best_spans("a b c", [window], [start], [end], max_tokens=2)
    expected = [("a", 0, 3.0), ("b c", 2, 3.0), ("b", 2, 2.0), ("a b", 0, 0.0)]
    assert got == [Prediction(text, at, score, 5.0 - score) for text, at, score in expected]
    other = start - 3
    null = best_spans("a b c", [window, window], [start, other], [end, end], max_tokens=2)[0].null_difference
    assert null == 2.0 - 3.0


def test_errors_of_best_spans():
    window = Window(np.zeros(5, np.int32), 3, np.array([[0, 1]], np.int32), np.array([True]), 0, 0)
    good, bad = np.zeros(5), np.array([0, 0, np.nan, 0, 0])
    for starts, ends, options, message in (
        ([good[:4]], [good], {}, "best_spans: starts must have 5 logits, one per token, got 4"),
        ([good], [bad], {}, "best_spans: ends must be finite, got NaN or infinity"),
        ([good], [good], {"n_best": 0}, "best_spans: n_best must be 1 or more, got 0"),
        ([good], [good], {"max_tokens": 0}, "best_spans: max_tokens must be 1 or more, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            best_spans("a", [window], starts, ends, **options)
