"""The metrics of the tasks: tables worked by hand, scikit-learn, SciPy, seqeval, and undefined values.

pytest turns warnings into errors, so every test here also shows that there is no warning.
"""

import itertools
import math
import sys

import numpy as np
import pytest

from electra_fast.tasks.entities import entities, entity_scores, per_type
from electra_fast.tasks.ranking import ranking
from electra_fast.tasks.scores import confusion, one_label, package, regression, several_labels

metrics = pytest.importorskip("sklearn.metrics")
stats = pytest.importorskip("scipy.stats")


@pytest.fixture
def random(seed):
    return np.random.default_rng(seed)


# Classification


@pytest.mark.parametrize(
    ("labels", "predicted", "num_labels", "expected"),
    [
        # 1 true positive, 1 false positive, 1 false negative, 2 true negatives
        ([1, 1, 0, 0, 0], [1, 0, 1, 0, 0], 2, (3 / 5, 1 / 2, 1 / 6)),
        # F1 of labels 0, 1 and 2; label 3 does not occur
        ([0, 1, 1, 2], [0, 1, 1, 1], 4, (3 / 4, (1 + 4 / 5 + 0) / 3, 5 / math.sqrt(60))),
        ([0, 1, 1], [1, 0, 0], 2, (0, 0, -1)),
        ([0, 0], [0, 0], 2, (1, 0, 0)),  # label 1 does not occur
        ([1, 1], [1, 1], 2, (1, 1, 0)),
        ([2, 2], [2, 2], 3, (1, 1, 0)),
        ([0, 0], [0, 0], 1, (1, 1, 0)),
        ([0, 1], [1, 1], 2, (1 / 2, 2 / 3, 0)),
        ([1], [0], 2, (0, 0, 0)),
    ],
)
def test_one_label(labels, predicted, num_labels, expected):
    found = one_label(np.array(labels), np.array(predicted), num_labels)
    assert list(found) == ["accuracy", "f1", "matthews"]
    assert tuple(found.values()) == pytest.approx(expected)
    assert all(type(value) is float for value in found.values()), "JSON has no NumPy numbers"


@pytest.mark.parametrize(("num_labels", "average"), [(2, "binary"), (3, "macro"), (150, "macro")])
def test_one_label_is_scikit_learns(random, num_labels, average):
    labels, predicted = random.integers(num_labels, size=(2, 500))
    predicted = np.where(random.random(500) < 0.5, labels, predicted)
    assert one_label(labels, predicted, num_labels) == {
        "accuracy": metrics.accuracy_score(labels, predicted),
        "f1": metrics.f1_score(labels, predicted, average=average),
        "matthews": metrics.matthews_corrcoef(labels, predicted),
    }


@pytest.mark.parametrize(
    ("labels", "predicted", "expected"),
    [
        # by column: 1 right, 1 missed; 1 right, 1 too many; nothing true and nothing predicted
        (["110", "100", "000"], ["110", "010", "000"], (2 / 3, (2 / 3 + 2 / 3 + 0) / 3, 2 / 3)),
        (["1", "0", "1"], ["1", "1", "0"], (1 / 2, 1 / 2, 1 / 3)),  # one label only
        (["00"], ["00"], (0, 0, 1)),
        (["11"], ["11"], (1, 1, 1)),
    ],
)
def test_several_labels(labels, predicted, expected):
    found = several_labels(*(np.array([list(row) for row in rows]) == "1" for rows in (labels, predicted)))
    assert list(found) == ["f1_micro", "f1_macro", "exact"]
    assert tuple(found.values()) == pytest.approx(expected)
    assert all(type(value) is float for value in found.values())


def test_several_labels_is_scikit_learns(random):
    labels, predicted = random.random((2, 300, 28)) < np.linspace(
        0, 0.3, 28
    )  # the first label does not occur
    assert several_labels(labels, predicted) == pytest.approx(
        {
            "f1_micro": metrics.f1_score(labels, predicted, average="micro"),
            "f1_macro": metrics.f1_score(labels, predicted, average="macro", zero_division=0),
            "exact": metrics.accuracy_score(labels, predicted),
        }
    )


def test_confusion_has_true_labels_in_rows(random):
    found = confusion(np.array([0, 0, 2, 2, 2]), np.array([0, 2, 2, 1, 1]), 4)
    assert found.tolist() == [[1, 0, 1, 0], [0, 0, 0, 0], [0, 2, 1, 0], [0, 0, 0, 0]]
    assert confusion(np.array([0, 0]), np.array([0, 0]), 1).tolist() == [[2]]

    labels, predicted = random.integers(7, size=(2, 200))
    expected = np.zeros((7, 7), int)
    np.add.at(expected, (labels, predicted), 1)
    assert np.array_equal(confusion(labels, predicted, 7), expected)


# Regression


@pytest.mark.parametrize(
    ("targets", "predicted", "expected"),
    [
        ([1, 2, 3, 4], [1, 2, 4, 3], (0.8, 0.8, 0.5)),
        ([1, 2, 3], [0, 1, 5], (5 / math.sqrt(28), 1, 2)),  # monotone but not linear
        ([1, 2, 3], [3, 2, 1], (-1, -1, 8 / 3)),
        ([1, 2], [2, 2], (math.nan, math.nan, 0.5)),
        ([2, 2], [1, 2], (math.nan, math.nan, 0.5)),
        ([1], [3], (math.nan, math.nan, 4)),
        ([1, 2, 3], [1, math.nan, 3], (math.nan, math.nan, math.nan)),
    ],
)
def test_regression(targets, predicted, expected):
    found = regression(np.array(targets, np.float32), np.array(predicted, np.float32))
    assert list(found) == ["pearson", "spearman", "mse"]
    assert tuple(found.values()) == pytest.approx(expected, nan_ok=True)
    assert all(type(value) is float for value in found.values())


def test_regression_is_scipys_in_float64(random):
    targets = random.random(300)
    predicted = np.float32(1000 + targets + random.random(300))
    wide = predicted.astype(np.float64)
    assert regression(targets, predicted) == {
        "pearson": stats.pearsonr(targets, wide).statistic,
        "spearman": stats.spearmanr(targets, wide).statistic,
        "mse": metrics.mean_squared_error(targets, wide),
    }


# Tagging

# What seqeval 1.2.2 finds, with `end` one word later.
SEQEVAL = {
    "": set(),
    "O O": set(),
    "B-a": {("a", 0, 1)},
    "B-a I-a O": {("a", 0, 2)},
    "I-a I-a": {("a", 0, 2)},
    "O I-a": {("a", 1, 2)},
    "B-a B-a": {("a", 0, 1), ("a", 1, 2)},
    "B-a I-b": {("a", 0, 1), ("b", 1, 2)},
    "I-a I-b I-b": {("a", 0, 1), ("b", 1, 3)},
    "I-a B-a": {("a", 0, 1), ("a", 1, 2)},
    "B-a O I-a": {("a", 0, 1), ("a", 2, 3)},
    "B-a I-a B-b I-b": {("a", 0, 2), ("b", 2, 4)},
    "B-a I-a I-b I-a": {("a", 0, 2), ("b", 2, 3), ("a", 3, 4)},
    "I-a-b I-a-b": {("a-b", 0, 2)},
    "B-a.b I-a": {("a.b", 0, 1), ("a", 1, 2)},
}
# All sentences of four tags, and the same with another third tag.
TRUE = [list(tags) for tags in itertools.product(["O", "B-a", "I-a", "B-b", "I-b"], repeat=4)]
PREDICTED = [[first, second, "I-b", last] for first, second, _, last in TRUE]


def wrong_entities(read):
    return [tags for tags, found in SEQEVAL.items() if read(tags.split()) != found]


def test_entities_are_seqevals():
    assert wrong_entities(entities) == []


@pytest.mark.parametrize(
    "fault",
    [
        lambda tags: entities([tag.replace("I-", "B-") for tag in tags]),
        lambda tags: {found for found in entities(tags) if tags[found[1]].startswith("B-")},  # strict BIO
        lambda tags: {(name, start, end - 1) for name, start, end in entities(tags)},
        lambda tags: {(name[0], start, end) for name, start, end in entities(tags)},
    ],
)
def test_the_table_of_entities_sees_a_fault(fault):
    assert wrong_entities(fault)


def test_entity_scores_are_those_of_seqeval_and_conlleval():
    """Both count 1700 true and 1650 predicted entities, of which 1125 are right."""
    assert entity_scores(TRUE, PREDICTED) == {
        "f1": 0.6716417910447761,
        "precision": 0.6818181818181818,
        "recall": 0.6617647058823529,
    }
    found = per_type(TRUE, PREDICTED)
    assert list(found) == ["a", "b"]
    a, b = ([round(100 * value, 2) for value in scores.values()] for scores in found.values())
    assert (a, b) == ([77.42, 85.71, 70.59, 85_000], [58.33, 55.26, 61.76, 85_000])
    assert list(found["a"]) == ["f1", "precision", "recall", "support"]


def test_entity_scores_of_a_small_table():
    true = [["B-a", "I-a", "O", "B-b"], ["B-a"], []]
    predicted = [["B-a", "I-a", "B-c", "I-b"], ["O"], []]
    assert entity_scores(true, predicted) == {"f1": 2 / 3, "precision": 2 / 3, "recall": 2 / 3}
    assert per_type(true, predicted) == {
        "a": {"f1": 2 / 3, "precision": 1.0, "recall": 0.5, "support": 2},
        "b": {"f1": 1.0, "precision": 1.0, "recall": 1.0, "support": 1},
        "c": {"f1": 0.0, "precision": 0.0, "recall": 0.0, "support": 0},
    }


@pytest.mark.parametrize(
    "true, predicted", [([], []), ([["O"]], [["O"]]), ([["B-a"]], [["O"]]), ([["O"]], [["B-a"]])]
)
def test_entity_scores_are_0_without_entities(true, predicted):
    assert entity_scores(true, predicted) == {"f1": 0.0, "precision": 0.0, "recall": 0.0}


def test_sentences_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match=r"entity_scores: predicted\[1\] must have 2 tags, got 1"):
        entity_scores([[], ["O", "O"]], [[], ["O"]])
    with pytest.raises(ValueError):
        entity_scores([["O"]], [])


def test_entities_and_scores_are_those_of_the_installed_seqeval(random):
    labeling = pytest.importorskip("seqeval.metrics.sequence_labeling")
    tags = ["O", *(prefix + name for name in ("a", "b", "c-d") for prefix in ("B-", "I-"))]
    sentences = [list(random.choice(tags, size=random.integers(12))) for _ in range(2000)]
    for sentence in sentences:
        expected = {(name, start, last + 1) for name, start, last in labeling.get_entities(sentence)}
        assert entities(sentence) == expected, sentence

    guess = [[tag if random.random() < 0.7 else random.choice(tags) for tag in tags_] for tags_ in sentences]
    precision, recall, f1, _ = labeling.precision_recall_fscore_support(sentences, guess, average="micro")
    assert entity_scores(sentences, guess) == {"f1": f1, "precision": precision, "recall": recall}
    by_type = labeling.precision_recall_fscore_support(sentences, guess, average=None)
    for found, (precision, recall, f1, support) in zip(
        per_type(sentences, guess).values(), zip(*by_type, strict=True), strict=True
    ):
        assert found == {"f1": f1, "precision": precision, "recall": recall, "support": support}


# Ranking


@pytest.mark.parametrize(
    ("relevance", "scores", "cut", "expected"),
    [
        # ranked: 0 1 0 2
        (
            [1, 2, 0, 0],
            [3, 1, 4, 2],
            10,
            (1 / 2, (1 / math.log2(3) + 2 / math.log2(5)) / (2 + 1 / math.log2(3)), 1 / 2),
        ),
        ([1, 2, 0, 0], [3, 1, 4, 2], 2, (1 / 2, (1 / math.log2(3)) / (2 + 1 / math.log2(3)), 1 / 2)),
        ([1, 2, 0, 0], [3, 1, 4, 2], 1, (0, 0, 1 / 2)),  # MAP has no cut
        ([1, 0, 1], [3, 2, 1], 10, (1, 1.5 / (1 + 1 / math.log2(3)), (1 + 2 / 3) / 2)),
        ([0, 0], [1, 2], 10, (0, 0, 0)),
        ([3], [-1], 10, (1, 1, 1)),
        ([], [], 10, (0, 0, 0)),
        # the least relevant of equal scores is first, in any order of the candidates
        ([1, 0], [5, 5], 10, (1 / 2, 1 / math.log2(3), 1 / 2)),
        ([0, 1], [5, 5], 10, (1 / 2, 1 / math.log2(3), 1 / 2)),
        ([2, 1], [5, 5], 10, (1, (1 + 2 / math.log2(3)) / (2 + 1 / math.log2(3)), 1)),
        ([1, 0], [math.nan, -math.inf], 10, (1 / 2, 1 / math.log2(3), 1 / 2)),
    ],
)
def test_ranking_of_one_query(relevance, scores, cut, expected):
    found = ranking([relevance], [scores], cut)
    assert list(found) == [f"mrr@{cut}", f"ndcg@{cut}", "map"]
    assert tuple(found.values()) == pytest.approx(expected)
    assert all(type(value) is float for value in found.values())


def test_ranking_is_the_mean_over_all_queries():
    found = ranking([[1, 0], [0, 1], [0, 0]], [[2, 1], [2, 1], [2, 1]])
    expected = {"mrr@10": 1.5 / 3, "ndcg@10": (1 + 1 / math.log2(3)) / 3, "map": 1.5 / 3}
    assert found == pytest.approx(expected)


def test_ranking_is_scikit_learns_without_equal_scores(random):
    relevance = random.integers(4, size=(200, 25)) * (random.random((200, 25)) < 0.2)
    relevance[0] = 0
    scores = random.random((200, 25))
    found = ranking(relevance.tolist(), scores.tolist())
    assert found["ndcg@10"] == pytest.approx(metrics.ndcg_score(relevance, scores, k=10))
    relevant = relevance > 0
    some = relevant.any(1)
    assert 0 < some.sum() < 200
    precisions = [
        metrics.average_precision_score(*query) for query in zip(relevant[some], scores[some], strict=True)
    ]
    assert found["map"] == pytest.approx(sum(precisions) / 200)
    best = np.where(relevant, scores, -1).max(1, keepdims=True)
    ranks = 1 + (scores > best).sum(1)[some]
    assert found["mrr@10"] == pytest.approx(np.where(ranks > 10, 0, 1 / ranks).sum() / 200)


@pytest.mark.parametrize("relevance, scores", [([], []), ([[1]], []), ([[1]], [[1, 2]])])
def test_a_ranking_of_other_shapes_is_refused(relevance, scores):
    with pytest.raises(ValueError):
        ranking(relevance, scores)


# Packages


@pytest.mark.parametrize("name", ["sklearn.metrics", "scipy.stats"])
def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=rf"needs a package: pip install electra_fast\[tasks\] \(.*{name}"):
        package(name)
