"""Multiple choice: several sequences per item, and one cross entropy."""

import json

import numpy as np
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

from electra_fast.tasks.choose import Choose, Chosen
from electra_fast.tasks.examples import IGNORE
from electra_fast.tasks.items import Choice

pytest_plugins = ["small_tokenizer"]
ITEMS = [
    Choice("who sat ?", ["the red cat .", "rain", "blue of blue of blue"], 0, "train.csv, line 2"),
    Choice("what is in the rain ?", ["a", "the dog .", "when"], 1, "train.csv, line 3"),
    Choice("when ?", ["who", "where is the green bird ?", "in the rain"], 2, "train.csv, line 4"),
    Choice("what flew ?", ["bird", "ran", "sat"], 0, "train.csv, line 5"),
]


@pytest.fixture
def task():
    return Choose(OPTIONS)


def test_an_item_has_a_pair_per_option(task, tokenizer):
    examples = prepared(task, ITEMS, tokenizer)
    assert len(examples) == 4 and examples.group == 3 and examples.truncated == 0
    batch = examples.batch(np.array([3]))
    pieces = [tokenizer.id_to_token(i) for i in batch["ids"][: batch["cu_seqlens"][1]]]
    assert pieces == ["[CLS]", "what", "flew", "?", "[SEP]", "bird", "[SEP]"]
    assert len(batch["cu_seqlens"]) == 4 and batch["labels"].tolist() == [0]
    assert batch["type_ids"].tolist() == [0, 0, 0, 0, 0, 1, 1] * 3


def test_the_loss_is_that_of_transformers(task, tokenizer, tmp_path):
    examples = prepared(task, ITEMS, tokenizer)
    model = model_of(task)
    inputs = {name: x.unflatten(0, (4, 3)) for name, x in padded(examples).items()}
    labels = torch.from_numpy(examples.item_targets["labels"])
    with torch.no_grad():
        loss = of_hugging_face(model.head, tmp_path)(**inputs, labels=labels).loss
    torch.testing.assert_close(model(**all_items(examples)).loss, loss)


def test_gradients_and_fixed_batches(task, tokenizer):
    examples = prepared(task, ITEMS, tokenizer)
    model = model_of(task)
    check_fixed_batches(model, examples)
    # The bias of the score is the same for all options.
    check_gradients(model, examples, without={"head.score.bias"})


def test_it_learns(task, tokenizer):
    found, metrics = trained(task, ITEMS, tokenizer)
    assert [each.option for each in found] == [0, 1, 2, 0]
    assert metrics == {task.metric: 1}
    assert all(sum(each.scores) == pytest.approx(1) for each in found)


def test_predictions_metrics_and_lines(task, tokenizer):
    examples = prepared(task, ITEMS, tokenizer)
    logits = np.log(np.array([2, 1, 1, 1, 1, 2, 1, 2, 1, 5, 3, 2], np.float32))
    found = task.predictions(logits, examples, ITEMS)
    assert [each.option for each in found] == [0, 2, 1, 0]
    assert found[3].scores == pytest.approx([0.5, 0.3, 0.2])
    assert task.metrics(ITEMS, found) == {"accuracy": 0.5}
    record = json.loads(json.dumps(task.record(ITEMS[0], found[0])))
    assert record.pop("scores") == pytest.approx([0.5, 0.25, 0.25])
    options = ["the red cat .", "rain", "blue of blue of blue"]
    assert record == {"prompt": "who sat ?", "options": options, "label": 0, "predicted": 0}


def test_what_the_page_shows(task):
    found = Chosen(1, [0.25, 0.5, 0.25])
    assert [task.error(item, found) for item in ITEMS] == [0.75, 0, 0.75, 0.75]
    assert task.shown(ITEMS[0], found) == {
        "prompt": "who sat ?",
        "right": "the red cat .",
        "predicted": "rain",
        "score": 0.5,
    }


def test_majority_is_the_most_frequent_number(task):
    assert task.majority([ITEMS[1], ITEMS[1], ITEMS[0]], ITEMS) == {"accuracy": 1 / 3}


def test_labels_that_are_unknown(task, tokenizer):
    items = [ITEMS[0], ITEMS[1]._replace(label=None)]
    assert task.examples(items, tokenizer).item_targets["labels"].tolist() == [0, IGNORE]
    assert task.unlabelled(items) == "train.csv, line 3: the prompt has no 'label', the number of an option"


def test_another_number_of_options_is_refused(task):
    item = ITEMS[2]._replace(options=["a", "b"], label=1)
    with pytest.raises(
        ValueError, match=r"^train.csv, line 4 must have 3 options, as train.csv, line 2, got 2$"
    ):
        task.check([*ITEMS[:2], item])


def test_texts_and_files(task, tmp_path):
    file = tmp_path / "train.csv"
    file.write_text("startphrase,ending0,ending1,label\nwho sat ?,a cat,rain,0\n")
    items = task.read([file], "train")
    assert items == [Choice("who sat ?", ["a cat", "rain"], 0, items[0].where)]
    assert list(task.texts(items)) == ["who sat ?", "a cat", "rain"]
