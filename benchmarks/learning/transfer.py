"""Is a pre-trained discriminator a better start for fine-tuning than new weights? Than a bag of words?

    python -m benchmarks.learning.transfer runs/wiki DATA

DATA has banking77/ and wnut17/. Each task is fine-tuned from the discriminator and from new weights of the
same sizes, with the same vocabulary and recipe, with several seeds, on one thread each. The bag of words of
Banking77 is a logistic regression on the counts of wordpieces; that of WNUT17 predicts the most frequent tag
of each word. LEARNING.md has the result.
"""

import argparse
import itertools
import json
import multiprocessing
import tempfile
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from benchmarks.harness import machine
from benchmarks.learning import report
from benchmarks.learning.runs import RESULTS
from electra_fast.tasks import entities
from electra_fast.tasks.items import Tagged
from electra_fast.train.fine_tune import fine_tune
from electra_fast.train.fine_tune_recipe import FineTuneRecipe
from electra_fast.train.recipe import Recipe
from electra_fast.train.run_folder import find_recipe
from electra_fast.train.task_data import Split, TaskData

STARTS = ("pre-trained", "new weights")
FILES = {
    "classify": ("banking77/train.csv*", "banking77/test.csv*"),
    "tag": ("wnut17/wnut17train.conll*", "wnut17/emerging.test*"),
}
OPTIONS = {"epochs": 8.0, "lr": 3e-4, "layer_decay": 1.0, "precision": "float32", "save_every": 10**6}


class Run(NamedTuple):
    task: str
    start: str
    seed: int
    discriminator: Path
    data: Path

    def recipe(self) -> FineTuneRecipe:
        train, dev = ((str(next(self.data.glob(name))),) for name in FILES[self.task])
        model = {"model": str(self.discriminator)}
        if self.start == "new weights":
            model = {"preset": "tiny", "vocab": str(self.discriminator)}
        return FineTuneRecipe(task=self.task, train=train, dev=dev, seed=self.seed, **model, **OPTIONS)


def train(run: Run) -> dict:
    """Fine-tune; return the metrics on the test file."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        results = fine_tune(run.recipe(), Path(folder), device="cpu")
    facts = {"task": run.task, "start": run.start, "seed": run.seed, "metric": results["metric"]}
    return facts | {
        "value": results["dev"][results["metric"]],
        "majority": results["majority"][results["metric"]],
    }


def bag_of_words(task: str, discriminator: Path, data: Path) -> float:
    """Return the metric of a model that sees no order of words."""
    found = TaskData(Run(task, "pre-trained", 0, discriminator, data).recipe().resolved())
    train, test = found.splits["train"], found.splits["dev"]
    if task == "tag":
        tags = most_frequent_tags(train.items)
        predictions = [[tags.get(word.lower(), "O") for word in item.words] for item in test.items]
        return entities.entity_scores([item.tags for item in test.items], predictions)["f1"]
    from sklearn.linear_model import LogisticRegression

    size = max(found.tokenizer.get_vocab().values()) + 1
    model = LogisticRegression(C=10.0, max_iter=300).fit(counts(train, size), labels(train))
    return float(model.score(counts(test, size), labels(test)))


def most_frequent_tags(items: list[Tagged]) -> dict[str, str]:
    """Return the most frequent tag of each word in lower case."""
    seen: dict[str, Counter[str]] = defaultdict(Counter)
    for item in items:
        for word, tag in zip(item.words, item.tags, strict=True):
            seen[word.lower()][tag] += 1
    return {word: tags.most_common(1)[0][0] for word, tags in seen.items()}


def counts(split: Split, size: int) -> np.ndarray:
    """Return how often each wordpiece occurs in each text, ``[N, V]``."""
    rows = np.repeat(np.arange(len(split.items)), split.examples.lengths)
    found = np.zeros((len(split.items), size), np.float32)
    np.add.at(found, (rows, split.examples.ids), 1)
    return found


def labels(split: Split) -> np.ndarray:
    return split.examples.item_targets["labels"]


def pretraining(run: Path) -> dict[str, int]:
    """Return the numbers of a run of pre-training that LEARNING.md names."""
    with (run / "log.jsonl").open() as log:
        begin = json.loads(next(log))
    recipe = Recipe.load(find_recipe(run))
    facts = {"steps": recipe.steps, "batch_tokens": recipe.batch_tokens * recipe.accumulate}
    return facts | {name: begin[name] for name in ("train_tokens", "vocabulary")}


def main() -> None:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.learning.transfer",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("run", type=Path, help="a run of pre-training with preset tiny")
    p.add_argument("data", type=Path, help="the folder with banking77/ and wnut17/")
    p.add_argument("--seeds", type=int, default=3)
    options = p.parse_args()
    where = (options.run / "discriminator", options.data)
    runs = [Run(t, s, i, *where) for i, t, s in itertools.product(range(options.seeds), FILES, STARTS)]
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        found = list(pool.map(train, runs))
    results = json.loads(RESULTS.read_text())
    results["transfer"] = {
        "machine": machine.cpu_model(),
        "torch": torch.__version__,
        "runs": found,
        "words": {task: bag_of_words(task, *where) for task in FILES},
        "epochs": OPTIONS["epochs"],
        "pretraining": pretraining(options.run),
    }
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    report.write(results)


if __name__ == "__main__":
    main()
