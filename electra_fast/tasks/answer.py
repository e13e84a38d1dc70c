"""Answers to questions, as spans of a context: SQuAD 1.1, and 2.0 with contexts that have no answer."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from electra_fast.config import ElectraConfig
from electra_fast.errors import must
from electra_fast.heads import NO_LABELS, QuestionAnswerer
from electra_fast.modules import Layout
from electra_fast.packing import padding
from electra_fast.tasks.examples import IGNORE, Examples
from electra_fast.tasks.items import Question
from electra_fast.tasks.spans import Prediction, best_spans
from electra_fast.tasks.squad_files import questions
from electra_fast.tasks.squad_scores import squad_scores
from electra_fast.tasks.task import Task
from electra_fast.tasks.windows import all_windows

THRESHOLD = 0.0  # of `Prediction.null_difference`; above it a question has no answer


class Found(NamedTuple):
    """A prediction."""

    answer: str  # the text of `best`, or nothing
    best: Prediction


class AnswerQuestions(Task):
    """The first and the last token of an answer; [CLS] is both if a window does not contain the answer.

    A context that is too long is cut into windows that overlap. A question is left without an answer only if
    some question of the training items, or of the items to predict, has none, as in SQuAD 2.0.
    """

    name, metric = "answer", "f1"
    head_class = QuestionAnswerer
    epochs, max_len = 2, 512

    def __init__(self, options: Any):
        super().__init__(options)
        self.some_unanswered = False  # of the training items

    def read(self, paths: Sequence[str], role: str) -> list[Question]:
        return questions(paths)

    def learn(self, items: Sequence[Question]) -> None:
        self.labels = NO_LABELS
        self.some_unanswered = any(item.answers == [] for item in items)

    def use(self, described: dict[str, Any]) -> None:
        super().use(described)
        self.some_unanswered = described.get("some_unanswered", False)

    def head(self, config: ElectraConfig) -> QuestionAnswerer:
        head = QuestionAnswerer(config, self.labels)
        head.some_unanswered = self.some_unanswered
        return head

    def unlabelled(self, items: Sequence[Question]) -> str | None:
        places = (item.where for item in items if item.answers is None)
        return next((f"{where}: the question has no 'answers'" for where in places), None)

    def texts(self, items: Sequence[Question]) -> Iterator[str]:
        yield from dict.fromkeys(text for item in items for text in (item.question, item.context))

    def examples(self, items: Sequence[Question], tokenizer: Any) -> Examples:
        """Encode items, one sequence per window; `aligned` has the windows of each item."""
        stride, max_query = self.options.stride, self.options.max_query
        if self.max_len < max_query + 4:
            rule = f"be {max_query + 4} or more with --max-query {max_query}"
            raise ValueError(must("answer: --max-len", rule, self.max_len, "lower --max-query"))
        aligned = all_windows(items, tokenizer, max_len=self.max_len, stride=stride, max_query=max_query)
        windows = [window for found in aligned for window in found]
        spans = [
            (IGNORE, IGNORE) if item.answers is None else (window.start, window.end)
            for item, found in zip(items, aligned, strict=True)
            for window in found
        ]
        return Examples(
            np.concatenate([window.ids for window in windows]),
            np.cumsum([0, *(len(window.ids) for window in windows)]),
            np.array([window.context for window in windows]),
            item_targets={"spans": np.array(spans)},
            aligned=aligned,
        )

    def loss(self, logits: Tensor, layout: Layout, spans: Tensor) -> Tensor:
        """Return the mean cross entropy of starts and ends, each over the tokens of its window.

        Args:
            logits: ``[T, 2]``.
            layout: of the S windows.
            spans: int64 ``[S, 2]``, the positions of the first and the last token of the answer.
        """
        t, inside, _, _ = padding("answer", layout.cu_seqlens, layout.max_seqlen, len(logits))
        padded = logits.float().T[:, t].where(inside, -torch.inf)  # [2, S, L]
        return cross_entropy(padded.flatten(0, 1), spans.T.flatten(), ignore_index=IGNORE)

    def predictions(self, logits: np.ndarray, examples: Examples, items: Sequence[Question]) -> list[Found]:
        by_window = iter(np.split(logits, examples.offsets[1:-1]))
        may_be_empty, found = self._may_be_empty(items), []
        for item, windows in zip(items, examples.aligned, strict=True):
            starts, ends = zip(*(next(by_window).T for _ in windows), strict=True)
            limits = {"n_best": 1, "max_tokens": self.options.max_answer}
            (best,) = best_spans(item.context, windows, starts, ends, **limits)
            empty = may_be_empty and best.null_difference > THRESHOLD
            found.append(Found("" if empty else best.text, best))
        return found

    def metrics(self, items: Sequence[Question], predictions: Sequence[Found]) -> dict[str, float]:
        best = {item.id: found.best for item, found in zip(items, predictions, strict=True)}
        texts = {name: found.text for name, found in best.items()}
        doubts = {name: found.null_difference for name, found in best.items()}
        return squad_scores(items, texts, doubts if self._may_be_empty(items) else None, threshold=THRESHOLD)

    def record(self, item: Question, prediction: Found) -> dict[str, Any]:
        answers = None if item.answers is None else [answer.text for answer in item.answers]
        return {
            "id": item.id,
            "question": item.question,
            "answers": answers,
            "predicted": prediction.answer,
            "score": prediction.best.score,
            "null_difference": prediction.best.null_difference,
        }

    def majority(self, items: Sequence[Question], train: Sequence[Question]) -> dict[str, float]:
        return squad_scores(items, {item.id: "" for item in items})

    def error(self, item: Question, prediction: Found) -> float:
        return 1 - squad_scores([item], {item.id: prediction.answer})["f1"]

    def _may_be_empty(self, items: Sequence[Question]) -> bool:
        return self.some_unanswered or any(item.answers == [] for item in items)
