"""The items of the tasks, as the readers of files return them.

`where` is the file and the line of an item, "train.csv, line 12". It begins every error about the item.
"""

from typing import NamedTuple


class Text(NamedTuple):
    """A text, or a pair of texts, to classify or to score."""

    text: str
    pair: str | None
    label: str | list[str] | float | None  # one label, several labels, a score, None: unknown
    where: str


class Tagged(NamedTuple):
    """A sentence with one tag per word."""

    words: list[str]
    tags: list[str] | None  # BIO: "O", "B-person", "I-person"; None: unknown
    where: str


class Answer(NamedTuple):
    """An answer to a question, as a span of its context."""

    text: str
    start: int  # offset of the first character in the context


class Question(NamedTuple):
    """A question about a context."""

    id: str
    question: str
    context: str
    answers: list[Answer] | None  # empty: the context has no answer; None: unknown
    where: str


class Choice(NamedTuple):
    """A prompt with several options, of which one is right."""

    prompt: str
    options: list[str]
    label: int | None  # the number of the right option; None: unknown
    where: str


class Candidates(NamedTuple):
    """A query with the candidates to rank."""

    query: str
    candidates: list[str]
    relevance: list[float] | None  # of each candidate, 0: not relevant; None: unknown
    where: str


class Writing(NamedTuple):
    """A text to read, and the text to write for it."""

    source: str
    target: str | None  # None: unknown
    where: str


class Utterance(NamedTuple):
    """What a user said, with its intent and one slot tag per word."""

    words: list[str]
    intent: str | None
    slots: list[str] | None  # BIO
    where: str
