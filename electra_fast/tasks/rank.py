"""Ranking: the candidates of a query, ordered by a model that reads both, a cross-encoder.

Source: Nogueira and Cho 2019, with the one output and the loss of sentence-transformers' CrossEncoder, which
loads the model.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from electra_fast.errors import must
from electra_fast.heads import SequenceClassifier
from electra_fast.modules import Layout
from electra_fast.tasks.classify import binary_loss
from electra_fast.tasks.examples import Examples, assemble, token_ids
from electra_fast.tasks.items import Candidates
from electra_fast.tasks.ranking import ranking
from electra_fast.tasks.readers import candidates
from electra_fast.tasks.task import Task


class Rank(Task):
    """The relevance of each candidate as a probability: the sigmoid of one output.

    The target is the relevance; if some are above 1, they are divided by the largest one, so that grades
    of 0 to 3 are 0, 1/3, 2/3 and 1. A prediction is a list of probabilities, one per candidate.
    """

    name, metric = "rank", "mrr@10"
    head_class = SequenceClassifier
    one_output = True

    def read(self, paths: Sequence[str], role: str) -> list[Candidates]:
        return candidates(paths)

    def learn(self, items: Sequence[Candidates]) -> None:
        self.labels = ("relevance",)
        found = {relevance > 0 for item in items for relevance in item.relevance or []}
        if found != {False, True}:
            rule, got = (
                "have relevant and other candidates",
                "only relevant ones" if True in found else "none",
            )
            raise ValueError(must(f"finetune: {items[0].where} and the rest of --train", rule, got))

    def unlabelled(self, items: Sequence[Candidates]) -> str | None:
        places = (item.where for item in items if item.relevance is None)
        return next((f"{where}: the candidates have no 'relevance'" for where in places), None)

    def texts(self, items: Sequence[Candidates]) -> Iterator[str]:
        for item in items:
            yield from (item.query, *item.candidates)

    def examples(self, items: Sequence[Candidates], tokenizer: Any) -> Examples:
        """Encode items, one sequence per candidate."""
        queries = token_ids([item.query for item in items], tokenizer)
        first = [query for query, item in zip(queries, items, strict=True) for _ in item.candidates]
        second = token_ids([text for item in items for text in item.candidates], tokenizer)
        examples = assemble(first, second, tokenizer, self.max_len)
        relevance = [x for item in items for x in item.relevance or [np.nan] * len(item.candidates)]
        largest = max([1.0, *(x for item in items for x in item.relevance or [])])
        examples.item_targets["targets"] = np.array(relevance, np.float32) / np.float32(largest)
        return examples

    def loss(self, logits: Tensor, layout: Layout, targets: Tensor) -> Tensor:
        return binary_loss(logits.squeeze(-1), targets)

    def predictions(
        self, logits: np.ndarray, examples: Examples, items: Sequence[Candidates]
    ) -> list[list[float]]:
        shares = iter(torch.from_numpy(logits[:, 0]).double().sigmoid().tolist())
        return [[next(shares) for _ in item.candidates] for item in items]

    def metrics(self, items: Sequence[Candidates], predictions: Sequence[list[float]]) -> dict[str, float]:
        return ranking([item.relevance for item in items], list(predictions))

    def record(self, item: Candidates, prediction: list[float]) -> dict[str, Any]:
        relevance = item.relevance or [None] * len(item.candidates)
        found = [
            {"text": text, "relevance": relevant, "score": score}
            for text, relevant, score in zip(item.candidates, relevance, prediction, strict=True)
        ]
        return {"query": item.query, "ranked": sorted(found, key=lambda each: -each["score"])}

    def error(self, item: Candidates, prediction: list[float]) -> float:
        return super().error(item, prediction) if any(item.relevance) else 0.0

    def shown(self, item: Candidates, prediction: list[float]) -> dict[str, Any]:
        ranked = self.record(item, prediction)["ranked"]
        rank = max(range(len(ranked)), key=lambda i: ranked[i]["relevance"])
        facts = {"most relevant": ranked[rank]["text"], "its rank": rank + 1}
        return {"query": item.query, "first": ranked[0]["text"]} | facts
