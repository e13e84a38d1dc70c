"""Tagging: one cross entropy per word, and words beyond the longest sequence."""

import pytest
import torch
from small_tasks import (
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

from electra_fast.tasks.examples import IGNORE
from electra_fast.tasks.items import Tagged
from electra_fast.tasks.tag import Tag

pytest_plugins = ["small_tokenizer"]
ITEMS = [
    Tagged(["the", "red", "cats", "sat"], ["O", "B-colour", "B-animal", "O"], "train.txt, line 1"),
    Tagged(["who"], ["O"], "train.txt, line 6"),
    Tagged(
        ["blue", "birds", "in", "the", "rain"], ["B-colour", "B-animal", "O", "O", "O"], "train.txt, line 8"
    ),
    Tagged(["a", "dog", "cat"], ["O", "B-animal", "I-animal"], "train.txt, line 14"),
]


@pytest.fixture
def task():
    return Tag(OPTIONS)


def test_the_loss_is_that_of_transformers(task, tokenizer, tmp_path):
    examples = prepared(task, ITEMS, tokenizer)
    assert task.labels == ("O", "B-animal", "I-animal", "B-colour", "I-colour")
    model, inputs = model_of(task), padded(examples)
    tags = torch.from_numpy(examples.token_targets["tags"])
    targets = torch.full(inputs["input_ids"].shape, IGNORE)
    targets = targets.masked_scatter(inputs["attention_mask"] > 0, tags)
    with torch.no_grad():
        loss = of_hugging_face(model.head, tmp_path)(**inputs, labels=targets).loss
    torch.testing.assert_close(model(**all_items(examples)).loss, loss)


def test_gradients_and_fixed_batches(task, tokenizer):
    examples = prepared(task, ITEMS, tokenizer)
    model = model_of(task)
    check_fixed_batches(model, examples)
    check_gradients(model, examples)


def test_it_learns(task, tokenizer):
    found, metrics = trained(task, ITEMS, tokenizer)
    assert found == [item.tags for item in ITEMS]
    assert metrics == {"f1": 1, "precision": 1, "recall": 1} and next(iter(metrics)) == task.metric


def test_errors_majority_and_lines(task, tokenizer):
    prepared(task, ITEMS, tokenizer)
    predicted = ["O", "O", "B-animal", "I-animal"]  # the colour is missed, the animal is too long
    assert task.error(ITEMS[0], predicted) == 3
    assert task.record(ITEMS[0], predicted)["predicted"] == predicted
    assert task.majority(ITEMS, ITEMS) == {"f1": 0, "precision": 0, "recall": 0}
    with pytest.raises(
        ValueError, match=r"line 6: the label must be one of the labels in training: O, .* got 'B-place'"
    ):
        task.check([ITEMS[1]._replace(tags=["B-place"])])
    with pytest.raises(ValueError, match=r"line 6 and the rest of --train must have tags, got only O"):
        task.learn([ITEMS[1]])
