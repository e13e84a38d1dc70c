"""Does `finetune` learn the same as transformers' Trainer?

    python -m benchmarks.learning.fine_tune FOLDER

FOLDER has train.csv and test.csv, compressed or not. Both train a tiny classifier without pre-training, with
several seeds, on one thread each. They begin with the same weights and have the same vocabulary, rate,
warm-up, weight decay, clipping, AdamW and epochs. `finetune` packs texts up to a number of tokens, and
Trainer pads batches of 32 texts. LEARNING.md has the result.
"""

import argparse
import itertools
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.harness import machine
from benchmarks.learning import results
from benchmarks.learning.runs import pooled
from benchmarks.learning.transfer import existing
from electra_fast.train.fine_tune import FineTuning
from electra_fast.train.fine_tune_recipe import FineTuneRecipe
from electra_fast.train.task_data import TaskData

MODELS = ("finetune", "trainer")


class Run(NamedTuple):
    model: str  # one of MODELS
    seed: int
    folder: Path  # with the data
    epochs: float


def train(run: Run) -> dict:
    """Train one model; return its accuracy on the test set and the CPU seconds of training and testing."""
    torch.set_num_threads(1)
    train_file, test_file = (str(existing(run.folder, f"{name}.csv*")[0]) for name in ("train", "test"))
    options = {"preset": "tiny", "epochs": run.epochs, "bias_correction": True, "precision": "float32"}
    options |= {"save_every": 10**6, "eval_every": 10**6}  # never
    options |= {"train": (train_file,), "dev": (test_file,), "seed": run.seed}
    recipe = FineTuneRecipe(task="classify", **options).resolved()
    data = TaskData(recipe)
    start = time.process_time()
    accuracy = {"finetune": by_finetune, "trainer": by_trainer}[run.model](recipe, data)
    facts = {"model": run.model, "seed": run.seed, "epochs": run.epochs, "data": run.folder.resolve().name}
    facts |= {"items": len(data.splits["train"].items), "tested": len(data.splits["dev"].items)}
    return facts | {"accuracy": accuracy, "cpu_seconds": time.process_time() - start}


def by_finetune(recipe: FineTuneRecipe, data: TaskData) -> float:
    with tempfile.TemporaryDirectory() as folder:
        return FineTuning(recipe, Path(folder) / "run", data, torch.device("cpu")).run()["accuracy"]


def by_trainer(recipe: FineTuneRecipe, data: TaskData) -> float:
    import transformers  # imported late, because it takes seconds

    from benchmarks.harness.trainer import items, trainer

    train, test = items(data.splits["train"].examples), items(data.splits["dev"].examples)
    recipe = recipe.for_model(data.config, len(train) / recipe.batch)
    head = data.head(recipe.seed)
    model = transformers.ElectraForSequenceClassification(transformers.ElectraConfig(**head.described()))
    model.load_state_dict(head.state_dict())
    options = {"num_train_epochs": recipe.epochs, "learning_rate": recipe.lr, "warmup_steps": recipe.warmup}
    run = trainer(model, train, recipe.batch, "random", seed=recipe.seed, **options)
    run.train()
    found = run.predict(test)
    return float((found.predictions.argmax(1) == found.label_ids).mean())


def main() -> None:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.learning.fine_tune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("folder", type=Path, help="the folder of the data")
    p.add_argument("--epochs", type=float, default=8.0)
    p.add_argument("--seeds", type=results.positive, default=3)
    options = p.parse_args()
    runs = [
        Run(model, seed, options.folder, options.epochs)
        for seed, model in itertools.product(range(options.seeds), MODELS)
    ]
    found = {"machine": machine.cpu_model(), "torch": torch.__version__, "runs": pooled(train, runs)}
    results.write(results.read() | {"fine_tune": found})


if __name__ == "__main__":
    results.run(main)
