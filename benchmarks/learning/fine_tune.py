"""Does `finetune` learn the same as transformers' Trainer?

    python -m benchmarks.learning.fine_tune FOLDER       # it has train.csv and test.csv, compressed or not

trains a tiny classifier without pre-training, with several seeds, on one thread each. Both sides begin with
the same weights and have the same vocabulary, rate, warm-up, weight decay, clipping, AdamW and epochs.
`finetune` packs texts up to a number of tokens, Trainer pads batches of 32 texts. LEARNING.md has the result.
"""

import argparse
import itertools
import json
import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.harness import machine
from benchmarks.learning import report
from benchmarks.learning.runs import RESULTS
from electra_fast.train.fine_tune import FineTuning
from electra_fast.train.fine_tune_recipe import FineTuneRecipe
from electra_fast.train.task_data import TaskData

MODELS = ("finetune", "trainer")


class Run(NamedTuple):
    model: str
    seed: int
    folder: Path  # with the data
    epochs: float


def train(run: Run) -> dict:
    """Train one model; return its accuracy on the test set and the CPU seconds of training and testing."""
    torch.set_num_threads(1)
    files = (next(run.folder.glob(f"{part}.csv*")) for part in ("train", "test"))
    names = {role: (str(file),) for role, file in zip(("train", "dev"), files, strict=True)}
    never = {"save_every": 10**6, "eval_every": 10**6}
    options = {"preset": "tiny", "epochs": run.epochs, "bias_correction": True, "precision": "float32"}
    recipe = FineTuneRecipe(task="classify", seed=run.seed, **options, **names, **never).resolved()
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
    of = trainer(model, train, recipe.batch, "random", seed=recipe.seed, **options)
    of.train()
    found = of.predict(test)
    return float((found.predictions.argmax(1) == found.label_ids).mean())


def main() -> None:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.learning.fine_tune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("folder", type=Path, help="the folder of the data")
    p.add_argument("--epochs", type=float, default=8.0)
    p.add_argument("--seeds", type=int, default=3)
    options = p.parse_args()
    runs = [
        Run(m, s, options.folder, options.epochs) for s, m in itertools.product(range(options.seeds), MODELS)
    ]
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        found = []
        for result in pool.map(train, runs):
            found.append(result)
            print(result, flush=True)
    results = json.loads(RESULTS.read_text())
    results["fine_tune"] = {"machine": machine.cpu_model(), "torch": torch.__version__, "runs": found}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    report.write(results)


if __name__ == "__main__":
    main()
