"""A question and its context as the windows that a model reads, after the run_squad of BERT and ELECTRA.

A window is ``[CLS] question [SEP] piece of the context [SEP]``. The next piece begins `stride` tokens later,
so a context token can be in several windows. It has its maximum context in one of them: the one with the
most tokens on the shorter of its two sides.
"""

import unicodedata
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from electra_fast.data import special_ids
from electra_fast.errors import must
from electra_fast.tasks.examples import encodings
from electra_fast.tasks.items import Question


class Window(NamedTuple):
    """L tokens without padding, of which C are of the context."""

    ids: np.ndarray  # [L] int32
    context: int  # position of the first context token
    spans: np.ndarray  # [C, 2] int32, the characters of each context token: the first, and the one after it
    best: np.ndarray  # [C] bool, whether the context token has its maximum context in this window
    start: int  # position of the first token of the first answer; 0, [CLS]: no complete answer in the window
    end: int  # position of its last token, or 0


class Tokens(NamedTuple):
    """A text of n tokens."""

    ids: np.ndarray  # [n] int32
    spans: np.ndarray  # [n, 2] int32


def windows(
    question: Question, tokenizer, *, max_len: int = 512, stride: int = 128, max_query: int = 64
) -> list[Window]:
    """Return the windows of one question; see `all_windows`."""
    return all_windows([question], tokenizer, max_len=max_len, stride=stride, max_query=max_query)[0]


def all_windows(
    questions: Sequence[Question], tokenizer, *, max_len: int = 512, stride: int = 128, max_query: int = 64
) -> list[list[Window]]:
    """Return the windows of each question, in the order of the context. Each text is tokenized once.

    Args:
        tokenizer: of `electra_fast.data.load_tokenizer`.
        max_len: of a window, in tokens.
        stride: tokens from the beginning of a piece to the beginning of the next; at most a piece's length.
        max_query: tokens of the question, which is cut there.

    Raises:
        ValueError: max_len, stride or max_query is too small, or a context or an answer has no token.
    """
    for name, value, least in (
        ("max_query", max_query, 1),
        ("max_len", max_len, max_query + 4),  # [CLS], two [SEP], one context token
        ("stride", stride, 1),
    ):
        if value < least:
            raise ValueError(must(f"windows: {name}", f"be {least} or more", value))
    texts = [text for question in questions for text in (question.question, question.context)]
    tokens, special = _tokenized(dict.fromkeys(texts), tokenizer), special_ids(tokenizer)
    separator = np.array([special["[SEP]"]], np.int32)
    found = []
    for question in questions:
        query = tokens[question.question].ids[:max_query]
        before = np.concatenate([np.array([special["[CLS]"]], np.int32), query, separator])
        found.append(_windows(question, tokens[question.context], before, separator, max_len, stride))
    return found


def _windows(
    question: Question, context: Tokens, before: np.ndarray, separator: np.ndarray, max_len: int, stride: int
) -> list[Window]:
    if not len(context.ids):
        raise ValueError(must(f"{question.where}: the context", "have a token", "none"))
    answer = _answer_tokens(question, context.spans)
    pieces = _pieces(len(context.ids), max_len - len(before) - len(separator), stride)
    owner = _owners(len(context.ids), pieces)
    found = []
    for number, (begin, end) in enumerate(pieces):
        inside = answer is not None and begin <= answer[0] and answer[1] < end
        start, last = (len(before) + token - begin for token in answer) if inside else (0, 0)
        ids = np.concatenate([before, context.ids[begin:end], separator])
        best = owner[begin:end] == number
        found.append(Window(ids, len(before), context.spans[begin:end], best, start, last))
    return found


def _pieces(tokens: int, longest: int, stride: int) -> list[tuple[int, int]]:
    """Return where each piece of a context begins and ends; the first that reaches the end is the last."""
    stride = min(stride, longest)
    begins = range(0, max(tokens - longest, 0) + stride, stride)
    return [(begin, min(begin + longest, tokens)) for begin in begins]


def _owners(tokens: int, pieces: list[tuple[int, int]]) -> np.ndarray:
    """Return the number of the piece in which each token has its maximum context, ``[tokens]``.

    A hundredth of the length of a piece is added to the smaller number of neighbours. Of equal pieces, the
    first is the owner.
    """
    most, owner = np.full(tokens, -1.0), np.zeros(tokens, np.int64)
    for number, (begin, end) in enumerate(pieces):
        left = np.arange(end - begin)
        score = np.minimum(left, left[::-1]) + 0.01 * (end - begin)
        better = begin + np.flatnonzero(score > most[begin:end])
        most[better], owner[better] = score[better - begin], number
    return owner


def _answer_tokens(question: Question, spans: np.ndarray) -> tuple[int, int] | None:
    """Return the first and the last token of the first answer; they may have more characters than it."""
    if not question.answers:
        return None
    text, start = question.answers[0]
    first = int(np.searchsorted(spans[:, 1], start, side="right"))
    last = int(np.searchsorted(spans[:, 0], start + len(text), side="left")) - 1
    if first > last:
        raise ValueError(must(f"{question.where}: the answer {text!r}", "have a token", "none"))
    return first, last


def _tokenized(texts: Iterable[str], tokenizer) -> dict[str, Tokens]:
    texts, tokens = list(texts), {}
    for text, encoding in zip(texts, encodings(texts, tokenizer), strict=True):
        spans = np.array(encoding.offsets, np.int32).reshape(-1, 2)
        tokens[text] = Tokens(np.array(encoding.ids, np.int32), with_accents(text, spans))
    return tokens


def with_accents(text: str, spans: np.ndarray) -> np.ndarray:
    """Add to each token the combining accents after it, which the tokenizer has removed from the text."""
    if text.isascii():
        return spans
    begins = set(spans[:, 0].tolist())
    for span in spans:
        while (i := int(span[1])) < len(text) and i not in begins and unicodedata.category(text[i]) == "Mn":
            span[1] += 1
    return spans
