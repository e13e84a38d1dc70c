"""What a user wants: one intent per utterance, and slots as BIO tags of its words.

Source: the joint model of Chen et al. 2019.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor
from torch.nn.functional import cross_entropy

from electra_fast.config import ElectraConfig
from electra_fast.errors import must
from electra_fast.heads import IntentClassifier, IntentLogits
from electra_fast.modules import Layout
from electra_fast.tasks import scores
from electra_fast.tasks.classify import check_labels, ordered
from electra_fast.tasks.details import Section, confusion_section, entity_section, entity_texts
from electra_fast.tasks.entities import entities, entity_scores
from electra_fast.tasks.examples import IGNORE, Examples
from electra_fast.tasks.items import Utterance
from electra_fast.tasks.tagged import utterances
from electra_fast.tasks.task import Task
from electra_fast.tasks.words import OUTSIDE, encode_words, tag_labels, tag_targets, word_tags


class Frame(NamedTuple):
    """A prediction."""

    intent: str
    slots: list[str]  # the tag of each word


class Intent(Task):
    """The sum of two cross entropies, of the intent and of the slots."""

    name, metric = "intent", "exact"
    head_class = IntentClassifier

    def __init__(self, options: Any):
        super().__init__(options)
        self.slot_labels: tuple[str, ...] = ()

    def read(self, paths: Sequence[str], role: str) -> list[Utterance]:
        return utterances(paths, repair=bool(self.options.repair))

    def learn(self, items: Sequence[Utterance]) -> None:
        self.labels = ordered({item.intent for item in items if item.intent is not None})
        self.slot_labels = tag_labels(tag for item in items for tag in item.slots or [])
        where = f"finetune: {items[0].where} and the rest of --train"
        if len(self.labels) < 2:
            raise ValueError(must(where, "have two intents", len(self.labels), "use tag for slots"))
        if len(self.slot_labels) < 2:
            raise ValueError(must(where, "have slots", "only O", "use classify for intents"))

    def use(self, described: dict[str, Any]) -> None:
        super().use(described)
        self.slot_labels = tuple(described.get("slot_labels", ()))

    def outputs(self) -> list[tuple[str, ...]]:
        return [self.labels, self.slot_labels]

    def check(self, items: Sequence[Utterance]) -> None:
        for item in items:
            check_labels([] if item.intent is None else [item.intent], self.labels, item.where)
            check_labels(item.slots or [], self.slot_labels, item.where)

    def unlabelled(self, items: Sequence[Utterance]) -> str | None:
        for item in items:
            for name, label in (("intent", item.intent), ("slots", item.slots)):
                if label is None:
                    return f"{item.where}: the utterance has no {name!r}"
        return None

    def texts(self, items: Sequence[Utterance]) -> Iterator[str]:
        return (" ".join(item.words) for item in items)

    def head(self, config: ElectraConfig) -> IntentClassifier:
        return IntentClassifier(config, self.labels, self.slot_labels)

    def examples(self, items: Sequence[Utterance], tokenizer: Any) -> Examples:
        examples = encode_words([item.words for item in items], tokenizer, self.max_len)
        number = {intent: i for i, intent in enumerate(self.labels)}
        examples.item_targets["intents"] = np.array([number.get(item.intent, IGNORE) for item in items])
        examples.token_targets["slots"] = tag_targets(
            examples, [item.slots for item in items], self.slot_labels
        )
        return examples

    def loss(self, logits: IntentLogits, layout: Layout, intents: Tensor, slots: Tensor) -> Tensor:
        return cross_entropy(logits.intents.float(), intents, ignore_index=IGNORE) + cross_entropy(
            logits.slots.float(), slots, ignore_index=IGNORE
        )

    def predictions(
        self, logits: IntentLogits, examples: Examples, items: Sequence[Utterance]
    ) -> list[Frame]:
        intents = [self.labels[i] for i in logits.intents.argmax(1)]
        slots = word_tags(logits.slots, examples, self.slot_labels)
        return [Frame(*each) for each in zip(intents, slots, strict=True)]

    def metrics(self, items: Sequence[Utterance], predictions: Sequence[Frame]) -> dict[str, float]:
        """Return the share of utterances with the right intent and slots, and the scores of both.

        The slots are right if the same words have the same types, as in `entity_scores`.
        """
        pairs = list(zip(items, predictions, strict=True))
        intents = np.array([item.intent == found.intent for item, found in pairs])
        slots = np.array([entities(item.slots) == entities(found.slots) for item, found in pairs])
        slot_scores = entity_scores([item.slots for item in items], [found.slots for found in predictions])
        return {
            "exact": float(np.mean(intents & slots)),
            "intent_accuracy": float(np.mean(intents)),
            "slot_f1": slot_scores["f1"],
        }

    def record(self, item: Utterance, prediction: Frame) -> dict[str, Any]:
        return {
            "words": item.words,
            "intent": item.intent,
            "predicted_intent": prediction.intent,
            "slots": item.slots,
            "predicted_slots": prediction.slots,
        }

    def majority(self, items: Sequence[Utterance], train: Sequence[Utterance]) -> dict[str, float]:
        ((most, _),) = Counter(item.intent for item in train).most_common(1)
        return self.metrics(items, [Frame(most, [OUTSIDE] * len(item.words)) for item in items])

    def details(self, items: Sequence[Utterance], predictions: Sequence[Frame]) -> list[Section]:
        number = {intent: i for i, intent in enumerate(self.labels)}
        pairs = [(item.intent, found.intent) for item, found in zip(items, predictions, strict=True)]
        true, chosen = np.array([[number[intent] for intent in pair] for pair in pairs]).T
        texts = {pair: " ".join(item.words) for pair, item in zip(pairs, items, strict=True)}
        return [
            confusion_section(self.labels, scores.confusion(true, chosen, len(number)), texts),
            entity_section([item.slots for item in items], [found.slots for found in predictions]),
        ]

    def error(self, item: Utterance, prediction: Frame) -> float:
        """Return the number of missed and wrong slots, and 1 more for a wrong intent."""
        return (item.intent != prediction.intent) + len(entities(item.slots) ^ entities(prediction.slots))

    def shown(self, item: Utterance, prediction: Frame) -> dict[str, Any]:
        return {
            "text": " ".join(item.words),
            "intent": item.intent,
            "predicted intent": prediction.intent,
            "slots": entity_texts(item.words, item.slots),
            "predicted slots": entity_texts(item.words, prediction.slots),
        }
