"""Classification, with one label per text and with several, and regression."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_tasks import (
    all_items,
    check_fixed_batches,
    check_gradients,
    model_of,
    of_hugging_face,
    padded,
    prepared,
    trained,
)

from electra_fast.tasks.classify import Classify, Labels
from electra_fast.tasks.items import Text
from electra_fast.tasks.regress import Regress

for package in ("sklearn", "scipy"):
    pytest.importorskip(package)
pytest_plugins = ["small_tokenizer"]
TEXTS = ("who sat ?", "the red cat sat .", "where is the blue bird in the rain ?", "dog")
PAIRS = ("a cat", "a dog ran in the rain", "who", None)
LABELS = {
    "one label": ["b", "a", "c", "a"],
    "several labels": [["b", "c"], [], ["a"], ["a", "b", "c"]],
    "scores": [0.5, -1.0, 2.0, 1.0],
}
PROBLEMS = ["single_label_classification", "multi_label_classification", "regression"]


def texts(labels):
    rows = zip(TEXTS, PAIRS, labels, strict=True)
    return [Text(*row, f"train.csv, line {i}") for i, row in enumerate(rows)]


@pytest.fixture(params=LABELS)
def name(request):
    return request.param


@pytest.fixture
def task(name):
    return (Regress if name == "scores" else Classify)(SimpleNamespace(glue=None))


def test_the_loss_is_that_of_transformers(name, task, tokenizer, tmp_path):
    items = texts(LABELS[name])
    examples = prepared(task, items, tokenizer)
    assert task.problem == PROBLEMS[list(LABELS).index(name)]
    (targets,) = map(torch.from_numpy, examples.item_targets.values())
    model = model_of(task)
    with torch.no_grad():
        loss = of_hugging_face(model.head, tmp_path)(**padded(examples), labels=targets).loss
    torch.testing.assert_close(model(**all_items(examples)).loss, loss)


def test_gradients_and_fixed_batches(name, task, tokenizer):
    examples = prepared(task, texts(LABELS[name]), tokenizer)
    model = model_of(task)
    check_fixed_batches(model, examples)
    check_gradients(model, examples)


def test_it_learns(name, task, tokenizer):
    items = texts(LABELS[name])
    found, metrics = trained(task, items, tokenizer, steps=100)
    assert metrics[task.metric] == pytest.approx(1, abs=1e-2)
    predicted = [task.record(item, each)["predicted"] for item, each in zip(items, found, strict=True)]
    assert predicted == (pytest.approx(LABELS[name], abs=0.3) if name == "scores" else LABELS[name])


def test_items_without_labels_have_no_loss(name, task, tokenizer):
    items = texts(LABELS[name])
    prepared(task, items, tokenizer)
    model = model_of(task)
    some = [*items[:2], *(item._replace(label=None) for item in items[2:])]
    losses = [model(**all_items(task.examples(each, tokenizer))).loss for each in (some, items[:2])]
    torch.testing.assert_close(*losses)
    assert task.unlabelled(items) is None and "line 2: the text has no label" in task.unlabelled(some)


def test_predictions_metrics_and_lines(tokenizer):
    task, items = Classify(SimpleNamespace(glue=None)), texts(LABELS["one label"])
    examples = prepared(task, items, tokenizer)
    logits = np.log(np.array([[1, 2, 1], [1, 2, 1], [1, 1, 2], [5, 4, 1]], np.float32))
    found = task.predictions(logits, examples, items)
    assert [each.labels for each in found] == [("b",), ("b",), ("c",), ("a",)]
    np.testing.assert_allclose(found[3].scores, [0.5, 0.4, 0.1], rtol=1e-6)
    assert task.metrics(items, found)["accuracy"] == 0.75
    assert task.error(items[1], found[1]) == pytest.approx(0.5 + 0.75)
    assert task.error(items[0], found[0]) == 0
    facts = {"label": "a", "predicted": "a", "score": pytest.approx(0.5)}
    assert task.record(items[3], found[3]) == {"text": "dog"} | facts
    assert task.record(items[0], found[0])["pair"] == "a cat"


def test_the_error_of_several_labels_counts_each_wrong_decision(tokenizer):
    task, items = Classify(SimpleNamespace(glue=None)), texts(LABELS["several labels"])
    prepared(task, items, tokenizer)
    assert task.error(items[0], Labels(("a", "b"), np.array([0.75, 1.0, 0.125]))) == 0.75 + (1 - 0.125)


def test_a_list_of_labels_is_refused_if_the_training_texts_have_one_each(tokenizer):
    task = Classify(SimpleNamespace(glue=None))
    prepared(task, texts(LABELS["one label"]), tokenizer)
    with pytest.raises(ValueError, match=r"line 0: the label must be one label, .* got \['b'\]"):
        task.check(texts([["b"]] * 4))
