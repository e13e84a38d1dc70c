"""Models that `finetune` saved: texts in, results out.

    model = Classifier("runs/c")
    model(["I lost my card", "How do I top up?"])  # a list of `Classified`, in the order of the texts

An object may be called from several threads at a time. A text gives the same result alone and among others.
"""

import re
import unicodedata
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch

from electra_fast import local
from electra_fast.errors import must
from electra_fast.tasks.entities import entities
from electra_fast.tasks.examples import Examples, token_ids
from electra_fast.tasks.items import Candidates, Question, Tagged, Text, Utterance
from electra_fast.tasks.task import EVALUATION_TOKENS, predict
from electra_fast.train.fine_tuned import open_fine_tuned
from electra_fast.use.pretrained import require_precision
from electra_fast.use.texts import (
    SHOWN,
    listed,
    require_string,
    warn_unknown,
    warn_windows,
    windows,
)

LENGTHS = ("max_len", "stride", "max_query", "max_answer")
# A word begins and ends with a letter or a digit; any other character outside of words is one of its own.
WORD = re.compile(r"[@#]?\w(?:\S*\w)?|[^\w\s]")


class FineTuned:
    """A fine-tuned model.

    Args:
        folder: that `finetune` wrote, or of a model of transformers with the same head and a tokenizer.
        device: None: a GPU if there is one.
        precision: float32, or bf16 for autocast.
        int8: multiply in int8 in the layers, on a CPU.
        lengths: ``max_len``, the longest sequence in tokens; for an `Answerer` also ``stride``, ``max_query``
            and ``max_answer``, as in `FineTuneRecipe`. The others are those of the run.

    Raises:
        ValueError, OSError: the folder has no model for this task, or no tokenizer.
    """

    task: ClassVar[str]

    def __init__(
        self,
        folder: str | Path,
        *,
        device: str | torch.device | None = None,
        precision: str = "float32",
        int8: bool = False,
        **lengths: int,
    ):
        self.name = type(self).__name__
        require_precision(f"{self.name}: precision", precision)
        if unknown := lengths.keys() - set(LENGTHS):
            raise TypeError(must(f"{self.name}: lengths", f"be of {', '.join(LENGTHS)}", ", ".join(unknown)))
        where = local.device(f"{self.name}: device", device)
        path = local.existing(f"{self.name}: folder", folder)
        opened = open_fine_tuned(self.name, self.task, path, where, precision=precision, **lengths)
        self._task, self.model, self.tokenizer, recipe = opened
        self.precision = recipe.precision
        self.model.encoder.int8 = int8

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of the outputs."""
        return self._task.labels

    @property
    def max_len(self) -> int:
        """The longest sequence in tokens, [CLS] and [SEP] included."""
        return self._task.max_len

    def tokens(self, text: str) -> int:
        """Return the number of tokens of a text, without [CLS] and [SEP]."""
        return len(token_ids([text], self.tokenizer)[0])

    def _predict(self, items: Sequence[Any]) -> tuple[Any, Examples, list[Any]]:
        """Return the logits, the sequences and the predictions of items."""
        examples, device = self._examples(items), next(self.model.parameters()).device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.precision == "bf16"):
            logits = predict(self.model, examples, EVALUATION_TOKENS[device], progress=True, desc=self.name)
        return logits, examples, self._task.predictions(logits, examples, items)

    def _examples(self, items: Sequence[Any]) -> Examples:
        """Return the sequences of items; warn of unknown words and of texts that were cut off."""
        examples = self._task.examples(items, self.tokenizer)
        warn_unknown(self.name, [examples.ids], self.tokenizer)
        if examples.truncated:
            text = f"{self.name}: {examples.truncated} of {len(items)} texts were cut off"
            warnings.warn(f"{text} at {self.max_len} tokens", stacklevel=5)
        return examples

    def check(self, name: str, texts: Sequence[Any], optional: bool = False) -> None:
        """Raise an error if something is not a string with a token; `name` is that of one of them."""
        for number, text in enumerate(texts, start=1):
            if optional and text is None:
                continue
            subject = f"{self.name}: {name} {number}"
            require_string(subject, text)
            if not any(map(str.isalnum, text)) and not self.tokens(text):  # a letter is always a token
                raise ValueError(must(subject, "have a word", repr(text[:SHOWN])))

    def check_pairs(self, first: str, second: str, pairs: Sequence[Any], optional: bool = False) -> None:
        """Raise an error if something is not a pair of such strings, of which the second may be None."""
        for number, pair in enumerate(pairs, start=1):
            if not isinstance(pair, list | tuple) or len(pair) != 2:
                rule = f"be a {first} and a {second}"
                raise TypeError(must(f"{self.name}: pair {number}", rule, repr(pair)[:SHOWN]))
        self.check(first, [pair[0] for pair in pairs])
        self.check(second, [pair[1] for pair in pairs], optional)


class Classified(NamedTuple):
    label: str  # the most probable label
    score: float  # its probability
    labels: tuple[str, ...]  # one, or all above 0.5 of a model with several labels per text
    scores: dict[str, float]  # the probability of each label


class Classifier(FineTuned):
    """A model of `finetune classify`, or an ElectraForSequenceClassification."""

    task: ClassVar[str] = "classify"

    def __init__(self, folder: str | Path, **options: Any):
        super().__init__(folder, **options)
        if self.model.problem == "regression" or len(self.labels) < 2:
            got = f"{folder} with {len(self.labels)} outputs, problem_type {self.model.problem}"
            raise ValueError(must("Classifier: folder", "have a model with two labels or more", got))

    def __call__(self, texts: str | Sequence[str | tuple[str, str]]) -> list[Classified] | Classified:
        """Return the labels of texts, or of pairs of texts; for one string, the result is not a list."""
        texts = listed("Classifier: texts", texts)
        if isinstance(texts, str):
            return self([texts])[0]
        pairs = [text if isinstance(text, list | tuple) else (text, None) for text in texts]
        self.check_pairs("text", "second text", pairs, optional=True)
        if not pairs:
            return []
        items = [Text(*pair, None, f"text {number}") for number, pair in enumerate(pairs, start=1)]
        return [self._result(*found) for found in self._predict(items)[2]]

    def _result(self, labels: tuple[str, ...], scores: np.ndarray) -> Classified:
        best = int(scores.argmax())
        by_label = dict(zip(self.labels, scores.tolist(), strict=True))
        return Classified(self.labels[best], float(scores[best]), labels, by_label)


class Entity(NamedTuple):
    type: str
    text: str
    start: int  # offset of its first character in the text
    end: int
    score: float  # the mean probability of its tags


class Words(NamedTuple):
    """A text in words."""

    text: str
    words: list[str]
    spans: list[tuple[int, int]]


def in_words(text: str) -> Words:
    """Split a text into words; the punctuation around a word is separate, as in the data sets for tagging.

    The marks at the end of a word, such as an accent or a vowel of Hindi, belong to it. A control character
    or an invisible one between words, which tokenizers remove, is no word.
    """
    spans: list[tuple[int, int]] = []
    for start, end in (each.span() for each in WORD.finditer(text)):
        in_last = spans and start < spans[-1][1]
        if not in_last and not unicodedata.category(text[start]).startswith("C"):
            while end < len(text) and unicodedata.category(text[end]).startswith("M"):
                end += 1
            spans.append((start, end))
    return Words(text, [text[start:end] for start, end in spans], spans)


def texts_in_words(model: FineTuned, texts: Sequence[str]) -> list[Words]:
    """Return texts in words; raise an error if something is not a string, or has no word."""
    model.check("text", texts)
    found = [in_words(text) for text in texts]
    for number, each in enumerate(found, start=1):
        if not each.words:
            raise ValueError(must(f"{model.name}: text {number}", "have a word", repr(each.text[:SHOWN])))
    return found


def found_entities(words: Words, tags: list[str], scores: np.ndarray) -> list[Entity]:
    """Return the entities of a text from the tag of each word and its probability, ``[words]``."""
    result = []
    for type_, first, end in sorted(entities(tags), key=lambda entity: entity[1]):
        start, stop = words.spans[first][0], words.spans[end - 1][1]
        score = float(np.mean(scores[first:end]))
        result.append(Entity(type_, words.text[start:stop], start, stop, score))
    return result


def word_scores(logits: np.ndarray, examples: Examples) -> list[np.ndarray]:
    """Return the probability of the most probable tag of each word, 1 for words that were cut off."""
    shares = np.exp(logits - logits.max(1, keepdims=True), dtype=np.float64)
    best = shares.max(1) / shares.sum(1)
    return [np.where(positions >= 0, best[positions], 1.0) for positions in examples.aligned]


class Tagger(FineTuned):
    """A model of `finetune tag`, or an ElectraForTokenClassification with BIO labels.

    A text that is longer than the model is read in windows that overlap.
    """

    task: ClassVar[str] = "tag"

    def __call__(self, texts: str | Sequence[str]) -> list[list[Entity]] | list[Entity]:
        """Return the entities of texts, in order; for one string, those of this text."""
        texts = listed("Tagger: texts", texts)
        if isinstance(texts, str):
            return self([texts])[0]
        if not texts:
            return []
        split = texts_in_words(self, texts)
        sizes = [np.array([len(i) for i in token_ids(each.words, self.tokenizer)]) for each in split]
        cut = [windows(np.maximum(size, 1), self.max_len - 2) for size in sizes]
        warn_windows(self.name, [len(found) for found in cut], self.max_len - 2)
        parts = [(each, window) for each, found in zip(split, cut, strict=True) for window in found]
        items = [
            Tagged(each.words[window.begin : window.end], None, f"text {n}")
            for n, (each, window) in enumerate(parts, start=1)
        ]
        logits, examples, predictions = self._predict(items)
        tagged = iter(zip(predictions, word_scores(logits, examples), strict=True))
        result = []
        for each, found in zip(split, cut, strict=True):
            tags, scores = [], []
            for window in found:
                own = slice(window.first - window.begin, window.last - window.begin)
                of_words, of_scores = next(tagged)
                tags += of_words[own]
                scores += of_scores[own].tolist()
            result.append(found_entities(each, tags, np.array(scores)))
        return result


class Answered(NamedTuple):
    text: str  # empty: the context has no answer
    start: int  # offset of its first character in the context
    end: int
    score: float  # logit of its start + logit of its end
    null_difference: float  # the score of "no answer" - `score`


class Answerer(FineTuned):
    """A model of `finetune answer`, or an ElectraForQuestionAnswering. A long context is read in windows."""

    task: ClassVar[str] = "answer"

    def __call__(self, pairs: tuple[str, str] | Sequence[tuple[str, str]]) -> list[Answered] | Answered:
        """Return the answers to (question, context); for one pair, the result is not a list."""
        pairs = listed("Answerer: pairs", pairs)
        if len(pairs) == 2 and all(isinstance(text, str) for text in pairs):
            return self([pairs])[0]
        self.check_pairs("question", "context", pairs)
        if not pairs:
            return []
        items = [Question(str(n), *pair, None, f"question {n}") for n, pair in enumerate(pairs, start=1)]
        return [self._result(found.answer, found.best) for found in self._predict(items)[2]]

    def _result(self, answer: str, best: Any) -> Answered:
        start = best.start if answer else 0
        return Answered(answer, start, start + len(answer), best.score, best.null_difference)


class Ranked(NamedTuple):
    text: str
    number: int  # of the document in the list that was given
    score: float  # the probability that it is relevant


class Ranker(FineTuned):
    """A model of `finetune rank`: it reads a query and a document together, a cross-encoder."""

    task: ClassVar[str] = "rank"

    def __call__(self, query: str, documents: Sequence[str]) -> list[Ranked]:
        """Return the documents, the most relevant first; equal ones in the order in which they were given."""
        documents = listed("Ranker: documents", documents)
        if isinstance(documents, str):
            raise TypeError(must("Ranker: documents", "be a list of texts", "a string"))
        self.check("query", [query])
        self.check("document", documents)
        if not documents:
            return []
        different = list(dict.fromkeys(documents))  # the same text has the same score
        (scores,) = self._predict([Candidates(query, different, None, "the query")])[2]
        score = dict(zip(different, scores, strict=True))
        found = [Ranked(text, number, score[text]) for number, text in enumerate(documents)]
        return sorted(found, key=lambda each: -each.score)


class Understood(NamedTuple):
    intent: str
    score: float  # the probability of the intent
    slots: list[Entity]


class IntentReader(FineTuned):
    """A model of `finetune intent`: one intent per utterance, and its slots."""

    task: ClassVar[str] = "intent"

    def __call__(self, texts: str | Sequence[str]) -> list[Understood] | Understood:
        """Return the intents and slots of utterances; for one string, the result is not a list."""
        texts = listed("IntentReader: texts", texts)
        if isinstance(texts, str):
            return self([texts])[0]
        if not texts:
            return []
        split = texts_in_words(self, texts)
        items = [Utterance(each.words, None, None, f"text {n}") for n, each in enumerate(split, start=1)]
        logits, examples, frames = self._predict(items)
        shares = torch.from_numpy(logits.intents).double().softmax(1).amax(1).tolist()
        scores = word_scores(logits.slots, examples)
        return [
            Understood(frame.intent, share, found_entities(words, frame.slots, score))
            for frame, share, words, score in zip(frames, shares, split, scores, strict=True)
        ]
