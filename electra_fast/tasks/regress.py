"""Regression: one score per text or pair of texts, such as the similarity of STS-B."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from electra_fast.heads import SequenceClassifier
from electra_fast.modules import Layout
from electra_fast.tasks import scores
from electra_fast.tasks.examples import Examples
from electra_fast.tasks.glue import GLUE
from electra_fast.tasks.items import Text
from electra_fast.tasks.task import Task
from electra_fast.tasks.texts import encode_texts, read_texts, texts_of, unlabelled


class Regress(Task):
    """The squared error of one output."""

    name, metric = "regress", "pearson"
    head_class = SequenceClassifier
    problem = "regression"
    one_output = True
    epochs = 10

    def __init__(self, options: Any):
        super().__init__(options)
        if options.glue:
            self.metric = GLUE[options.glue].metrics[0]

    def read(self, paths: Sequence[str], role: str) -> list[Text]:
        return read_texts(self.options, paths, role, score=True)

    def learn(self, items: Sequence[Text]) -> None:
        self.labels = ("score",)

    def unlabelled(self, items: Sequence[Text]) -> str | None:
        return unlabelled(items)

    def texts(self, items: Sequence[Text]) -> Iterator[str]:
        return texts_of(items)

    def examples(self, items: Sequence[Text], tokenizer: Any) -> Examples:
        examples = encode_texts(items, tokenizer, self.max_len)
        known = [np.nan if item.label is None else item.label for item in items]
        examples.item_targets["targets"] = np.array(known, np.float32)
        return examples

    def loss(self, logits: Tensor, layout: Layout, targets: Tensor) -> Tensor:
        known = ~targets.isnan()
        errors = torch.where(known, logits.float().squeeze(-1) - torch.where(known, targets, 0.0), 0.0)
        return errors.square().sum() / known.sum().clamp(min=1)

    def predictions(self, logits: np.ndarray, examples: Examples, items: Sequence[Text]) -> list[float]:
        return logits[:, 0].tolist()

    def metrics(self, items: Sequence[Text], predictions: Sequence[float]) -> dict[str, float]:
        return scores.regression(np.array([item.label for item in items]), np.array(predictions))

    def error(self, item: Text, prediction: float) -> float:
        return abs(item.label - prediction)

    def record(self, item: Text, prediction: float) -> dict[str, Any]:
        pair = {} if item.pair is None else {"pair": item.pair}
        return {"text": item.text} | pair | {"score": item.label, "predicted": prediction}
