"""ELECTRA compared with a masked language model that is trained with the same number of FLOPs.

    python -m benchmarks.learning.equal_compute TEXT --data DATA --out runs/learning/tiny --tokens 40e6
    python -m benchmarks.learning report runs/learning/tiny/equal_compute.json

TEXT is a folder of `tokenize`. DATA has goemotions/ and blimp/ for `probes.py`, and the tasks of
`transfer.py`. The masked model has the size of the discriminator, and the same text, batches and rate. On a
CPU both are trained at the same time, on one thread each. After an interruption the same command continues.

1. Training. A checkpoint is kept after each tenth.
2. Probes of the frozen encoder of each checkpoint.
3. Fine-tuning of both encoders and of new weights, next to a bag of words.

The result is OUT/equal_compute.json, which `report` adds to LEARNING.md.
"""

import argparse
import dataclasses
import functools
import json
import math
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.harness import machine
from benchmarks.learning import results, transfer
from benchmarks.learning.checkpoints import config_of, kept, model_of, tokenizer_of
from benchmarks.learning.objectives import MODELS
from benchmarks.learning.probes import FILES, Probes
from benchmarks.learning.runs import Run, collect, flops, pooled, require_same, save, train
from electra_fast import data
from electra_fast.errors import must
from electra_fast.local import json_object
from electra_fast.train.recipe import Recipe

RESULT, PROBES = "equal_compute.json", "probes.json"
HALVES = {"fused": "discriminator", "masked": "generator"}  # by model, the half that is compared
PARTS = 10
EVALUATED = 100  # batches of held-out text


class Comparison(NamedTuple):
    out: Path  # the folder of the runs
    recipe: Recipe  # of ELECTRA
    data: Path  # the folder with the tasks
    device: str = "cpu"
    seeds: int = 3  # of fine-tuning
    share: float = 1.0  # of the epochs of fine-tuning

    def flops(self, model: str) -> int:
        """Return the FLOPs of a sequence in a step of training."""
        recipe, tokenizer = self.recipe.resolved(), data.tokenizer_of(Path(self.recipe.data[0]))
        return flops(MODELS[model][0], config_of(recipe, tokenizer), recipe.seq)

    def run(self, model: str) -> Run:
        """Return the run of a model; its steps are rounded to a multiple of PARTS."""
        steps = self.recipe.steps
        if model == "masked":
            steps = round(steps * self.flops("fused") / self.flops("masked"))
        every = max(1, round(steps / PARTS))
        steps = every * PARTS
        often = {"save_every": every, "eval_every": every, "eval_batches": EVALUATED, "keep": PARTS + 2}
        return Run(self.out / model, model, dataclasses.replace(self.recipe, steps=steps, **often))


def pretrain(comparison: Comparison, model: str) -> None:
    """Train one model; a complete one is not trained again.

    Raises:
        ValueError: the run in the folder has other options.
    """
    run = comparison.run(model)
    if (run.folder / "checkpoints" / f"step-{run.recipe.steps:09d}").exists():
        require_same(run)
    else:
        train(run, comparison.device)


def probe(comparison: Comparison, model: str) -> dict[str, Any]:
    """Write the probes of every checkpoint of a model to probes.json in its folder; return them."""
    folder = comparison.out / model
    found = {"curve": pooled(functools.partial(probed, comparison, model), kept(folder))}
    found |= Probes(tokenizer_of(folder), comparison.data, comparison.device).words()
    found |= {"files": machine.source_hash(comparison.data, FILES)}
    save(folder / PROBES, found)
    return found


def has_probes(comparison: Comparison, model: str) -> bool:
    """Return whether a model has its probes, with the same files."""
    file = comparison.out / model / PROBES
    files = machine.source_hash(comparison.data, FILES)
    return file.exists() and json_object("learning", file).get("files") == files


def probed(comparison: Comparison, model: str, checkpoint: Path) -> dict[str, Any]:
    """Return the probes of a checkpoint."""
    torch.set_num_threads(1)
    step, found = model_of(checkpoint, MODELS[model][0])
    half = getattr(found, HALVES[model]).float().to(comparison.device)
    probes = Probes(tokenizer_of(comparison.out / model), comparison.data, comparison.device)
    return {"step": step} | probes.of(half)


def facts(comparison: Comparison) -> dict[str, Any]:
    """Return the machine and the options of both models."""
    recipe = comparison.recipe.resolved()
    on_cpu = comparison.device == "cpu"
    found = {"machine": machine.cpu_model() if on_cpu else torch.cuda.get_device_name()}
    found |= {"device": machine.device_slug(), "torch": torch.__version__}
    options = ("preset", "set", "seq", "lr", "batch_tokens", "precision")
    return found | {name: getattr(recipe, name) for name in options}


def trained(comparison: Comparison, model: str) -> dict[str, Any]:
    """Return the numbers of a model that is trained, with its probes if it has them."""
    run = comparison.run(model)
    found = {"steps": run.recipe.steps, "flops": comparison.flops(model)} | collect(run.folder)
    if (file := run.folder / PROBES).exists():
        found["probes"] = json.loads(file.read_text())
    return found


def words(vocabulary: Path, tasks: Path) -> dict[str, float]:
    """Return the metric of a bag of words for each task; arguments as in `transfer.bag_of_words`."""
    metric = functools.partial(transfer.bag_of_words, vocabulary=vocabulary, data=tasks)
    return dict(zip(transfer.TASKS, pooled(metric, transfer.TASKS), strict=True))


def tuning(comparison: Comparison) -> list[transfer.Run]:
    """Return the runs of fine-tuning of the models that are trained, and of new weights."""
    folders = {model: comparison.out / model / half for model, half in HALVES.items()}
    starts = {model: folder for model, folder in folders.items() if folder.exists()}
    preset = comparison.recipe.preset
    return transfer.runs(starts, preset, comparison.data, comparison.seeds, comparison.share)


def steps_in(comparison: Comparison, seconds: float, tried: int) -> int:
    """Return the most steps of ELECTRA for which neither model trains longer than `seconds`.

    The speed of each model is measured in `tried` steps.
    """
    rates = (rate(comparison, model, tried // 2) * comparison.flops(model) for model in HALVES)
    return round(seconds * min(rates) / comparison.flops("fused"))


def rate(comparison: Comparison, model: str, timed: int) -> float:
    """Return the steps per second of a model in the second half of a run of 2 * `timed` steps."""
    recipe = dataclasses.replace(comparison.recipe, steps=2 * timed, log_every=timed, save_every=10**6)
    with tempfile.TemporaryDirectory() as folder:
        train(Run(Path(folder), model, recipe), comparison.device)
        lines = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    first, last = (line["seconds"] for line in lines if line["kind"] == "train")
    return timed / (last - first)


def compare(comparison: Comparison) -> Path:
    """Train, probe and fine-tune what is not yet done; return the file of the result."""
    transfer.require_files("learning: --data", comparison.data, transfer.NEEDED)
    pooled(functools.partial(pretrain, comparison), HALVES)
    for model in HALVES:
        if not has_probes(comparison, model):
            probe(comparison, model)
    found = facts(comparison) | {"models": {model: trained(comparison, model) for model in HALVES}}
    vocabulary = comparison.out / "fused" / "tokenizer"
    found |= {"words": words(vocabulary, comparison.data)}
    found |= {"tasks": pooled(transfer.train, tuning(comparison))}
    file = comparison.out / RESULT
    save(file, found)
    return file


def main() -> None:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.learning.equal_compute",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("text", type=Path, help="a folder that `tokenize` made")
    p.add_argument("--data", type=Path, required=True, help="the folder with the tasks")
    p.add_argument("--out", type=Path, required=True, help="the folder of the runs")
    p.add_argument("--tokens", type=float, required=True, help="number of tokens, with padding, for ELECTRA")
    p.add_argument("--preset", default="tiny")
    p.add_argument("--set", nargs="*", default=[], help="fields of both models: mask_prob=0.25")
    options = p.parse_args()
    if not data.is_tokens_folder(options.text):
        rule = "be a folder that `tokenize` made"  # both models need its vocabulary
        raise ValueError(must("learning: TEXT", rule, options.text))
    common = {"preset": options.preset, "set": tuple(options.set), "precision": "bf16", "pairs": False}
    recipe = Recipe(data=(str(options.text),), **common)
    steps = options.tokens / recipe.resolved().batch_tokens
    if not PARTS <= steps < math.inf:
        rule = f"be {PARTS} steps of {recipe.resolved().batch_tokens:,} or more"
        raise ValueError(must("learning: --tokens", rule, f"{options.tokens:g}"))
    recipe = dataclasses.replace(recipe, steps=round(steps))
    print(compare(Comparison(options.out, recipe, options.data)))


if __name__ == "__main__":
    results.run(main)
