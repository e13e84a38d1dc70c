"""Answers to questions: the loss of windows, and the answers that logits choose."""

import json
from types import SimpleNamespace

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
from torch.nn.functional import cross_entropy

from electra_fast.tasks.answer import AnswerQuestions, Found
from electra_fast.tasks.examples import IGNORE
from electra_fast.tasks.items import Answer, Question
from electra_fast.tasks.spans import Prediction

pytest_plugins = ["small_tokenizer"]
LONG = "the red cat sat in the rain . the green dog ran . the blue bird flew in the rain ."


@pytest.fixture
def task():
    task = AnswerQuestions(OPTIONS)
    task.max_len = 20
    return task


def ask(name, question, context, *answers):
    found = [Answer(text, context.index(text)) for text in answers]
    return Question(name, question, context, found, f"train.json, question {name!r}")


ITEMS = [
    ask("a", "who sat ?", LONG, "red cat", "the red cat"),
    ask("b", "who flew ?", LONG, "blue bird"),
    ask("c", "who ran ?", "the dog ran .", "dog"),
]
UNANSWERED = ask("d", "when is rain ?", "the dog ran .")


def test_a_sequence_is_a_window(task, tokenizer):
    examples = prepared(task, [*ITEMS, UNANSWERED], tokenizer)
    windows = [window for found in examples.aligned for window in found]
    assert [len(found) for found in examples.aligned] == [2, 2, 1, 1]
    assert len(examples) == len(windows) and examples.ids.dtype == np.int32
    for number, window in enumerate(windows):
        batch = examples.batch(np.array([number]))
        assert batch["ids"].tolist() == window.ids.tolist()
        assert batch["type_ids"].sum() == len(window.ids) - window.context
        assert batch["spans"].tolist() == [[window.start, window.end]]
    assert examples.item_targets["spans"].tolist() == [[6, 7], [0, 0], [0, 0], [11, 12], [6, 6], [0, 0]]


def test_windows_without_known_answers_have_no_target(task, tokenizer):
    examples = task.examples([ITEMS[0], ITEMS[2]._replace(answers=None)], tokenizer)
    assert examples.item_targets["spans"].tolist() == [[6, 7], [0, 0], [IGNORE, IGNORE]]


def test_the_loss_is_that_of_transformers(task, tokenizer, tmp_path):
    examples = prepared(task, [*ITEMS, UNANSWERED], tokenizer)
    model = model_of(task)
    theirs, inputs = of_hugging_face(model.head, tmp_path), padded(examples)
    spans, mask = torch.from_numpy(examples.item_targets["spans"]), inputs["attention_mask"]
    loss = model(**all_items(examples)).loss
    with torch.no_grad():
        # transformers includes padding in the softmax, so each window is given without it.
        alone = [
            theirs(
                **{name: x[s : s + 1, : mask[s].sum()] for name, x in inputs.items()},
                start_positions=spans[s : s + 1, 0],
                end_positions=spans[s : s + 1, 1],
            ).loss
            for s in range(len(spans))
        ]
        together = theirs(**inputs)
    torch.testing.assert_close(loss, torch.stack(alone).mean())
    logits = torch.stack([together.start_logits, together.end_logits], 1).where(mask[:, None] > 0, -torch.inf)
    torch.testing.assert_close(loss, cross_entropy(logits.flatten(0, 1), spans.flatten()))


def test_gradients_and_fixed_batches(task, tokenizer):
    examples = prepared(task, [*ITEMS, UNANSWERED], tokenizer)
    model = model_of(task)
    check_fixed_batches(model, examples)
    # What is added to all tokens changes no softmax over them.
    same = {"head.encoder.layers.0.feed_forward.norm.bias", "head.spans.bias"}
    check_gradients(model, examples, without=same)


def test_it_learns(task, tokenizer):
    found, metrics = trained(task, [*ITEMS, UNANSWERED], tokenizer)
    assert [each.answer for each in found] == ["red cat", "blue bird", "dog", ""]
    assert metrics["f1"] == metrics["exact"] == metrics["no_answer_f1"] == 1
    assert next(iter(metrics)) == task.metric


def logits_of(examples, *answers):
    """Return logits that favour some (window, start, end)."""
    logits = np.zeros((len(examples.ids), 2), np.float32)
    for window, start, end, value in answers:
        logits[examples.offsets[window] + start, 0] += value
        logits[examples.offsets[window] + end, 1] += value
    return logits


def test_predictions_are_the_best_spans_of_all_windows(task, tokenizer):
    examples = prepared(task, ITEMS, tokenizer)
    # "red cat" in the first window of the first question, a span in the second window of the second one.
    logits = logits_of(examples, (0, 6, 7, 2), (1, 5, 5, 1), (3, 11, 12, 3), (4, 0, 0, 5))
    found = task.predictions(logits, examples, ITEMS)
    assert [each.answer for each in found][:2] == ["red cat", "blue bird"]
    assert [each.best.score for each in found] == [4, 6, 0]
    assert found[2].best.null_difference == 10 and found[2].answer  # every question of SQuAD 1.1 is answered
    assert list(task.metrics(ITEMS, found)) == ["f1", "exact"]


def test_an_answer_is_not_longer_than_max_answer(task, tokenizer):
    examples = prepared(task, ITEMS, tokenizer)
    logits = logits_of(examples, (4, 5, 8, 2))
    assert task.predictions(logits, examples, ITEMS)[2].answer == "the dog ran ."
    task.options = SimpleNamespace(**vars(OPTIONS) | {"max_answer": 2})
    assert len(task.predictions(logits, examples, ITEMS)[2].answer.split()) <= 2


def test_a_question_is_not_longer_than_max_query(task, tokenizer):
    task.options = SimpleNamespace(**vars(OPTIONS) | {"max_query": 2})
    assert task.examples(ITEMS, tokenizer).first.tolist() == [4] * 5


@pytest.mark.parametrize("learned", [False, True])
def test_no_answer_of_squad_2(task, tokenizer, learned):
    task.learn([*ITEMS, UNANSWERED] if learned else ITEMS)
    items = [ITEMS[2], UNANSWERED._replace(answers=None if learned else [])]
    examples = task.examples(items, tokenizer)
    found = task.predictions(logits_of(examples, (0, 6, 6, 1), (1, 0, 0, 2)), examples, items)
    assert [each.answer for each in found] == ["dog", ""] and found[1].best.text
    if not learned:
        metrics = task.metrics(items, found)
        assert metrics["f1"] == metrics["best_f1"] == 1
        assert task.majority(items, ITEMS)["f1"] == 0.5


def test_the_line_of_a_prediction(task, tokenizer):
    examples = prepared(task, ITEMS, tokenizer)
    found = task.predictions(logits_of(examples, (0, 6, 7, 2)), examples, ITEMS)
    record = task.record(ITEMS[0], found[0])
    assert json.loads(json.dumps(record)) == {
        "id": "a",
        "question": "who sat ?",
        "answers": ["red cat", "the red cat"],
        "predicted": "red cat",
        "score": 4.0,
        "null_difference": -4.0,
    }
    assert task.record(ITEMS[0]._replace(answers=None), found[0])["answers"] is None


def test_a_wrong_answer_has_an_error(task):
    """The error is that of the answer given, also if `Prediction` has a better text."""
    best = Prediction("red bird", 0, 0.0, 1.0)
    assert task.error(ITEMS[0], Found("red bird", best)) == 0.5
    assert task.error(ITEMS[0], Found("", best)) == 1
    assert task.error(UNANSWERED, Found("", best)) == 0


def test_unknown_answers(task):
    error = "train.json, question 'c': the question has no 'answers'"
    assert task.unlabelled([*ITEMS[:2], ITEMS[2]._replace(answers=None)]) == error


def test_texts_are_questions_and_each_context_once(task):
    assert list(task.texts(ITEMS)) == ["who sat ?", LONG, "who flew ?", "who ran ?", "the dog ran ."]


def test_questions_are_read_from_a_file(task, tmp_path):
    record = {"id": "q", "question": "who ?", "answers": [{"text": "cat", "answer_start": 4}]}
    paragraphs = [{"context": "the cat", "qas": [record]}]
    file = tmp_path / "train.json"
    file.write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    (item,) = task.read([file], "train")
    assert item.answers == [Answer("cat", 4)]
