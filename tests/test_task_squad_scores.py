"""Exact match, F1 and thresholds of SQuAD."""

import math

import numpy as np
import pytest

from electra_fast.tasks.items import Answer, Question
from electra_fast.tasks.squad_scores import exact, f1, normalized, squad_scores


@pytest.mark.parametrize(
    "text, expected",
    [
        ("The  Cat\tsat on a\nmat.", "cat sat on mat"),
        ("an apple", "apple"),
        ("A", ""),
        ("", ""),
        ("...", ""),
        ("Theatre banana another", "theatre banana another"),
        ("U.S.A.", "usa"),
        ("the-end", "theend"),  # Punctuation is removed first, so no article is left.
        ("a, b", "b"),
        ("$1,000.50", "100050"),
        ("sea\u2014the Elbe", "sea\u2014 elbe"),
        ("sea\u2014the\u2014Elbe", "sea\u2014 \u2014elbe"),  # An article becomes a space.
        ("Zoë “quotes”", "zoë “quotes”"),  # only ASCII punctuation
    ],
)
def test_normalized(text, expected):
    assert normalized(text) == expected


@pytest.mark.parametrize(
    "prediction, answer, em, overlap",
    [
        ("The Elbe.", "elbe", 1.0, 1.0),
        ("the river Elbe", "Elbe", 0.0, 2 / 3),
        ("north of Elbe", "south of Elbe river", 0.0, 4 / 7),
        ("Elbe Elbe", "Elbe", 0.0, 2 / 3),  # Each word counts once per occurrence.
        ("Elbe Elbe Rhine", "Elbe Elbe", 0.0, 4 / 5),
        ("Rhine Elbe", "Elbe Rhine", 0.0, 1.0),
        ("Rhine", "Elbe", 0.0, 0.0),
        ("", "Elbe", 0.0, 0.0),
        ("the", "Elbe", 0.0, 0.0),
        ("", "", 1.0, 1.0),
        ("the", "", 1.0, 1.0),
    ],
)
def test_exact_and_f1(prediction, answer, em, overlap):
    assert (exact(prediction, answer), f1(prediction, answer)) == (em, overlap)
    assert (exact(answer, prediction), f1(answer, prediction)) == (em, overlap)


def ask(name, *answers):
    return Question(name, "?", "", [Answer(text, 0) for text in answers], f"dev.json, question {name!r}")


def test_the_best_answer_counts():
    items = [ask("1", "Rhine", "river Elbe", "Elbe"), ask("2", "the", "Oder"), ask("3", "a")]
    scores = squad_scores(items, {"1": "the Elbe", "2": "the", "3": "", "unknown": "x"})
    assert scores == {"f1": 2 / 3, "exact": 2 / 3}  # "the" has no words, so only Oder is right.


def test_questions_without_an_answer():
    items = [ask("1", "Elbe"), ask("2", "river Oder Elbe"), ask("3"), ask("4")]
    predictions = {"1": "Elbe", "2": "Oder", "3": "", "4": "Rhine"}
    assert squad_scores(items, predictions) == {
        "f1": 0.625,
        "exact": 0.5,
        "has_answer_f1": 0.75,
        "has_answer_exact": 0.5,
        "no_answer_f1": 0.5,
        "no_answer_exact": 0.5,
    }
    assert "has_answer_f1" not in squad_scores(items[2:], predictions)


def test_a_question_above_the_threshold_is_not_answered():
    items = [ask("1", "Elbe"), ask("2", "Oder"), ask("3"), ask("4")]
    predictions = {"1": "Elbe", "2": "Oder", "3": "Main", "4": "Rhine"}
    null = {"1": -2.0, "2": 1.0, "3": 0.0, "4": 2.0}
    scores = squad_scores(items, predictions, null)  # 0 is not above 0.
    assert [scores[f"{group}exact"] for group in ("", "has_answer_", "no_answer_")] == [0.5, 0.5, 0.5]
    assert squad_scores(items, predictions, null, threshold=1.0)["exact"] == 0.75
    # At -2: 1, 3 and 4 are right. At 0: 1 and 4. At 1: 1, 2, 4.
    assert (scores["best_exact"], scores["best_exact_threshold"]) == (0.75, -2.0)


def test_without_any_answer_the_threshold_is_below_all():
    scores = squad_scores([ask("1"), ask("2")], {"1": "x", "2": "y"}, {"1": -7.0, "2": -5.0})
    assert scores["best_f1"] == 1.0 and scores["best_f1_threshold"] == math.nextafter(-7.0, -math.inf)
    assert scores["f1"] == 0.0


def test_equal_doubts_are_on_the_same_side_of_a_threshold():
    items, null = [ask("1", "Elbe"), ask("2")], {"1": 3.0, "2": 3.0}
    assert squad_scores(items, {"1": "Elbe", "2": "Rhine"}, null)["best_exact"] == 0.5


def test_best_thresholds_are_those_of_all_thresholds(seed):
    random = np.random.default_rng(seed)
    texts = ["b", "b c c d", "c", "b c d e f g h", "", "the"]  # Every F1 is a sum of powers of two.
    for count in (1, 2, 40):
        names = [str(i) for i in range(count)]
        items = [ask(name, *(["b"] if random.random() < 0.6 else [])) for name in names]
        predictions = {name: texts[random.integers(len(texts))] for name in names}
        for levels in (4, 1000):  # few levels: many equal doubts
            null = {name: float(random.integers(-levels, levels)) for name in names}
            scores = squad_scores(items, predictions, null)
            thresholds = [math.nextafter(min(null.values()), -math.inf), *sorted(set(null.values()))]
            for name in ("f1", "exact"):
                every = [squad_scores(items, predictions, null, threshold=t)[name] for t in thresholds]
                best = thresholds[int(np.argmax(every))]
                assert (scores[f"best_{name}"], scores[f"best_{name}_threshold"]) == (max(every), best)


def test_errors():
    item = ask("1", "Elbe")
    for items, predictions, null, message in (
        ([], {}, None, "squad_scores: questions must contain a question, got none"),
        ([item._replace(answers=None)], {"1": ""}, None, "^dev.json, question '1' must have 'answers'"),
        ([item], {"2": ""}, None, "squad_scores: predictions must have every id, got none for '1'"),
        ([item], {"1": ""}, {}, "null must have a finite number for every id, got None for '1'"),
        ([item], {"1": ""}, {"1": math.nan}, "null must have a finite number for every id, got nan for '1'"),
    ):
        with pytest.raises(ValueError, match=message):
            squad_scores(items, predictions, null)
