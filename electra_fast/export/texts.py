"""The texts on which an exported model is checked: files of its task, or Python's own manual."""

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from electra_fast import data, local
from electra_fast.data.manual import python_manual
from electra_fast.errors import must
from electra_fast.export.model import Source
from electra_fast.tasks.examples import Examples
from electra_fast.tasks.items import Candidates, Choice, Question, Tagged, Text, Utterance
from electra_fast.tasks.texts import encode_texts

DATA = "export: --data"
OPTIONS = 4  # per prompt or query
LONGEST = 60  # words of a text from the manual; most are shorter


class Texts(NamedTuple):
    """Items of a task, or single texts for a model without one, and their sequences."""

    items: list[Any]
    examples: Examples
    name: str  # where they come from, for messages


def read_texts(source: Source, paths: Sequence[str | Path], most: int) -> Texts:
    """Return at most `most` items, spread evenly over the files.

    Without `paths` these are the files that the run of the folder was evaluated on, if they still exist,
    otherwise English from Python's manual, without labels.

    Raises:
        ValueError, OSError: a file is wrong, or has no item; the message names it.
    """
    for path in paths:
        local.existing(DATA, path, hub=False)
    if not paths and all(Path(path).exists() for path in source.dev):
        paths = source.dev
    if not paths:
        return manual_texts(source, most)
    name = str(paths[0]) + f" and {len(paths) - 1} more" * (len(paths) > 1)
    items = read_items(source, [str(path) for path in paths])
    if not items:
        raise ValueError(must(DATA, "have at least one item", f"none in {name}"))
    items = spread(items, most)
    return Texts(items, encode(source, items), name)


def spread(items: list[Any], most: int) -> list[Any]:
    """Return at most `most` items at even distances, because many files are sorted by label."""
    count = min(most, len(items))
    return [items[len(items) * i // count] for i in range(count)]


def read_items(source: Source, paths: list[str]) -> list[Any]:
    """Read files as the model's task reads them; without a task, each line of text is an item."""
    if source.task is not None:
        items = source.task.read(paths, "dev")
        if items:
            source.task.check(items)
        return items
    lines = (line for document in data.documents(paths) for line in document.split("\n"))
    return [Text(line, None, None, paths[0]) for line in lines]


def manual_texts(source: Source, count: int) -> Texts:
    """Return `count` items of the model's task made of Python's manual, always the same."""
    words, draw = python_manual()[:200_000].split(), random.Random(0)

    def text(longest: int = LONGEST) -> str:
        begin = draw.randrange(len(words) - longest)
        return " ".join(words[begin : begin + draw.randint(1, draw.randint(1, longest))])

    name = "Python's manual"
    items = list(made_items(source.task.name if source.task else "", text, count, name))
    return Texts(items, encode(source, items), name)


def made_items(task: str, text: Callable[..., str], count: int, where: str) -> Iterator[Any]:
    """Yield items without labels; `text(longest)` returns another text at each call."""
    for i in range(count):
        if task == "answer":
            yield Question(str(i), text(8), text(4 * LONGEST), None, where)
        elif task == "choose":
            yield Choice(text(), [text() for _ in range(OPTIONS)], None, where)
        elif task == "rank":
            yield Candidates(text(8), [text() for _ in range(OPTIONS)], None, where)
        elif task == "tag":
            yield Tagged(text().split(), None, where)
        elif task == "intent":
            yield Utterance(text().split(), None, None, where)
        else:  # pairs, so that both types of tokens are tested
            yield Text(text(), text(), None, where)


def by_length(source: Source, texts: Texts) -> Texts:
    """Return the same texts in order of their lengths; unchanged if an item may have several sequences."""
    if len(texts.items) != len(texts.examples):
        return texts
    order = texts.examples.lengths.argsort(kind="stable")
    items = [texts.items[i] for i in order]
    return texts._replace(items=items, examples=encode(source, items))


def encode(source: Source, items: Sequence[Any]) -> Examples:
    """Return the sequences of items."""
    if source.task is not None:
        return source.task.examples(items, source.tokenizer)
    return encode_texts(items, source.tokenizer, source.head.config.max_positions)
