"""Exact match and F1 of answers, as the evaluations of SQuAD 1.1 and 2.0 define them, in 0 … 1."""

import math
import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from electra_fast.errors import must
from electra_fast.tasks.items import Question

PUNCTUATION = str.maketrans("", "", string.punctuation)
ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def normalized(text: str) -> str:
    """Return a text in lower case, without punctuation and articles, its words separated by one space."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def exact(prediction: str, answer: str) -> float:
    """Return 1 if both are the same text after `normalized`, else 0."""
    return float(normalized(prediction) == normalized(answer))


def f1(prediction: str, answer: str) -> float:
    """Return the harmonic mean of precision and recall of the words; two texts without words agree."""
    predicted, true = normalized(prediction).split(), normalized(answer).split()
    if not predicted or not true:
        return float(predicted == true)
    common = (Counter(predicted) & Counter(true)).total()
    return 2 * common / (len(predicted) + len(true))


def squad_scores(
    questions: Sequence[Question],
    predictions: Mapping[str, str],
    null: Mapping[str, float] | None = None,
    *,
    threshold: float = 0.0,
) -> dict[str, float]:
    """Return the means over all questions of the best scores over the answers of each question.

    A question is answered unless its `null` is above the threshold. If some contexts have no answer
    (SQuAD 2.0), the means over the questions with and without an answer are returned too.

    Args:
        questions: with answers.
        predictions: the text for each id; empty: no answer.
        null: for each id, how much more likely no answer is than the text, in any unit:
            `Prediction.null_difference`. None: every question is answered by its text.
        threshold: of `null`.

    Returns:
        ``f1`` and ``exact``. For SQuAD 2.0 also ``has_answer_f1``, ``has_answer_exact``, ``no_answer_f1`` and
        ``no_answer_exact``, without those of no question. With `null` also ``best_f1`` and ``best_exact``,
        the highest means that a threshold can give, and ``best_f1_threshold`` and ``best_exact_threshold``.

    Raises:
        ValueError: there are no questions, or one has unknown answers, no prediction or no finite `null`.
    """
    _require_complete(questions, predictions, null)
    has_answer = np.array([bool(question.answers) for question in questions])
    if null is None:
        doubts = np.full(len(questions), -np.inf)
    else:
        doubts = np.array([null[question.id] for question in questions], np.float64)
    result = {}
    for name, score in (("f1", f1), ("exact", exact)):
        answered = np.array([_best(score, predictions[q.id], q) for q in questions])
        scores = np.where(doubts > threshold, ~has_answer, answered)
        result[name] = float(scores.mean())
        for group, members in (("has_answer", has_answer), ("no_answer", ~has_answer)):
            if members.any() and not has_answer.all():
                result[f"{group}_{name}"] = float(scores[members].mean())
        if null is not None:
            result[f"best_{name}"], result[f"best_{name}_threshold"] = _best_threshold(
                answered, ~has_answer, doubts
            )
    return result


def _require_complete(
    questions: Sequence[Question], predictions: Mapping[str, str], null: Mapping[str, float] | None
) -> None:
    if not questions:
        raise ValueError(must("squad_scores: questions", "contain a question", "none"))
    for question in questions:
        if question.answers is None:
            raise ValueError(must(question.where, "have 'answers' to be scored", "none"))
        if question.id not in predictions:
            raise ValueError(must("squad_scores: predictions", "have every id", f"none for {question.id!r}"))
        if null is not None and not math.isfinite(null.get(question.id, math.nan)):
            got = f"{null.get(question.id)} for {question.id!r}"
            raise ValueError(must("squad_scores: null", "have a finite number for every id", got))


def _best(score, prediction: str, question: Question) -> float:
    """Return the best score over the answers that have words; without any, the true answer is none."""
    texts = [answer.text for answer in question.answers if normalized(answer.text)] or [""]
    return max(score(prediction, text) for text in texts)


def _best_threshold(answered: np.ndarray, unanswered: np.ndarray, doubts: np.ndarray) -> tuple[float, float]:
    """Return the highest mean score and the lowest threshold that gives it.

    Args:
        answered, unanswered: the score of each question if it is answered, and if it is not.
        doubts: a question is answered unless its doubt is above the threshold.

    The thresholds are the doubts, and one below all of them.
    """
    order = np.argsort(doubts, kind="stable")
    gains = (answered - unanswered)[order]
    doubts = doubts[order]
    last_of_equals = np.append(doubts[1:] > doubts[:-1], True)
    totals = unanswered.sum() + np.append(0.0, gains.cumsum()[last_of_equals])
    thresholds = np.append(np.nextafter(doubts[0], -np.inf), doubts[last_of_equals])
    best = int(totals.argmax())
    return float(totals[best] / len(doubts)), float(thresholds[best])
