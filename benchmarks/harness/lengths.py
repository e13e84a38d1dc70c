"""The lengths of the texts in public data sets, in tokens: real lengths for benchmarks, without the texts.

    python -m benchmarks.harness.lengths wnut17 train.conll --task tag --vocab vocab.txt --max-len 128 \\
        --source "WNUT17, training set" --licence "CC BY 4.0"

writes the number of texts of each length into benchmarks/lengths.json, with the special tokens, as `finetune`
encodes them. The committed ones have BERT's uncased vocabulary; `squadshifts` are windows of questions.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from electra_fast import data
from electra_fast.tasks import TASKS
from electra_fast.train.fine_tune_recipe import FineTuneRecipe

FILE = Path(__file__).parents[1] / "lengths.json"


def described(name: str) -> dict:
    """Return what FILE has about a data set: ``source``, ``licence``, ``labels`` and ``counts`` by length."""
    return json.loads(FILE.read_text())[name]


def sample(name: str, count: int) -> np.ndarray:
    """Return `count` lengths at equally spaced quantiles of a data set, in ascending order, int64."""
    counts = described(name)["counts"]
    every = np.repeat(np.arange(len(counts)), counts)
    return every[((np.arange(count) + 0.5) / count * len(every)).astype(np.int64)]


def measure(options: argparse.Namespace) -> dict:
    """Return the entry of a data set."""
    recipe = FineTuneRecipe(
        task=options.task, preset="small", train=tuple(options.files), dev=options.files[:1]
    )
    task = TASKS[options.task](recipe.resolved())
    items = task.read(options.files, "train")
    task.learn(items)
    task.max_len = options.max_len
    examples = task.examples(items, data.load_tokenizer(options.vocab, special_ids=None))
    counts = np.bincount(np.diff(examples.offsets)).tolist()
    facts = {"source": options.source, "licence": options.licence}
    return facts | {"labels": max(2, len(task.labels)), "counts": counts}


def main() -> None:
    p = argparse.ArgumentParser(prog="python -m benchmarks.harness.lengths", description=__doc__)
    p.add_argument("name", help="of the data set in the benchmarks")
    p.add_argument("files", nargs="+")
    p.add_argument("--task", required=True, choices=TASKS)
    p.add_argument("--vocab", type=Path, required=True, help="vocab.txt")
    p.add_argument("--max-len", type=int, default=128)
    p.add_argument("--source", required=True)
    p.add_argument("--licence", required=True)
    options = p.parse_args()
    found = json.loads(FILE.read_text()) if FILE.exists() else {}
    write(found | {options.name: measure(options)})


def write(found: dict) -> None:
    """Write FILE with one line per data set."""
    lines = [
        f"{json.dumps(name)}: {json.dumps(entry, separators=(',', ':'))}" for name, entry in found.items()
    ]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
