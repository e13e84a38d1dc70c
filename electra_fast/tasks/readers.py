"""Readers of texts with labels, prompts with options, queries with candidates, and sources with targets.

Each returns the items of its files in order. A file has one of the formats of `records.records`, which also
lists the errors that are common to all readers.
"""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from electra_fast.errors import must
from electra_fast.tasks.items import Candidates, Choice, Text, Writing
from electra_fast.tasks.records import Record, column, known, named, number, records, string, strings

# The names of columns that are found without an option; the first one that the files have is used.
TEXTS = ("text", "sentence", "utterance", "query", "question")
LABELS = ("label", "category", "intent", "labels", "emotion")
SCORES = ("score", "label")
PROMPTS = ("prompt", "startphrase", "context", "ctx", "question")
OPTIONS = ("options", "endings", "choices", "ending0")
QUERIES = ("query", "question")
QUERY_IDS = ("query_id", "qid")
CANDIDATES = ("candidate", "document", "passage", "text")
RELEVANCE = ("relevance", "label")
SOURCES = ("source", "document", "article", "text")
TARGETS = ("target", "summary", "title", "headline")
LARGEST = 1e18  # of a score
SPLITS = {"train": "train", "dev": "val", "test": "test"}  # CLINC150's name of a role


def texts(
    paths: Sequence[str | Path],
    *,
    text: str | None = None,
    pair: str | None = None,
    label: str | None = None,
    separator: str | None = None,
    score: bool = False,
    columns: Sequence[str] | None = None,
    quoted: bool | None = None,
    role: str = "train",
) -> list[Text]:
    """Return the texts of files with one text per record.

    CLINC150's file contains all splits, as lists of [text, label]: ``train``, ``val``, ``test``, and
    ``oos_train`` and so on for the texts that have no intent, whose label is "oos". Both splits of `role` are
    read.

    Args:
        text, pair, label: columns. None: the first of TEXTS and of LABELS or SCORES that the files have, and
            no pairs. Without a column of labels, every label is None.
        separator: what separates several labels in one cell, "," in "3,7". A list in JSON or Parquet is
            several labels without it.
        score: whether the labels are scores, which are returned as floats.
        columns, quoted: as in `records.records`.
        role: train, dev or test.

    Raises:
        ValueError: a text or a label is missing or empty, a score is not a finite number, or the labels are
            floats without `score`.
    """
    if role not in SPLITS:
        raise ValueError(must("texts: role", f"be one of {', '.join(SPLITS)}", repr(role)))
    found = [row for record in records(paths, columns, quoted) for row in _split(record, role)]
    text = named(found, (text,) if text else TEXTS, "--text")
    label = named(found, (label,), "--label") if label else known(found, SCORES if score else LABELS)

    def item(record: Record) -> Text:
        first = string(record.where, text, column(record, text, "--text"))
        second = string(record.where, pair, column(record, pair, "--pair")) if pair else None
        if label is None:
            return Text(first, second, None, record.where)
        value = column(record, label, "--label")
        if score:
            return Text(first, second, _bounded(record.where, label, value), record.where)
        return Text(first, second, _labels(record.where, label, value, separator), record.where)

    items = [item(record) for record in found]
    if not score:
        _check_labels(items)
    return items


def _split(record: Record, role: str) -> Iterator[Record]:
    """Yield the texts of a split if the record is CLINC150's whole file, else the record."""
    splits = record.fields
    if not splits or not all(map(_is_list_of_lists, splits.values())):
        yield record
        return
    names = SPLITS[role], f"oos_{SPLITS[role]}"
    if not splits.get(names[0]):
        raise ValueError(must(record.file, f"contain texts under {names[0]!r}", ", ".join(splits)))
    for name in names:
        for i, pair in enumerate(splits.get(name, []), start=1):
            where = f"{record.file}, text {i} of {name}"
            if len(pair) != 2:
                raise ValueError(must(where, "be a list of a text and a label", pair))
            yield Record({"text": pair[0], "label": pair[1]}, where)


def _is_list_of_lists(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, list) for each in value)


def _labels(where: str, name: str, value: Any, separator: str | None) -> str | list[str]:
    if isinstance(value, list):
        return [_label(where, name, each) for each in value]
    label = _label(where, name, value)
    return [_label(where, name, each) for each in label.split(separator)] if separator else label


def _label(where: str, name: str, value: Any) -> str:
    if isinstance(value, float):
        raise ValueError(_float(where, name, value))
    return string(where, name, str(value) if isinstance(value, int) else value).strip()


def _float(where: str, name: str, value: object) -> str:
    return must(f"{where}: {name}", "not be a float for classify", value, "use regress for scores")


def _check_labels(items: list[Text]) -> None:
    """Raise a ValueError if the labels are floats in digits, or are lists in some records only."""
    lists = [isinstance(item.label, list) for item in items]
    if any(lists) and not all(lists):
        item = items[lists.index(False)]
        raise ValueError(must(f"{item.where}: the label", "be a list, as in other records", repr(item.label)))
    if any(lists) or not all(_is_number(item.label) for item in items):
        return
    for item in items:
        if not item.label.lstrip("+-").isdecimal():
            raise ValueError(_float(item.where, "the label", item.label))


def _is_number(label: str | None) -> bool:
    try:
        number("", "", label)
    except ValueError:
        return False
    return True


def choices(paths: Sequence[str | Path]) -> list[Choice]:
    """Return the prompts with options of files with one prompt per record.

    The prompt is in the first column of PROMPTS that the files have. The options are a list in the first
    column of OPTIONS, or in columns ``ending0``, ``ending1`` and so on. ``label`` is the number of the right
    option, counted from 0; without that column every label is None. Examples are SWAG's CSV
    (``startphrase``, ``ending0`` to ``ending3``, ``label``), HellaSwag's JSON lines (``ctx``, ``endings``,
    ``label``), and the general form ``prompt``, ``options``, ``label``.

    Raises:
        ValueError: a prompt or an option is missing or empty, there are fewer than 2 options, or the label is
            not the number of one.
    """
    found = list(records(paths))
    prompt, options = named(found, PROMPTS), named(found, OPTIONS)
    labelled = known(found, ("label",)) is not None
    return [_choice(record, prompt, options, labelled) for record in found]


def _choice(record: Record, prompt: str, options: str, labelled: bool) -> Choice:
    where = record.where
    if options == "ending0":
        names = itertools.takewhile(record.fields.__contains__, (f"ending{i}" for i in itertools.count()))
        found = [string(where, name, record.fields[name]) for name in names]
    else:
        found = strings(where, options, column(record, options))
    if len(found) < 2:
        raise ValueError(must(where, "have 2 or more options", len(found)))
    label = column(record, "label") if labelled else None
    if labelled and str(label) not in map(str, range(len(found))):
        rule = f"be the number of an option, 0 to {len(found) - 1}"
        raise ValueError(must(f"{where}: label", rule, repr(label)))
    return Choice(
        string(where, prompt, column(record, prompt)), found, int(label) if labelled else None, where
    )


def candidates(paths: Sequence[str | Path]) -> list[Candidates]:
    """Return the queries with their candidates, in the order in which the queries begin.

    A file has one candidate per record, in the first column of CANDIDATES that the files have, its query in
    that of QUERIES, and its relevance in that of RELEVANCE. The records with the same ``query_id`` or
    ``qid``, or without such a column with the same query, belong together.

    Or it has one query per record with a list ``candidates``, of objects with ``text`` and ``relevance``, or
    of strings; then ``relevance`` is a list of as many numbers. Without any relevance it is None.

    Raises:
        ValueError: a query or a candidate is missing or empty, a relevance is not a number of 0 or more, or
            the records of an id have different queries.
    """
    found = list(records(paths))
    query = named(found, QUERIES)
    if known(found, ("candidates",)):
        groups = [_candidates_of(record, query) for record in found]
    else:
        groups = _grouped(found, known(found, QUERY_IDS) or query)
    rows = [row for group in groups for row in group]
    text, relevance = named(rows, CANDIDATES), known(rows, RELEVANCE)
    return [_ranked(group, query, text, relevance) for group in groups]


def _candidates_of(record: Record, query: str) -> list[Record]:
    """Return one record per candidate of a record with a list of candidates."""
    where, asked, listed = record.where, column(record, query), column(record, "candidates")
    if not isinstance(listed, list) or not listed:
        raise ValueError(must(f"{where}: candidates", "be a list that is not empty", repr(listed)))
    found = [each if isinstance(each, dict) else {"text": each} for each in listed]
    relevance = record.fields.get("relevance")
    if relevance is not None:
        if not isinstance(relevance, list) or len(relevance) != len(found):
            raise ValueError(must(f"{where}: relevance", "have one number per candidate", repr(relevance)))
        found = [fields | {"relevance": value} for fields, value in zip(found, relevance, strict=True)]
    return [Record(fields | {query: asked}, where) for fields in found]


def _grouped(found: list[Record], key: str) -> list[list[Record]]:
    """Return the records with the same value of a column together."""
    groups: dict[str, list[Record]] = {}
    for record in found:
        groups.setdefault(str(column(record, key)), []).append(record)
    return list(groups.values())


def _ranked(rows: list[Record], query: str, text: str, relevance: str | None) -> Candidates:
    queries = [string(row.where, query, column(row, query)) for row in rows]
    for row, other in zip(rows, queries, strict=True):
        if other != queries[0]:
            rule = f"have the query of {rows[0].where}, which has the same id, {queries[0]!r}"
            raise ValueError(must(row.where, rule, repr(other)))
    found = [string(row.where, text, column(row, text)) for row in rows]
    scores = [_relevance(row, relevance) for row in rows] if relevance else None
    return Candidates(queries[0], found, scores, rows[0].where)


def writings(
    paths: Sequence[str | Path],
    source: str | None = None,
    target: str | None = None,
    columns: Sequence[str] | None = None,
) -> list[Writing]:
    """Return the sources with their targets of files with one pair per record.

    Args:
        source, target: columns. None: the first of SOURCES and of TARGETS that the files have. Without a
            column of targets, every target is None.
        columns: as in `records.records`.

    Raises:
        ValueError: a source or a target is missing or empty.
    """
    found = list(records(paths, columns))
    source = named(found, (source,) if source else SOURCES, "--source")
    target = named(found, (target,), "--target") if target else known(found, TARGETS)

    def item(record: Record) -> Writing:
        text = string(record.where, source, column(record, source, "--source"))
        wanted = string(record.where, target, column(record, target, "--target")) if target else None
        return Writing(text, wanted, record.where)

    return [item(record) for record in found]


def _bounded(where: str, name: str, value: Any) -> float:
    """Return a number whose square float32 can hold."""
    found = number(where, name, value)
    if abs(found) > LARGEST:
        raise ValueError(must(f"{where}: {name}", f"be from {-LARGEST:g} to {LARGEST:g}", value))
    return found


def _relevance(record: Record, name: str) -> float:
    value = _bounded(record.where, name, column(record, name))
    if value < 0:
        raise ValueError(must(f"{record.where}: {name}", "be 0 or more", value))
    return value
