"""Questions about contexts, from files in the JSON of SQuAD 1.1 (Rajpurkar et al. 2016) and 2.0 (2018)."""

import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from electra_fast.data.lines import lines
from electra_fast.data.streams import Leaf, leaves
from electra_fast.errors import must
from electra_fast.tasks.items import Answer, Question

SHOWN = 80  # characters of a value in an error
HALF_PAIR = re.compile(r"[\ud800-\udfff]")  # JSON allows half of a surrogate pair, which cannot be encoded.
KINDS = {str: "a string", int: "an integer", list: "a list", bool: "true or false"}


def questions(paths: Sequence[str | os.PathLike]) -> list[Question]:
    """Return the questions of several files, which may be packed, in order.

    The answers of a question in SQuAD 2.0 whose context has no answer are an empty list. If no question of
    the files has the field ``answers``, all answers are None. ``plausible_answers`` are ignored.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: a file is not JSON, a field is missing or of another type, a context is empty, an id is
            repeated, an answer is not in its context at its offset, or ``is_impossible`` contradicts the
            answers; the message names the file, the article, the paragraph and the question.
    """
    found = [pair for path in paths for leaf in leaves(Path(path), Counter()) for pair in _questions(leaf)]
    if not found:
        raise ValueError(must(", ".join(map(str, paths)), "contain a question", "none"))
    _require_distinct([question for question, _ in found])
    if not any("answers" in record for _, record in found):
        return [question for question, _ in found]
    return [question._replace(answers=_answers(question, record)) for question, record in found]


def _questions(leaf: Leaf) -> Iterator[tuple[Question, dict[str, Any]]]:
    """Yield the questions without answers, and the JSON object of each."""
    for article, in_article in _numbered(_json(leaf), leaf.name, "data", "article"):
        for paragraph, in_paragraph in _numbered(article, in_article, "paragraphs", "paragraph"):
            context = _text(paragraph, in_paragraph, "context")
            if not context.strip():
                raise ValueError(must(f"{in_paragraph}: 'context'", "contain text", repr(context[:SHOWN])))
            for record, in_question in _numbered(paragraph, in_paragraph, "qas", "question"):
                name = _text(record, in_question, "id")
                where = f"{in_paragraph}, question {name!r}"
                yield Question(name, _text(record, where, "question"), context, None, where), record


def _json(leaf: Leaf) -> Any:
    text = "\n".join(lines(leaf))
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        remedy = "a SQuAD file is one JSON object with a list under 'data'"
        raise ValueError(f"{leaf.name}: not JSON: {error}; {remedy}") from None


def _numbered(record: Any, where: str, field: str, name: str) -> Iterator[tuple[Any, str]]:
    """Yield the elements of a list in `record`, each with its path: "dev.json, article 3"."""
    for number, element in enumerate(_field(record, where, field, list), start=1):
        yield element, f"{where}, {name} {number}"


def _text(record: Any, where: str, field: str) -> str:
    return HALF_PAIR.sub("\ufffd", _field(record, where, field, str))


def _field(record: Any, where: str, field: str, kind: type) -> Any:
    if not isinstance(record, dict) or field not in record:
        raise ValueError(must(where, f"be a JSON object with {field!r}", str(record)[:SHOWN]))
    if type(record[field]) is not kind:  # In Python a bool is an int.
        raise ValueError(must(f"{where}: {field!r}", f"be {KINDS[kind]}", str(record[field])[:SHOWN]))
    return record[field]


def _require_distinct(questions: list[Question]) -> None:
    seen: dict[str, Question] = {}
    for question in questions:
        if (first := seen.setdefault(question.id, question)) is not question:
            raise ValueError(f"{question.where}: this id is already that of {first.where}")


def _answers(question: Question, record: dict[str, Any]) -> list[Answer]:
    elements = _numbered(record, question.where, "answers", "answer")
    answers = [_answer(question.context, element, where) for element, where in elements]
    if "is_impossible" in record and _field(record, question.where, "is_impossible", bool) == bool(answers):
        rule = "be true exactly if there are no answers"
        got = f"{str(record['is_impossible']).lower()} with {len(answers)} answers"
        raise ValueError(must(f"{question.where}: 'is_impossible'", rule, got))
    return answers


def _answer(context: str, record: Any, where: str) -> Answer:
    text, start = _text(record, where, "text"), _field(record, where, "answer_start", int)
    if not text.strip():
        raise ValueError(must(f"{where}: 'text'", "contain text", repr(text[:SHOWN])))
    if start < 0 or not context.startswith(text, start):
        rule = f"be in the context at character {start}"
        found = [match.start() for match in re.finditer(re.escape(text), context)]
        nearest = min(found, key=lambda at: abs(at - start), default=None)
        got = "a text that does not occur in it" if nearest is None else f"it at {nearest}"
        raise ValueError(must(f"{where}: {text[:SHOWN]!r}", rule, got))
    return Answer(text, start)
