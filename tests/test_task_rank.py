"""Ranking: pairs of a query and a candidate, scored by one output."""

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
from torch.nn.functional import binary_cross_entropy_with_logits

from electra_fast.tasks.items import Candidates
from electra_fast.tasks.rank import Rank

pytest_plugins = ["small_tokenizer"]
ITEMS = [
    Candidates(
        "who sat ?", ["rain", "the red cat sat in the rain .", "when"], [0, 1, 0], "train.tsv, line 2"
    ),
    Candidates("what flew ?", ["the blue bird flew ."], [1], "train.tsv, line 5"),
    Candidates("what is green ?", ["a dog ran", "green"], [0, 1], "train.tsv, line 6"),
]


@pytest.fixture
def task():
    return Rank(OPTIONS)


def targets(task, tokenizer, *relevance):
    items = [
        item._replace(relevance=each, candidates=["rain"] * len(each or "x"))
        for item, each in zip(ITEMS, relevance, strict=False)
    ]
    return task.examples(items, tokenizer).item_targets["targets"]


def test_each_candidate_is_a_sequence(task, tokenizer):
    examples = prepared(task, ITEMS, tokenizer)
    assert len(examples) == 6 and examples.group == 1
    batch = examples.batch(np.array([3]))
    pieces = [tokenizer.id_to_token(i) for i in batch["ids"]]
    assert pieces == ["[CLS]", "what", "flew", "?", "[SEP]", "the", "blue", "bird", "flew", ".", "[SEP]"]
    assert batch["type_ids"].sum() == 6
    assert examples.item_targets["targets"].tolist() == [0, 1, 0, 1, 0, 1]
    assert examples.item_targets["targets"].dtype == np.float32


def test_grades_are_divided_by_the_largest(task, tokenizer):
    assert targets(task, tokenizer, [0, 1, 4], [2]).tolist() == [0, 0.25, 1, 0.5]
    assert targets(task, tokenizer, [0, 0.5], [0.25]).tolist() == [0, 0.5, 0.25]
    assert np.isnan(targets(task, tokenizer, None)).all()


def test_transformers_loads_the_model_and_the_loss_is_that_of_a_cross_encoder(task, tokenizer, tmp_path):
    examples = prepared(task, ITEMS, tokenizer)
    model = model_of(task)
    theirs = of_hugging_face(model.head, tmp_path)
    assert theirs.config.num_labels == 1 and theirs.config.problem_type is None
    assert theirs.config.id2label == {0: "relevance"}
    with torch.no_grad():
        logits = theirs(**padded(examples)).logits.view(-1)
    known = torch.from_numpy(examples.item_targets["targets"])
    loss = model(**all_items(examples)).loss
    torch.testing.assert_close(loss, binary_cross_entropy_with_logits(logits, known))


def test_gradients_and_fixed_batches(task, tokenizer):
    examples = prepared(task, ITEMS, tokenizer)
    model = model_of(task)
    check_fixed_batches(model, examples)
    check_gradients(model, examples)


def test_it_learns(task, tokenizer):
    found, metrics = trained(task, ITEMS, tokenizer)
    assert [np.argmax(each) for each in found] == [1, 0, 1]
    assert metrics == {"mrr@10": 1, "ndcg@10": 1, "map": 1} and next(iter(metrics)) == task.metric


def test_predictions_metrics_and_lines(task, tokenizer):
    examples = prepared(task, ITEMS, tokenizer)
    logits = np.array([[0.0], [1.0], [2.0], [-60.0], [20.0], [30.0]], np.float32)
    found = task.predictions(logits, examples, ITEMS)
    assert [len(each) for each in found] == [3, 1, 2] and found[0][0] == 0.5
    assert 0 < found[1][0] < 1e-20
    assert task.metrics(ITEMS, found)["mrr@10"] == pytest.approx((1 / 2 + 1 + 1) / 3)
    record = json.loads(json.dumps(task.record(ITEMS[0], found[0])))
    ranked = record.pop("ranked")
    assert record == {"query": "who sat ?"}
    assert [each["text"] for each in ranked] == ["when", "the red cat sat in the rain .", "rain"]
    assert ranked[1]["relevance"] == 1 and ranked[2] == {"text": "rain", "relevance": 0, "score": 0.5}
    assert task.record(ITEMS[0]._replace(relevance=None), found[0])["ranked"][0]["relevance"] is None


def test_there_is_no_best_constant_prediction(task):
    assert task.majority(ITEMS, ITEMS) is None


def test_training_needs_relevant_and_other_candidates(task):
    one = ITEMS[1:2]
    for items, got in ((one, "only relevant ones"), ([one[0]._replace(relevance=[0])], "none")):
        with pytest.raises(
            ValueError, match=rf"train.tsv, line 5 .* relevant and other candidates, got {got}"
        ):
            task.learn(items)


def test_unknown_relevance(task):
    error = "train.tsv, line 5: the candidates have no 'relevance'"
    assert task.unlabelled([ITEMS[0], ITEMS[1]._replace(relevance=None)]) == error


def test_what_the_page_shows(task):
    scores = [0.5, 0.25, 0.125]
    assert task.error(ITEMS[0], scores) == 0.5
    assert task.error(ITEMS[0]._replace(relevance=[0, 0, 0]), scores) == 0
    assert task.shown(ITEMS[0], scores) == {
        "query": "who sat ?",
        "first": "rain",
        "most relevant": "the red cat sat in the rain .",
        "its rank": 2,
    }


def test_texts_and_files(task, tmp_path):
    file = tmp_path / "train.tsv"
    file.write_text("query\tcandidate\trelevance\nwho ?\tcat\t1\nwho ?\train\t0\n")
    items = task.read([file], "train")
    assert items == [Candidates("who ?", ["cat", "rain"], [1, 0], items[0].where)]
    assert list(task.texts(items)) == ["who ?", "cat", "rain"]
