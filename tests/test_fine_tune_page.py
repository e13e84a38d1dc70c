"""The page and the table of a fine-tuning: their contents, hostile texts, and logs with gaps."""

import json
import math
import re
from html.parser import HTMLParser
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest

from electra_fast.pages import text_of
from electra_fast.tasks.classify import Classify, Labels
from electra_fast.tasks.items import Tagged, Text
from electra_fast.tasks.tag import Tag
from electra_fast.tasks.task import Task
from electra_fast.train import line_chart
from electra_fast.train.fine_tune_page import LONGEST_TEXT, MOST_POINTS, page, summary_table
from electra_fast.train.line_chart import Line, chart

HOSTILE = "<script>alert('&amp;')</script>"
DASH = "\N{EN DASH}"
HOSTILE_SVG = '"><svg onload="x">'


class Page(HTMLParser):
    """A strict parser: every tag must be closed. Collects the texts, and the tables by their heading."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.texts, self.tables, self.heading = [], [], [], {}, ""
        self.feed(text.rstrip())
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        names = [name for name, _ in attributes]
        assert len(names) == len(set(names)) and not {"src", "href", "onload"} & set(names)
        if tag == "tr":
            self.tables.setdefault(self.heading, []).append([])
        if tag in ("td", "th"):
            self.tables[self.heading][-1].append("")
        if tag != "meta":
            self.open.append(tag)
        self.tags.append(tag)

    def handle_startendtag(self, tag, attributes):
        assert tag in ("path", "circle")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if self.open[-1] in ("h2", "h3"):
            self.heading = text
        if self.open[-1] in ("td", "th"):
            self.tables[self.heading][-1][-1] += text
        if self.open[-1] != "style":
            self.texts.append(text)


def results_of(*accuracies, **changes):
    """Return the content of metrics.json; an accuracy of None is a seed that diverged."""
    seeds = [
        {
            "seed": seed,
            "failed": None if x else "the loss is NaN",
            "dev": {"accuracy": x, "f1": x / 2} if x else None,
        }
        for seed, x in enumerate(accuracies)
    ]
    found = sorted(x for x in accuracies if x)
    best = accuracies.index(found[-1])
    return {
        "task": "classify",
        "metric": "accuracy",
        "items": {"train": 12345, "dev": 4},
        "truncated": {"train": 7, "dev": 0},
        "majority": {"accuracy": 0.25, "f1": 0.1},
        "seeds": seeds,
        "median": found[len(found) // 2],
        "lowest": found[0],
        "highest": found[-1],
        "best": best,
        "dev": seeds[best]["dev"],
    } | changes


def write_log(folder, seed, *records):
    (folder / f"seed-{seed}").mkdir()
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    (folder / f"seed-{seed}" / "log.jsonl").write_text("\n".join(lines) + "\n")


def train(step, loss):
    return {"kind": "train", "step": step, "loss": loss}


def dev(step, accuracy):
    return {"kind": "dev", "step": step, "accuracy": accuracy}


def classified(labels, *pairs):
    """Return a task, items and predictions with these pairs of label and predicted label."""
    pytest.importorskip("sklearn.metrics")
    task = Classify(SimpleNamespace(glue=None))
    task.labels = labels
    items = [Text(f"{label} or {HOSTILE}?", None, label, "dev.csv, line 1") for label, _ in pairs]
    scores = [[0.5 if label == found else 0.5 / len(labels) for label in labels] for _, found in pairs]
    chosen = [(found,) for _, found in pairs]
    return task, items, [Labels(*each) for each in zip(chosen, np.array(scores), strict=True)]


class Choosy(Task):
    """A task with no table of its own."""

    name, metric = "choosy", "accuracy"

    def unlabelled(self, items):
        return None

    def metrics(self, items, predictions):
        return {"accuracy": sum(x == y for x, y in zip(items, predictions, strict=True)) / len(items)}

    def record(self, item, prediction):
        return {
            "options": [HOSTILE, "b"],
            "label": item,
            "predicted": prediction,
            "score": 0.123456,
            "x": None,
        }


def polylines(text):
    """Return the corners of the curves of each chart of a page."""
    charts = [
        re.findall(r'class="curve \w+"[^>]* d="M([^"H]+)"', svg) for svg in re.findall("<svg.*?</svg>", text)
    ]
    return [[path.split("L") for path in curves] for curves in charts if curves]


# The page


def test_the_page_is_well_formed_and_shows_hostile_texts_as_texts(tmp_path):
    labels = (HOSTILE, HOSTILE_SVG, "c")
    task, items, predictions = classified(
        labels, (HOSTILE, HOSTILE_SVG), (HOSTILE, HOSTILE), ("c", "c"), ("c", HOSTILE)
    )
    results = results_of(0.5, None, task=HOSTILE)
    results["seeds"][1]["failed"] = HOSTILE
    text = page(tmp_path, task, items, predictions, results)
    found = Page(text)
    assert "script" not in found.tags and not re.search(r"https?:|url\(|@import", text)
    assert f"Fine-tuning: {HOSTILE}" in found.texts and f"Seed 1: {HOSTILE}" in found.texts
    assert found.tables["Confusion matrix"] == [
        ["", *labels],
        [HOSTILE, "1", "1", "0"],
        [HOSTILE_SVG, "0", "0", "0"],
        ["c", "1", "0", "1"],
    ]
    assert text.count('class="number same"') == 2 and text.count('class="number same zero"') == 1
    assert text.count("--share: 30%") == 4, "half of the row, at most 60 per cent of the colour"
    assert found.tables["Labels with the lowest F1"] == [
        ["label", "precision", "recall", "F1", "items"],
        [HOSTILE_SVG, "0.000", "0.000", "0.000", "0"],
        [HOSTILE, "0.500", "0.500", "0.500", "2"],
        ["c", "1.000", "0.500", "0.667", "2"],
    ]
    assert found.tables["Wrong predictions"] == [
        ["text", "label", "predicted", "score"],
        [f"{HOSTILE} or {HOSTILE}?", HOSTILE, HOSTILE_SVG, "0.500"],
        [f"c or {HOSTILE}?", "c", HOSTILE, "0.500"],
    ]
    assert "2 of 4 predictions are not exactly right." in found.texts


def test_the_sentence_and_the_table_of_several_seeds(tmp_path):
    results = results_of(0.7, 0.9, None, 0.8, test={"accuracy": 0.6})
    results["items"]["test"], results["truncated"]["test"] = 1, 0
    text = page(tmp_path, Choosy(None), [1], [1], results)
    assert '<th class="number">accuracy</th>' in text and '<td class="">the best</td>' in text
    found = Page(text)
    assert (
        "The accuracy on --dev is 0.800, the median of 3 seeds, which range from 0.700 to 0.900; the best "
        "constant prediction has 0.250; on --test, seed 1 has 0.600."
    ) in found.texts
    assert "Seed 2: the loss is NaN" in found.texts
    assert "train: 12\u202f345 items (7 texts cut off); dev: 4 items; test: 1 items." in found.texts
    assert "These are the predictions of seed 1 on test." in found.texts
    assert found.tables["Seeds"][-1] == ["test", "0.600", DASH, "seed 1 on test"]
    assert summary_table(results).splitlines() == [
        "on --dev  accuracy     f1",
        "seed 0       0.700  0.350",
        "seed 1       0.900  0.450  the best",
        f"seed 2           {DASH}      {DASH}  the loss is NaN",
        "seed 3       0.800  0.400",
        "median       0.800  0.400",
        "lowest       0.700  0.350",
        "highest      0.900  0.450",
        "majority     0.250  0.100  the best constant prediction",
        f"test         0.600      {DASH}  seed 1 on test",
    ]


def test_one_seed_has_no_median_and_a_task_may_have_no_majority(tmp_path):
    results = results_of(0.5, majority=None)
    assert summary_table(results).splitlines() == [
        "on --dev  accuracy     f1",
        "seed 0       0.500  0.250  the best",
    ]
    assert "The accuracy on --dev is 0.500." in Page(page(tmp_path, Choosy(None), [1], [1], results)).texts


def test_with_77_labels_the_most_confused_pairs_are_listed(tmp_path):
    labels = tuple(f"label{i}" for i in range(77))
    wrong = [(labels[i], labels[i + 1]) for i in range(30)] + [("label40", "label50")] * 3
    task, items, predictions = classified(labels, *wrong, *((label, label) for label in labels))
    found = Page(page(tmp_path, task, items, predictions, results_of(0.5)))
    assert "Confusion matrix" not in found.tables
    head, first, *others = found.tables["Labels that are confused most often"]
    assert head == ["label", "predicted", "items", "example"]
    assert first == ["label40", "label50", "3", f"label40 or {HOSTILE}?"]
    assert [row[0] for row in others] == [f"label{i}" for i in range(19)]
    assert len(found.tables["Labels with the lowest F1"]) == 21
    assert found.tables["Labels with the lowest F1"][1] == ["label40", "1.000", "0.250", "0.400", "4"]
    assert len(found.tables["Wrong predictions"]) == 21
    assert (
        "33 of 110 predictions are not exactly right. These are 20 of them, the largest errors first."
        in found.texts
    )


def test_without_a_wrong_prediction_there_are_no_rows(tmp_path):
    labels = tuple(f"label{i}" for i in range(77))
    task, items, predictions = classified(labels, ("label3", "label3"))
    found = Page(page(tmp_path, task, items, predictions, results_of(0.5)))
    assert set(found.tables) == {"Seeds", "Labels with the lowest F1"}
    assert "0 of 1 predictions are not exactly right." in found.texts


def test_several_labels_per_text(tmp_path):
    task = Classify(SimpleNamespace(glue=None))
    task.labels = ("a", "b", "c")
    task.use_several_labels()
    true = {"x": ["a", "b"], "y": [], "z": ["b"], "w": []}
    items = [Text(text, None, labels, "") for text, labels in true.items()]
    scores = np.array([[0.4, 1.0, 0.0], [0.0, 0.7, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.8]])
    predictions = [Labels(*each) for each in zip([("b",), ("b",), ("b",), ("c",)], scores, strict=True)]
    found = Page(page(tmp_path, task, items, predictions, results_of(0.5)))
    assert found.tables["Labels with the lowest F1"][1:] == [
        ["a", "0.000", "0.000", "0.000", "1"],
        ["c", "0.000", "0.000", "0.000", "0"],
        ["b", "0.667", "1.000", "0.800", "2"],
    ]
    assert found.tables["Wrong predictions"][1:] == [["w", "", "c"], ["y", "", "b"], ["x", "a, b", "b"]]


def test_the_most_certain_wrong_prediction_is_first(tmp_path):
    task, items, _ = classified(("a", "b"), ("a", "b"), ("b", "a"))
    predictions = [Labels(("b",), np.array([0.4, 0.6])), Labels(("a",), np.array([0.9, 0.1]))]
    found = Page(page(tmp_path, task, items, predictions, results_of(0.5)))
    assert [row[1:] for row in found.tables["Wrong predictions"][1:]] == [
        ["b", "a", "0.900"],
        ["a", "b", "0.600"],
    ]


def test_tags_have_a_table_per_type_and_their_entities_as_texts(tmp_path):
    items = [
        Tagged(["London", "met", "Ada", "Lovelace"], ["B-place", "O", "B-person", "I-person"], ""),
        Tagged(["I"], ["O"], ""),
        Tagged(["Ada"], ["B-person"], ""),
    ]
    predictions = [["B-place", "O", "O", "O"], ["O"], ["O"]]
    found = Page(page(tmp_path, Tag(None), items, predictions, results_of(0.5)))
    assert found.tables["Types of entities"] == [
        ["type", "precision", "recall", "F1", "entities"],
        ["person", "0.000", "0.000", "0.000", "2"],
        ["place", "1.000", "1.000", "1.000", "1"],
    ]
    assert found.tables["Wrong predictions"] == [
        ["text", "entities", "predicted"],
        ["London met Ada Lovelace", "London (place), Ada Lovelace (person)", "London (place)"],
        ["Ada", "Ada (person)", "none"],
    ]


def test_any_task_shows_its_records(tmp_path):
    found = Page(page(tmp_path, Choosy(None), [1, 2, "x" * 999], [1, 3, 3], results_of(0.5)))
    assert found.tables["Wrong predictions"] == [
        ["options", "label", "predicted", "score", "x"],
        [f"{HOSTILE}, b", "2", "3", "0.123", DASH],
        [f"{HOSTILE}, b", "x" * LONGEST_TEXT + "…", "3", "0.123", DASH],
    ]


def test_items_without_labels_are_not_judged(tmp_path):
    results = results_of(0.5, test={})
    results["items"]["test"], results["truncated"]["test"] = 1, 0
    found = Page(page(tmp_path, Tag(None), [Tagged(["I"], None, "test.tsv, line 1")], [["O"]], results))
    assert found.texts[-1] == "The items have no labels, so the predictions cannot be judged."
    assert found.tables["Seeds"][-1] == ["test", DASH, DASH, "seed 0 on test"]


def test_an_evaluation_may_be_of_any_split(tmp_path):
    task, items, predictions = classified(("a", "b"), ("a", "b"))
    results = {"task": "classify", "items": {"dev_mm": 1}, "dev_mm": {"accuracy": 0.0}}
    assert "These are the predictions on dev_mm." in page(tmp_path, task, items, predictions, results)


def test_an_evaluation_has_no_seeds(tmp_path):
    results = {"task": "choosy", "metric": "accuracy", "items": {"test": 2}, "test": {"accuracy": 0.5}}
    found = Page(page(tmp_path, Choosy(None), [1, 2], [1, 3], results))
    assert "0.500" in found.texts and "svg" not in found.tags and "Wrong predictions" in found.tables
    assert "These are the predictions on test." in found.texts


# The learning curves


def test_the_curves_skip_null_and_lines_that_were_cut_off_and_use_the_last_record_of_a_step(tmp_path):
    write_log(
        tmp_path, 0, {"kind": "begin", "step": 0}, train(10, 9.0), train(20, None), train(25, math.nan),
        train(30, 1.0), dev(30, 0.1), '{"kind": "train", "st', train(10, 2.0), dev(40, None), dev(60, 0.3),
    )  # fmt: skip
    write_log(tmp_path, 1, train(30, None))
    text = page(tmp_path, Choosy(None), [1], [1], results_of(0.5, 0.4, 0.3))
    losses, accuracies = polylines(text)
    assert [len(curve) for curve in losses] == [2] and [len(curve) for curve in accuracies] == [2]
    described = [found for found in re.findall("<desc>(.*?)</desc>", text)]
    assert described == [
        "seed 0: 2.000 at step 10, 1.000 at step 30",
        "seed 0: 0.100 at step 30, 0.300 at step 60",
    ]
    assert [f"seed {i}" in Page(text).texts for i in range(3)] == [True] * 3


def test_a_long_log_becomes_means_and_ends_at_the_last_step(tmp_path):
    steps = 10 * MOST_POINTS + 3
    write_log(tmp_path, 0, *(train(step, step % 2) for step in range(1, steps + 1)))
    text = page(tmp_path, Choosy(None), [1], [1], results_of(0.5))
    ((curve,),) = polylines(text)
    assert MOST_POINTS / 2 < len(curve) <= MOST_POINTS
    assert f"<desc>seed 0: 0.545 at step 11, 0.571 at step {steps}</desc>" in text
    assert curve[-1].startswith(f"{line_chart.WIDTH - line_chart.RIGHT}.0 ")


@pytest.mark.parametrize(
    "lines",
    [
        [[]],
        [[(1, 0.5)]],
        [[(0, 0.0)]],
        [[(1, 0.8), (2, 0.8)]],
        [[(10, 1e-9), (20, 3e-9)], [], [(5, 2e-9)]],
        [[(10, -1.5), (100000, 12345.6)]],
        [[(1234567, 0.1), (9999999, 0.10000000000000002)]],
        [[(step, step**2 / 7) for step in range(40)]] * 20,
        [[(3, 1e30), (7, 3e38)]],
    ],
)
def test_everything_in_a_chart_is_inside_its_view_box(lines):
    svg = chart(
        "Loss", "loss in training, mean per target", [Line(f"seed {i}", x) for i, x in enumerate(lines)]
    )
    root = ElementTree.fromstring(svg)
    assert root.attrib["role"] == "img" and root.find("title").text == "Loss" and root.find("desc").text
    width, height = map(int, root.attrib["viewBox"].split()[2:])
    points = []
    for path in root.iter("path"):
        x, y, across = re.fullmatch(
            r"M([\d.]+) ([\d.]+)(?:H([\d.]+))?", path.attrib["d"].split("L")[0]
        ).groups()
        points += [(float(x), float(y)), *([(float(across), 0)] if across else [])]
        points += [tuple(map(float, corner.split())) for corner in path.attrib["d"].split("L")[1:]]
    for circle in root.iter("circle"):
        x, y, r = (float(circle.attrib[name]) for name in ("cx", "cy", "r"))
        points += [(x - r, y - r), (x + r, y + r)]
    for text in root.iter("text"):
        x, y, wide = float(text.attrib["x"]), float(text.attrib["y"]), 7 * len(text.text)
        left = x - {"start": 0, "middle": wide / 2, "end": wide}[text.attrib.get("text-anchor", "start")]
        points += [(left, y - 10), (left + wide, y + 3)]
    assert all(0 <= x <= width and 0 <= y <= height for x, y in points), points
    assert sum(1 for _ in root.iter("circle")) == sum(map(bool, lines))
    for name, at in (("y", line_chart.HEIGHT - line_chart.BOTTOM + 16), ("x", line_chart.LEFT - 6)):
        ticks = [text.text for text in root.iter("text") if float(text.attrib[name]) == at]
        assert len(ticks) == len(set(ticks)) and (2 <= len(ticks) <= 7 if any(lines) else not ticks)


def test_20_seeds_have_different_lines():
    styles = re.findall('<path class="curve (.*?) d=', line_chart.legend([f"seed {i}" for i in range(18)]))
    assert len(set(styles)) == 18


def test_numbers_have_four_digits():
    values = [0.12345, 9.9996, -12.345, 1234.56, 3080, 0.0, 1.0, None, math.nan, -math.inf]
    texts = ["0.123", "10.00", "-12.35", "1\u202f235", "3\u202f080", "0.000", "1.000", DASH, DASH, DASH]
    assert list(map(text_of, values)) == texts
