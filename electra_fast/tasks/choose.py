"""Multiple choice: which of several options fits a prompt."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from electra_fast.errors import must
from electra_fast.heads import NO_LABELS, MultipleChoice
from electra_fast.modules import Layout
from electra_fast.tasks.examples import IGNORE, Examples, assemble, token_ids
from electra_fast.tasks.items import Choice
from electra_fast.tasks.readers import choices
from electra_fast.tasks.task import Task


class Chosen(NamedTuple):
    """A prediction."""

    option: int
    scores: list[float]  # the probability of each option


class Choose(Task):
    """One score per pair of prompt and option; all prompts have the same number of options."""

    name, metric = "choose", "accuracy"
    head_class = MultipleChoice

    def read(self, paths: Sequence[str], role: str) -> list[Choice]:
        return choices(paths)

    def learn(self, items: Sequence[Choice]) -> None:
        self.labels = NO_LABELS

    def check(self, items: Sequence[Choice]) -> None:
        first = items[0]
        for item in items:
            if len(item.options) != len(first.options):
                rule = f"have {len(first.options)} options, as {first.where}"
                raise ValueError(must(item.where, rule, len(item.options)))

    def unlabelled(self, items: Sequence[Choice]) -> str | None:
        places = (item.where for item in items if item.label is None)
        return next(
            (f"{where}: the prompt has no 'label', the number of an option" for where in places), None
        )

    def texts(self, items: Sequence[Choice]) -> Iterator[str]:
        for item in items:
            yield from (item.prompt, *item.options)

    def examples(self, items: Sequence[Choice], tokenizer: Any) -> Examples:
        """Encode items, one sequence per option."""
        prompts = token_ids([item.prompt for item in items], tokenizer)
        first = [prompt for prompt, item in zip(prompts, items, strict=True) for _ in item.options]
        second = token_ids([option for item in items for option in item.options], tokenizer)
        examples = assemble(first, second, tokenizer, self.max_len)
        examples.group = len(items[0].options)
        labels = [IGNORE if item.label is None else item.label for item in items]
        examples.item_targets["labels"] = np.array(labels)
        return examples

    def loss(self, logits: Tensor, layout: Layout, labels: Tensor) -> Tensor:
        return cross_entropy(logits.float().view(len(labels), -1), labels, ignore_index=IGNORE)

    def predictions(self, logits: np.ndarray, examples: Examples, items: Sequence[Choice]) -> list[Chosen]:
        shares = torch.from_numpy(logits).double().view(-1, examples.group).softmax(1)
        return [Chosen(int(row.argmax()), row.tolist()) for row in shares]

    def metrics(self, items: Sequence[Choice], predictions: Sequence[Chosen]) -> dict[str, float]:
        right = [item.label == found.option for item, found in zip(items, predictions, strict=True)]
        return {"accuracy": float(np.mean(right))}

    def record(self, item: Choice, prediction: Chosen) -> dict[str, Any]:
        facts = {"label": item.label, "predicted": prediction.option}
        return {"prompt": item.prompt, "options": item.options} | facts | {"scores": prediction.scores}

    def majority(self, items: Sequence[Choice], train: Sequence[Choice]) -> dict[str, float]:
        ((most, _),) = Counter(item.label for item in train).most_common(1)
        return self.metrics(items, [Chosen(most, [])] * len(items))

    def error(self, item: Choice, prediction: Chosen) -> float:
        """Return the probability of the wrong options if one of them was chosen."""
        return 0.0 if item.label == prediction.option else 1 - prediction.scores[item.label]

    def shown(self, item: Choice, prediction: Chosen) -> dict[str, Any]:
        right, chosen = item.options[item.label], item.options[prediction.option]
        score = prediction.scores[prediction.option]
        return {"prompt": item.prompt, "right": right, "predicted": chosen, "score": score}
