"""Fine-tuning from pre-trained encoders and from new weights, next to a bag of words.

`DATA` of `equal_compute.py` has a folder for each task. The bag of words of a classifier is a logistic
regression on the counts of wordpieces; that of a tagger predicts the most frequent tag of each word; SNIPS
needs both, because an utterance is right if its intent and all its slots are.
"""

import itertools
import json
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.learning.probes import FILES, sentiment
from electra_fast.errors import must
from electra_fast.tasks import entities
from electra_fast.train.fine_tune import fine_tune
from electra_fast.train.fine_tune_recipe import FineTuneRecipe
from electra_fast.train.recipe import PAPER, field_of
from electra_fast.train.task_data import Split, TaskData


class Task(NamedTuple):
    title: str
    task: str  # of `finetune`
    train: str  # a pattern of files in DATA
    test: str
    epochs: float


TASKS = {
    "banking77": Task("Banking77", "classify", "banking77/train.csv*", "banking77/test.csv*", 8.0),
    "goemotions": Task(
        "GoEmotions, positive or negative",
        "classify",
        "goemotions/group_train.tsv.xz",
        "goemotions/group_test.tsv.xz",
        3.0,
    ),
    "wnut17": Task("WNUT17", "tag", "wnut17/wnut17train.conll*", "wnut17/emerging.test*", 8.0),
    "snips": Task("SNIPS", "intent", "snips/train_*.json*", "snips/validate_*.json*", 4.0),
}
NEEDED = {*FILES, *(pattern for task in TASKS.values() for pattern in (task.train, task.test))}  # in DATA
OPTIONS = {"lr": 3e-4, "layer_decay": 1.0, "precision": "bf16", "save_every": 10**6}
# The dropout of all models, chosen on CLINC150, which is not one of the tasks: with 0.1 all are worse, and
# most of all a discriminator that was pre-trained without dropout.
DROPOUT = ("dropout=0",)
NEW_WEIGHTS = "new weights"


class Run(NamedTuple):
    task: str  # a name in TASKS
    start: str  # the name of the encoder
    seed: int
    model: Path  # the folder of the encoder; for new weights, a folder with the vocabulary
    preset: str  # of new weights
    data: Path
    share: float = 1.0  # of the epochs


def recipe(run: Run, scratch: Path) -> FineTuneRecipe:
    task = TASKS[run.task]
    train, dev = (files(run.task, pattern, run.data, scratch) for pattern in (task.train, task.test))
    model = {"model": str(run.model), "set": DROPOUT}
    if run.start == NEW_WEIGHTS:  # with the initial values of pre-training
        of_preset = PAPER[run.preset].get("set", ())
        initial = (field for field in of_preset if field_of(field) == "initial_attention")
        model = {"preset": run.preset, "vocab": str(run.model), "set": (*DROPOUT, *initial)}
    options = OPTIONS | model | {"epochs": task.epochs * run.share, "seed": run.seed}
    return FineTuneRecipe(task=task.task, train=train, dev=dev, **options)


def files(task: str, pattern: str, data: Path, scratch: Path) -> tuple[str, ...]:
    """Return the files of a task; of GoEmotions, a copy of the comments that `sentiment` chooses."""
    found = existing(data, pattern)
    if task != "goemotions":
        return tuple(map(str, found))
    file = scratch / f"{found[0].name}.jsonl"
    rows = [json.dumps({"text": text, "label": label}) for text, label in sentiment(found[0])]
    file.write_text("\n".join(rows) + "\n")
    return (str(file),)


def existing(data: Path, pattern: str) -> list[Path]:
    """Return the files of a pattern.

    Raises:
        FileNotFoundError: there are none.
    """
    if not (found := sorted(data.glob(pattern))):
        raise FileNotFoundError(f"learning: {data / pattern} does not exist")
    return found


def require_files(argument: str, data: Path, patterns: Iterable[str]) -> None:
    """Check that a folder has files of all patterns; without them, a result would be missing after hours.

    Raises:
        ValueError: the message has all patterns without a file.
    """
    if missing := sorted(pattern for pattern in patterns if not any(data.glob(pattern))):
        raise ValueError(must(argument, f"contain {', '.join(missing)}", data))


def train(run: Run, device: str = "cpu") -> dict[str, Any]:
    """Fine-tune; return the metric on the test files."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        results = fine_tune(recipe(run, Path(folder)), Path(folder) / "run", device=device)
    metric = results["metric"]
    facts = {"task": run.task, "start": run.start, "seed": run.seed, "metric": metric}
    return facts | {"value": results["dev"][metric], "majority": results["majority"][metric]}


def runs(starts: dict[str, Path], preset: str, data: Path, seeds: int, share: float = 1.0) -> list[Run]:
    """Return all runs of fine-tuning, seed by seed.

    `starts` are the folders of the encoders, which have one vocabulary.
    """
    folders = starts | {NEW_WEIGHTS: next(iter(starts.values()))}
    return [
        Run(task, start, seed, folders[start], preset, data, share)
        for seed, task, start in itertools.product(range(seeds), TASKS, folders)
    ]


def bag_of_words(name: str, vocabulary: Path, data: Path) -> float:
    """Return the metric of a model that sees no order of words; `vocabulary` is a folder with one."""
    with tempfile.TemporaryDirectory() as folder:
        run = Run(name, NEW_WEIGHTS, 0, vocabulary, "tiny", data)  # of the preset only the length is used
        task_data = TaskData(recipe(run, Path(folder)).resolved())
    train, test = task_data.splits["train"], task_data.splits["dev"]
    if TASKS[name].task == "tag":
        predictions = most_frequent_tags(
            ((i.words, i.tags) for i in train.items), (i.words for i in test.items)
        )
        return entities.entity_scores([item.tags for item in test.items], predictions)["f1"]
    intents = classified(train, test, max(task_data.tokenizer.get_vocab().values()) + 1)
    if TASKS[name].task == "classify":
        return float(np.mean(intents))
    slots = most_frequent_tags(((i.words, i.slots) for i in train.items), (i.words for i in test.items))
    right = [list(item.slots) == found for item, found in zip(test.items, slots, strict=True)]
    return float(np.mean(np.logical_and(intents, right)))


def classified(train: Split, test: Split, size: int) -> np.ndarray:
    """Return which texts a logistic regression on the counts of wordpieces classifies correctly."""
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=10.0, max_iter=300).fit(counts(train, size), labels(train))
    return model.predict(counts(test, size)) == labels(test)


def most_frequent_tags(
    tagged: Iterable[tuple[list[str], list[str]]], texts: Iterable[list[str]]
) -> list[list[str]]:
    """Return for each word of `texts` its most frequent tag in `tagged`, in lower case."""
    seen: dict[str, Counter[str]] = defaultdict(Counter)
    for words, tags in tagged:
        for word, tag in zip(words, tags, strict=True):
            seen[word.lower()][tag] += 1
    best = {word: tags.most_common(1)[0][0] for word, tags in seen.items()}
    return [[best.get(word.lower(), "O") for word in words] for words in texts]


def counts(split: Split, size: int) -> np.ndarray:
    """Return how often each wordpiece occurs in each text, ``[N, V]``."""
    rows = np.repeat(np.arange(len(split.items)), split.examples.lengths)
    found = np.zeros((len(split.items), size), np.float32)
    np.add.at(found, (rows, split.examples.ids), 1)
    return found


def labels(split: Split) -> np.ndarray:
    """Return the label, or the intent, of each text, ``[N]``."""
    targets = split.examples.item_targets
    return targets["labels"] if "labels" in targets else targets["intents"]
