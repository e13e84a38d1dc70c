"""Tables about the predictions of a model, for the page about its run."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from electra_fast.pages import Cell
from electra_fast.tasks import entities

MOST = 20  # rows of a table, and labels of a confusion matrix


class Section(NamedTuple):
    title: str
    head: tuple[str, ...]  # the names of the columns
    rows: list[tuple[Cell, ...]]
    note: str = ""  # a sentence about the table
    matrix: bool = False  # the rows are a name and the counts of a square matrix, to be coloured


def confusion_section(
    labels: Sequence[str], matrix: np.ndarray, texts: Mapping[tuple[str, str], str]
) -> Section:
    """Return the confusion matrix, or the most confused pairs if there are more than 20 labels.

    Args:
        labels: C names.
        matrix: ``[C, C]``, int, the result of `scores.confusion`.
        texts: a text for each (label, predicted) that occurs.
    """
    if len(labels) <= MOST:
        rows = [(label, *counts) for label, counts in zip(labels, matrix.tolist(), strict=True)]
        note = "A row is a label, a column what was predicted. The colour is the share of the row."
        return Section("Confusion matrix", ("", *labels), rows, note, matrix=True)
    wrong = matrix - np.diag(matrix.diagonal())
    most = np.argsort(-wrong, axis=None, kind="stable")[:MOST]
    found = [(i, j) for i, j in zip(*np.unravel_index(most, wrong.shape), strict=True) if wrong[i, j]]
    rows = [(labels[i], labels[j], int(wrong[i, j]), texts[labels[i], labels[j]]) for i, j in found]
    return Section("Labels that are confused most often", ("label", "predicted", "items", "example"), rows)


def label_section(
    labels: Sequence[str], right: np.ndarray, predicted: np.ndarray, true: np.ndarray
) -> Section:
    """Return the labels with the lowest F1 among those that occur.

    Args:
        labels: C names.
        right, predicted, true: ``[C]``, int: the items for which each label was predicted rightly, was
            predicted, and is true.
    """
    rows = [
        (
            label,
            hits / found if found else 0.0,
            hits / wanted if wanted else 0.0,
            2 * hits / (found + wanted),
            wanted,
        )
        for label, hits, found, wanted in zip(
            labels, right.tolist(), predicted.tolist(), true.tolist(), strict=True
        )
        if found + wanted
    ]
    rows.sort(key=lambda row: row[3])
    return Section("Labels with the lowest F1", ("label", "precision", "recall", "F1", "items"), rows[:MOST])


def entity_section(true: list[list[str]], predicted: list[list[str]]) -> Section:
    """Return precision, recall and F1 of each type of entity; the arguments are those of `per_type`."""
    rows = [
        (type, found["precision"], found["recall"], found["f1"], found["support"])
        for type, found in entities.per_type(true, predicted).items()
    ]
    return Section("Types of entities", ("type", "precision", "recall", "F1", "entities"), rows)


def entity_texts(words: Sequence[str], tags: list[str]) -> str:
    """Return the entities of a sentence: "Ada Lovelace (person), London (place)"."""
    found = sorted(entities.entities(tags), key=lambda entity: entity[1])
    return ", ".join(f"{' '.join(words[start:end])} ({type})" for type, start, end in found) or "none"
