"""Tagging: one BIO tag per word, on the first wordpiece of the word."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.nn.functional import cross_entropy

from electra_fast.errors import must
from electra_fast.heads import TokenClassifier
from electra_fast.modules import Layout
from electra_fast.tasks import entities
from electra_fast.tasks.classify import check_labels
from electra_fast.tasks.details import Section, entity_section, entity_texts
from electra_fast.tasks.examples import IGNORE, Examples
from electra_fast.tasks.items import Tagged
from electra_fast.tasks.tagged import tagged
from electra_fast.tasks.task import Task
from electra_fast.tasks.words import encode_words, tag_labels, tag_targets, word_tags


class Tag(Task):
    """Named entities and other spans. Words beyond the longest sequence are predicted as O."""

    name, metric = "tag", "f1"
    head_class = TokenClassifier

    def read(self, paths: Sequence[str], role: str) -> list[Tagged]:
        return tagged(paths, repair=bool(self.options.repair))

    def learn(self, items: Sequence[Tagged]) -> None:
        self.labels = tag_labels(tag for item in items for tag in item.tags or [])
        if len(self.labels) < 2:
            raise ValueError(
                must(f"finetune: {items[0].where} and the rest of --train", "have tags", "only O")
            )

    def check(self, items: Sequence[Tagged]) -> None:
        for item in items:
            check_labels(item.tags or [], self.labels, item.where)

    def unlabelled(self, items: Sequence[Tagged]) -> str | None:
        places = (item.where for item in items if item.tags is None)
        return next((f"{where}: the sentence has no tags" for where in places), None)

    def texts(self, items: Sequence[Tagged]) -> Iterator[str]:
        return (" ".join(item.words) for item in items)

    def examples(self, items: Sequence[Tagged], tokenizer: Any) -> Examples:
        examples = encode_words([item.words for item in items], tokenizer, self.max_len)
        examples.token_targets["tags"] = tag_targets(examples, [item.tags for item in items], self.labels)
        return examples

    def loss(self, logits: Tensor, layout: Layout, tags: Tensor) -> Tensor:
        return cross_entropy(logits.float(), tags, ignore_index=IGNORE)

    def predictions(self, logits: np.ndarray, examples: Examples, items: Sequence[Tagged]) -> list[list[str]]:
        return word_tags(logits, examples, self.labels)

    def metrics(self, items: Sequence[Tagged], predictions: Sequence[list[str]]) -> dict[str, float]:
        return entities.entity_scores([item.tags for item in items], predictions)

    def record(self, item: Tagged, prediction: list[str]) -> dict[str, Any]:
        return {"words": item.words, "tags": item.tags, "predicted": prediction}

    def majority(self, items: Sequence[Tagged], train: Sequence[Tagged]) -> dict[str, float]:
        return self.metrics(items, [["O"] * len(item.words) for item in items])

    def details(self, items: Sequence[Tagged], predictions: Sequence[list[str]]) -> list[Section]:
        return [entity_section([item.tags for item in items], list(predictions))]

    def error(self, item: Tagged, prediction: list[str]) -> float:
        """Return the number of missed and wrong entities."""
        return len(entities.entities(item.tags) ^ entities.entities(prediction))

    def shown(self, item: Tagged, prediction: list[str]) -> dict[str, Any]:
        found = {
            "entities": entity_texts(item.words, item.tags),
            "predicted": entity_texts(item.words, prediction),
        }
        return {"text": " ".join(item.words)} | found
