"""Small fine-tuning runs on made-up sentences, also in processes that a test can kill."""

import functools
import os
import random
from pathlib import Path

import torch
import trainings

from electra_fast.train.fine_tune import FineTuning, fine_tune
from electra_fast.train.fine_tune_recipe import FineTuneRecipe

SIZES = ("layers=1", "hidden=32", "heads=1", "ffn=64", "embedding=16", "max_positions=32")
SUBJECTS = {"card": "my card was lost", "cash": "I need cash now", "rate": "what is the rate today"}
WORDS = ("please", "tell", "me", "quickly", "bank", "again", "tomorrow", "yes")


def rows(count: int, seed: int) -> list[tuple[str, str]]:
    """Return sentences with the label of their subject."""
    draw = random.Random(seed)
    labels = [draw.choice(sorted(SUBJECTS)) for _ in range(count)]
    return [(" ".join([*draw.sample(WORDS, draw.randint(0, 4)), SUBJECTS[x]]), x) for x in labels]


def files(folder: Path) -> dict[str, str]:
    """Write train.csv, dev.csv and test.csv; return their paths."""
    for seed, (name, count) in enumerate({"train": 96, "dev": 40, "test": 40}.items()):
        lines = ["text,label", *(f'"{text}",{label}' for text, label in rows(count, seed))]
        (folder / f"{name}.csv").write_text("\n".join(lines) + "\n")
    return {name: str(folder / f"{name}.csv") for name in ("train", "dev", "test")}


def recipe(paths: dict[str, str], **changes) -> FineTuneRecipe:
    """Return the recipe of a run of 24 steps that learns the task, with a checkpoint every fourth step."""
    options = {"task": "classify", "preset": "tiny", "set": SIZES, "vocab": "200", "batch": 12, "lr": 5e-3}
    options |= {"steps": 24, "save_every": 4, "log_every": 4, "eval_every": 8}
    return FineTuneRecipe(**options | {role: (path,) for role, path in paths.items()} | changes)


def small(paths: dict[str, str], out: Path, **changes) -> dict:
    """Train in this process, on the CPU."""
    return fine_tune(recipe(paths, **changes), out, device="cpu")


def train(
    recipe: FineTuneRecipe, out: Path, die_at: int | None, signal_at: tuple[int, int, int] | None
) -> None:
    """Train to the end. `die_at` is that of `trainings.train`; `signal_at` = (number, seed, step)."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # hides the progress bar
    torch.set_num_threads(1)
    if die_at is not None:
        trainings.kill_at(die_at)
    if signal_at is not None:
        FineTuning._one_step = functools.partialmethod(_signalled, FineTuning._one_step, *signal_at)
    fine_tune(recipe, out, device="cpu")


def _signalled(training, one_step, number, seed, step, batches) -> None:
    one_step(training, batches)
    if (training.recipe.seed, training.step) == (seed, step):
        os.kill(os.getpid(), number)


def start(recipe, out, die_at=None, signal_at=None):
    process = trainings.CONTEXT.Process(target=train, args=(recipe, out, die_at, signal_at))
    process.start()
    return process


def finish(*args, **kwargs) -> int:
    """Train in another process; return its exit code."""
    process = start(*args, **kwargs)
    process.join(120)
    return process.exitcode


def result(out: Path) -> list[bytes]:
    """Return the model and the metrics of a run."""
    return [(out / name).read_bytes() for name in ("model.safetensors", "metrics.json", "predictions.jsonl")]
