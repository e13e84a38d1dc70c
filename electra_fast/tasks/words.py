"""Words with tags: a word has the tag that is predicted at its first wordpiece."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from electra_fast import data
from electra_fast.tasks.examples import IGNORE, Examples, assemble, encodings

OUTSIDE = "O"


def encode_words(words: Sequence[Sequence[str]], tokenizer: Any, max_len: int) -> Examples:
    """Return the sequences of sentences that are split into words.

    `aligned` has the offset in ``ids`` of the first wordpiece of each word, for each sentence; -1 if the
    sequence was too long for the word. A word of characters that the tokenizer removes is [UNK].
    """
    unknown = data.special_ids(tokenizer)["[UNK]"]
    sentences = [list(sentence) for sentence in words]
    ids, starts = [], []
    for sentence, encoding in zip(words, encodings(sentences, tokenizer, is_pretokenized=True), strict=True):
        pieces: list[list[int]] = [[] for _ in sentence]
        for word, i in zip(encoding.word_ids, encoding.ids, strict=True):
            pieces[word].append(i)
        pieces = [found or [unknown] for found in pieces]
        ids.append([i for found in pieces for i in found])
        starts.append(np.cumsum([1, *map(len, pieces)])[:-1])  # after [CLS]
    examples = assemble(ids, None, tokenizer, max_len)
    begin, end = examples.offsets[:-1], examples.offsets[1:] - 1  # of the words: [SEP] is the last token
    examples.aligned = [
        np.where(start + first < last, start + first, -1)
        for start, first, last in zip(starts, begin, end, strict=True)
    ]
    return examples


def tag_labels(tags: Iterable[str]) -> tuple[str, ...]:
    """Return the tags in the order of their outputs: O, then by type, B before I.

    A type that occurs only in entities of one word has I too, so that every entity can be predicted.
    """
    types = sorted({tag[2:] for tag in tags if tag != OUTSIDE})
    return (OUTSIDE, *(f"{prefix}-{type_}" for type_ in types for prefix in "BI"))


def tag_targets(
    examples: Examples, tags: Sequence[Sequence[str] | None], labels: Sequence[str]
) -> np.ndarray:
    """Return the class of each token, int64 ``[T]``: that of its word at the first wordpiece, else IGNORE."""
    number = {label: i for i, label in enumerate(labels)}
    targets = np.full(len(examples.ids), IGNORE)
    for positions, sentence in zip(examples.aligned, tags, strict=True):
        if sentence is not None:
            inside = positions >= 0
            targets[positions[inside]] = np.array([number[tag] for tag in sentence])[inside]
    return targets


def word_tags(logits: np.ndarray, examples: Examples, labels: Sequence[str]) -> list[list[str]]:
    """Return the tag of each word from the logits of all tokens, ``[T, C]``; O for words cut off."""
    best = logits.argmax(1)
    return [[labels[best[t]] if t >= 0 else OUTSIDE for t in positions] for positions in examples.aligned]
