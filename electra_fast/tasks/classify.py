"""Classification: one label per text or pair of texts, or several labels."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from electra_fast.errors import must
from electra_fast.heads import SequenceClassifier
from electra_fast.modules import Layout
from electra_fast.tasks import scores
from electra_fast.tasks.details import Section, confusion_section, label_section
from electra_fast.tasks.examples import IGNORE, Examples
from electra_fast.tasks.glue import GLUE
from electra_fast.tasks.items import Text
from electra_fast.tasks.task import Task
from electra_fast.tasks.texts import encode_texts, read_texts, texts_of, unlabelled


class Labels(NamedTuple):
    """A prediction."""

    labels: tuple[str, ...]  # one; with several labels per text, any number of them
    scores: np.ndarray  # [C] float64, the probability of each output


class Classify(Task):
    """One label per text. With ``--separator``, or lists of labels in the file, several labels per text."""

    name, metric = "classify", "accuracy"
    head_class = SequenceClassifier
    problem = "single_label_classification"

    def __init__(self, options: Any):
        super().__init__(options)
        if options.glue:
            self.metric = GLUE[options.glue].metrics[0]

    def read(self, paths: Sequence[str], role: str) -> list[Text]:
        return read_texts(self.options, paths, role)

    def learn(self, items: Sequence[Text]) -> None:
        if isinstance(items[0].label, list):
            self.use_several_labels()
        found = {label for item in items for label in known_labels(item)}
        order = GLUE[self.options.glue].labels if self.options.glue else ()
        self.labels = tuple(label for label in order if label in found) or ordered(found)
        if len(self.labels) < 2:
            got = f"only {self.labels[0]!r}" if self.labels else "none"
            raise ValueError(
                must(f"finetune: {items[0].where} and the rest of --train", "have two labels", got)
            )

    def use(self, described: dict[str, Any]) -> None:
        super().use(described)
        if described.get("problem_type") == "multi_label_classification":
            self.use_several_labels()

    def use_several_labels(self) -> None:
        self.metric, self.problem = "f1_micro", "multi_label_classification"

    @property
    def several(self) -> bool:
        return self.problem == "multi_label_classification"

    def check(self, items: Sequence[Text]) -> None:
        for item in items:
            if isinstance(item.label, list) and not self.several:
                rule = "be one label, because the model has one label per text"
                raise ValueError(must(f"{item.where}: the label", rule, repr(item.label)))
            check_labels(known_labels(item), self.labels, item.where)

    def unlabelled(self, items: Sequence[Text]) -> str | None:
        return unlabelled(items)

    def texts(self, items: Sequence[Text]) -> Iterator[str]:
        return texts_of(items)

    def examples(self, items: Sequence[Text], tokenizer: Any) -> Examples:
        examples = encode_texts(items, tokenizer, self.max_len)
        if self.several:
            targets = self._flags(map(known_labels, items)).astype(np.float32)
            targets[[item.label is None for item in items]] = np.nan
        else:
            number = {label: i for i, label in enumerate(self.labels)}
            targets = np.array([number.get(item.label, IGNORE) for item in items])
        examples.item_targets["labels"] = targets
        return examples

    def loss(self, logits: Tensor, layout: Layout, labels: Tensor) -> Tensor:
        if self.several:
            return binary_loss(logits, labels)
        return cross_entropy(logits.float(), labels, ignore_index=IGNORE)

    def predictions(self, logits: np.ndarray, examples: Examples, items: Sequence[Text]) -> list[Labels]:
        names = np.array(self.labels)
        if self.several:
            shares = 1 / (1 + np.exp(-logits.astype(np.float64)))
            chosen = [tuple(names[row > 0.5].tolist()) for row in shares]
        else:
            shares = np.exp(logits - logits.max(1, keepdims=True), dtype=np.float64)
            shares /= shares.sum(1, keepdims=True)
            chosen = [(self.labels[i],) for i in logits.argmax(1)]
        return [Labels(*each) for each in zip(chosen, shares, strict=True)]

    def metrics(self, items: Sequence[Text], predictions: Sequence[Labels]) -> dict[str, float]:
        true, chosen = map(known_labels, items), (found.labels for found in predictions)
        if self.several:
            return scores.several_labels(self._flags(true), self._flags(chosen))
        return scores.one_label(self._numbers(true), self._numbers(chosen), len(self.labels))

    def record(self, item: Text, prediction: Labels) -> dict[str, Any]:
        pair = {} if item.pair is None else {"pair": item.pair}
        if self.several:
            return {"text": item.text} | pair | {"labels": item.label, "predicted": list(prediction.labels)}
        (label,) = prediction.labels
        facts = {"label": item.label, "predicted": label, "score": self._score(prediction, label)}
        return {"text": item.text} | pair | facts

    def majority(self, items: Sequence[Text], train: Sequence[Text]) -> dict[str, float]:
        counts = Counter(label for item in train for label in known_labels(item))
        most = Labels((counts.most_common(1)[0][0],), np.empty(0))
        return self.metrics(items, [most] * len(items))

    def details(self, items: Sequence[Text], predictions: Sequence[Labels]) -> list[Section]:
        true, chosen = [known_labels(item) for item in items], [found.labels for found in predictions]
        is_true, is_chosen = self._flags(true), self._flags(chosen)
        counts = (is_true & is_chosen).sum(0), is_chosen.sum(0), is_true.sum(0)
        by_label = label_section(self.labels, *counts)
        if self.several:
            return [by_label]
        matrix = scores.confusion(self._numbers(true), self._numbers(chosen), len(self.labels))
        pairs = zip(items, predictions, strict=True)
        texts = {(item.label, *prediction.labels): item.text for item, prediction in pairs}
        return [confusion_section(self.labels, matrix, texts), by_label]

    def error(self, item: Text, prediction: Labels) -> float:
        """Return the sum of the probabilities of all wrong decisions."""
        missed = sorted(set(known_labels(item)) - set(prediction.labels))
        wrong = sorted(set(prediction.labels) - set(known_labels(item)))
        return sum(self._score(prediction, label) for label in wrong) + sum(
            1 - self._score(prediction, label) for label in missed
        )

    def _score(self, prediction: Labels, label: str) -> float:
        return float(prediction.scores[self.labels.index(label)])

    def _numbers(self, found: Iterable[Sequence[str]]) -> np.ndarray:
        """Return the number of the one label of each item, ``[N]``."""
        number = {label: i for i, label in enumerate(self.labels)}
        return np.array([number[label] for (label,) in found])

    def _flags(self, found: Iterable[Sequence[str]]) -> np.ndarray:
        """Return whether an item has a label, bool ``[N, C]``."""
        number, found = {label: i for i, label in enumerate(self.labels)}, list(found)
        flags = np.zeros((len(found), len(number)), bool)
        for row, labels in zip(flags, found, strict=True):
            row[[number[label] for label in labels]] = True
        return flags


def binary_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean of the binary cross entropies over the known targets, in 0 … 1; NaN: unknown."""
    known = ~targets.isnan()
    targets = torch.where(known, targets, 0.0)
    total = binary_cross_entropy_with_logits(logits.float(), targets, known.float(), reduction="sum")
    return total / known.sum().clamp(min=1)


def known_labels(item: Text) -> list[str]:
    """Return the labels of an item, an empty list if they are unknown."""
    if item.label is None:
        return []
    return item.label if isinstance(item.label, list) else [item.label]


def ordered(labels: set[str]) -> tuple[str, ...]:
    """Return labels in the order of their outputs: by number if all are integers, otherwise by name."""
    if all(re.fullmatch(r"-?[0-9]{1,18}", label) for label in labels):
        return tuple(sorted(labels, key=lambda label: (int(label), label)))  # 1 and 01 are two labels
    return tuple(sorted(labels))


def check_labels(found: Sequence[str], known: Sequence[str], where: str) -> None:
    """Raise ValueError if a label is not among those of the training data."""
    for label in dict.fromkeys(found):
        if label not in known:
            shown = ", ".join(known[:5]) + (", …" if len(known) > 5 else "")
            raise ValueError(
                must(f"{where}: the label", f"be one of the labels in training: {shown}", repr(label))
            )
