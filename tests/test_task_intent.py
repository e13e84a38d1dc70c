"""Intents and slots: two outputs, and the sum of their losses."""

import json

import numpy as np
import pytest
import torch
from small_tasks import (
    CONFIG,
    OPTIONS,
    all_items,
    check_fixed_batches,
    check_gradients,
    model_of,
    of_hugging_face,
    padded,
    prepared,
    trained,
)

from electra_fast.heads import IntentClassifier, IntentLogits
from electra_fast.tasks.examples import IGNORE
from electra_fast.tasks.intent import Frame, Intent
from electra_fast.tasks.items import Utterance

pytest_plugins = ["small_tokenizer"]
ITEMS = [
    Utterance("play blue rain".split(), "music", "O B-song I-song".split(), "train.json, line 1"),
    Utterance("is rain in redly ?".split(), "weather", "O O O B-town O".split(), "train.json, line 2"),
    Utterance("play green".split(), "music", "O B-song".split(), "train.json, line 3"),
]


@pytest.fixture
def task():
    return Intent(OPTIONS)


def test_labels_and_targets(task, tokenizer):
    examples = prepared(task, ITEMS, tokenizer)
    assert task.labels == ("music", "weather")
    assert task.slot_labels == ("O", "B-song", "I-song", "B-town", "I-town")
    assert examples.item_targets["intents"].tolist() == [0, 1, 0]
    assert examples.token_targets["slots"][:5].tolist() == [IGNORE, 0, 1, 2, IGNORE]
    of_second = examples.batch(np.array([1]))["slots"].tolist()  # its fourth word has several wordpieces
    assert of_second == [IGNORE, 0, 0, 0, 3, IGNORE, IGNORE, 0, IGNORE]


def test_the_loss_is_the_sum_of_those_of_transformers(task, tokenizer, tmp_path):
    examples = prepared(task, ITEMS, tokenizer)
    model, inputs = model_of(task), padded(examples)
    slots = inputs["input_ids"].new_full(inputs["input_ids"].shape, IGNORE)
    targets = torch.from_numpy(examples.token_targets["slots"])
    slots = slots.masked_scatter(inputs["attention_mask"] > 0, targets)
    intents = torch.from_numpy(examples.item_targets["intents"])
    classifier = of_hugging_face(model.head, tmp_path / "intents")
    tagger = of_hugging_face(model.head.slot_tagger(), tmp_path / "slots")
    with torch.no_grad():
        expected = classifier(**inputs, labels=intents).loss + tagger(**inputs, labels=slots).loss
    torch.testing.assert_close(model(**all_items(examples)).loss, expected)


def test_gradients_and_fixed_batches(task, tokenizer):
    examples = prepared(task, ITEMS, tokenizer)
    model = model_of(task)
    check_fixed_batches(model, examples)
    check_gradients(model, examples)


def test_it_learns(task, tokenizer):
    found, metrics = trained(task, ITEMS, tokenizer)
    assert found == [Frame(item.intent, item.slots) for item in ITEMS]
    assert metrics == {"exact": 1, "intent_accuracy": 1, "slot_f1": 1} and next(iter(metrics)) == task.metric


def test_a_saved_model_has_the_labels(task, tokenizer, tmp_path):
    task.learn(ITEMS)
    task.head(CONFIG).save_pretrained(tmp_path)
    other = Intent(OPTIONS)
    other.use(json.loads((tmp_path / "config.json").read_text()))
    assert (other.labels, other.slot_labels) == (task.labels, task.slot_labels)
    loaded = IntentClassifier.from_pretrained(tmp_path)
    assert (loaded.labels, loaded.slot_labels) == (task.labels, task.slot_labels)


def test_predictions_are_those_of_the_first_wordpieces(task, tokenizer):
    examples = prepared(task, ITEMS, tokenizer)
    slots = np.zeros((len(examples.ids), 5), np.float32)
    slots[examples.token_targets["slots"] == IGNORE, 4] = 1
    slots[2, 1] = 1
    logits = IntentLogits(np.array([[0, 1], [0, 1], [1, 0]], np.float32), slots)
    found = task.predictions(logits, examples, ITEMS)
    assert found == [
        Frame("weather", ["O", "B-song", "O"]),
        Frame("weather", ["O"] * 5),
        Frame("music", ["O"] * 2),
    ]
    record = json.loads(json.dumps(task.record(ITEMS[0], found[0])))
    assert record == {
        "words": ["play", "blue", "rain"],
        "intent": "music",
        "predicted_intent": "weather",
        "slots": ["O", "B-song", "I-song"],
        "predicted_slots": ["O", "B-song", "O"],
    }


def test_metrics_and_majority(task):
    right = [Frame(item.intent, item.slots) for item in ITEMS]
    wrong_intent, wrong_slots = right[0]._replace(intent="weather"), right[1]._replace(slots=["O"] * 5)
    metrics = task.metrics(ITEMS, [wrong_intent, wrong_slots, right[2]])
    assert metrics == {"exact": 1 / 3, "intent_accuracy": 2 / 3, "slot_f1": pytest.approx(0.8)}
    # The same entities with I- instead of B- at their beginning are right.
    begun_with_i = [*right[:2], right[2]._replace(slots=["O", "I-song"])]
    assert task.metrics(ITEMS, begun_with_i) == task.metrics(ITEMS, right)
    assert task.metrics(ITEMS, right)["exact"] == 1
    majority = task.majority([ITEMS[1], ITEMS[1], ITEMS[0]], ITEMS)
    assert majority == {"exact": 0, "intent_accuracy": 1 / 3, "slot_f1": 0}


def test_unknown_labels(task, tokenizer):
    prepared(task, ITEMS, tokenizer)
    unknown = ITEMS[0]._replace(intent=None, slots=None)
    task.check([unknown])
    examples = task.examples([unknown], tokenizer)
    assert examples.item_targets["intents"].tolist() == [IGNORE]
    assert set(examples.token_targets["slots"].tolist()) == {IGNORE}
    for name in ("intent", "slots"):
        items = [ITEMS[1], ITEMS[0]._replace(**{name: None})]
        assert task.unlabelled(items) == f"train.json, line 1: the utterance has no '{name}'"


def test_what_the_page_shows(task):
    pytest.importorskip("sklearn")
    task.learn(ITEMS)
    found = [Frame("weather", ["O", "B-song", "O"]), *(Frame(x.intent, x.slots) for x in ITEMS[1:])]
    matrix, types = task.details(ITEMS, found)
    assert matrix.rows == [("music", 1, 1), ("weather", 0, 1)]
    assert [row[0] for row in types.rows] == ["song", "town"] and types.rows[0][1:3] == (0.5, 0.5)
    assert [task.error(*each) for each in zip(ITEMS, found, strict=True)] == [3, 0, 0]
    assert task.shown(ITEMS[0], found[0]) == {
        "text": "play blue rain",
        "intent": "music",
        "predicted intent": "weather",
        "slots": "blue rain (song)",
        "predicted slots": "blue (song)",
    }


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"intent": "joke"},
            "line 1: the label must be one of the labels in training: music, weather, got 'joke'",
        ),
        (
            {"slots": ["O", "B-x", "O"]},
            "line 1: the label must be one of the labels in training: O, .* got 'B-x'",
        ),
    ],
)
def test_labels_of_dev_that_train_does_not_have(task, changes, message):
    task.learn(ITEMS)
    with pytest.raises(ValueError, match=message):
        task.check([ITEMS[0]._replace(**changes)])


def test_training_needs_two_intents_and_slots(task):
    start = "finetune: train.json, line 1 and the rest of --train must have"
    with pytest.raises(ValueError, match=f"^{start} two intents, got 1; use tag for slots$"):
        task.learn([ITEMS[0], ITEMS[2]])
    with pytest.raises(ValueError, match=f"^{start} slots, got only O; use classify for intents$"):
        task.learn([item._replace(slots=["O"] * len(item.words)) for item in ITEMS])


def test_texts_and_files(task, tmp_path):
    parts = [{"text": "play "}, {"text": "blue rain", "entity": "song"}]
    (tmp_path / "train.json").write_text(json.dumps({"music": [{"data": parts}]}))
    (item,) = task.read([tmp_path / "train.json"], "train")
    assert item[:3] == ITEMS[0][:3]
    assert list(task.texts([item])) == ["play blue rain"]
