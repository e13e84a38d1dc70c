"""What decides whether a small ELECTRA learns: short runs that differ from a base as their names say.

    python -m benchmarks.learning.variants plateau TEXT   # when does the generator read its context?
    python -m benchmarks.learning.variants collapse       # when does the discriminator collapse?
    python -m benchmarks.learning.variants sizes TEXT     # which sizes and rates are best?

TEXT is a text or a folder of `tokenize`. Each run is a `Pretraining` under runs/learning, on one thread in
bfloat16; an interrupted run is resumed. LEARNING.md has the results.
"""

import argparse
import re
from typing import Any, NamedTuple

import torch

from benchmarks.harness import machine
from benchmarks.learning import results
from benchmarks.learning.checkpoints import final_model
from benchmarks.learning.objectives import MODELS
from benchmarks.learning.runs import ROOT, Run, collect, pooled, train
from electra_fast.model import Electra
from electra_fast.modules import Layout
from electra_fast.train.evaluation import SEED, area_under_curve, interval
from electra_fast.train.pretrain import Pretraining
from electra_fast.train.recipe import Recipe

EVALUATIONS = 10
BATCHES = 40  # of an evaluation
JUDGED = 100  # batches for `common_auc`


class Experiment(NamedTuple):
    """The first run is the base; the name of each other run is its difference from the base."""

    model: str  # a name in `objectives.MODELS`
    steps: int  # of 1,024 tokens
    base: dict[str, Any]  # options of `Recipe`, and fields of `ElectraConfig`
    variants: dict[str, dict[str, Any]]  # the changes of each run, by its name


COMMON = {"preset": "tiny", "precision": "bf16", "pairs": False, "batch_tokens": 1024, "dropout": 0.0}
WIDE = {"generator_hidden": 128, "generator_heads": 2, "generator_ffn": 512}
EXPERIMENTS = {
    "plateau": Experiment(
        "generator",
        2000,
        COMMON | {"seq": 32, "lr": 2e-3, "initial_attention": "local"},
        {
            "base": {},
            "attention initially random": {"initial_attention": "random"},
            "attention initially random, initializer 0.06": {
                "initial_attention": "random",
                "initializer": 0.06,
            },
            "initializer 0.06": {"initializer": 0.06},
            "rate 1e-3": {"lr": 1e-3},
            "rate 4e-3": {"lr": 4e-3},
            "4,096 tokens per step": {"batch_tokens": 4096},
            "4,096 tokens per step, rate 4e-3": {"batch_tokens": 4096, "lr": 4e-3},
            "sequences of 16": {"seq": 16},
            "sequences of 64": {"seq": 64},
            "sequences of 128": {"seq": 128},
            "a width of 128": WIDE,
            "four heads": {"generator_heads": 4},
            "30 % masked": {"mask_prob": 0.3},
            "[MASK] at every masked position": {"keep_prob": 0.0},
            "dropout 0.1": {"dropout": 0.1},
        },
    ),
    "collapse": Experiment(
        "fused",
        2000,
        COMMON
        | {"seq": 128, "lr": 2e-3, "initial_attention": "random"}
        | {"rtd_weight": 50.0, "dropout": 0.1, "pairs": True},
        {
            "base": {},
            "rate 1e-3": {"lr": 1e-3},
            "rate 5e-4": {"lr": 5e-4},
            "warm-up of 1,000 steps": {"warmup": 1000},
            "beta2 0.999": {"beta2": 0.999},
            "bias correction": {"bias_correction": True},
            "clipping at 10": {"clip": 10.0},
            "weight of RTD 10": {"rtd_weight": 10.0},
            "weight of RTD 1": {"rtd_weight": 1.0},
            "float32": {"precision": "float32"},
            "no dropout": {"dropout": 0.0},
            "embeddings not shared": {"sharing": "none"},
            "attention initially local": {"initial_attention": "local"},
            "sequences of 32": {"seq": 32},
            "sequences of 32, attention initially local": {"seq": 32, "initial_attention": "local"},
            "the preset": {
                "seq": 32,
                "initial_attention": "local",
                "rtd_weight": 10.0,
                "dropout": 0.0,
                "lr": 1e-3,
            },
        },
    ),
    "sizes": Experiment(
        "fused",
        3000,
        COMMON | {"seq": 32, "lr": 1e-3, "initial_attention": "local", "rtd_weight": 10.0},
        {
            "base": {},
            "generator of a quarter": {"generator_hidden": 32, "generator_ffn": 128},
            "generator of the full width": WIDE,
            "weight of RTD 3": {"rtd_weight": 3.0},
            "weight of RTD 50": {"rtd_weight": 50.0},
            "2,048 tokens per step": {"batch_tokens": 2048},
            "rate 1.5e-3": {"lr": 1.5e-3},
            "rate 5e-4": {"lr": 5e-4},
            "25 % masked": {"mask_prob": 0.25},
            "dropout 0.1": {"dropout": 0.1},
            "sequences of 64": {"seq": 64},
        },
    ),
}


def recipe(experiment: Experiment, changes: dict[str, Any], text: tuple[str, ...]) -> Recipe:
    """Return the recipe of a variant, with as many tokens as the others."""
    values = experiment.base | changes
    options = {name: values.pop(name) for name in list(values) if name in Recipe.__dataclass_fields__}
    steps = experiment.steps * COMMON["batch_tokens"] // options["batch_tokens"]
    often = {"eval_every": max(1, steps // EVALUATIONS), "eval_batches": BATCHES, "save_every": 10**6}
    assigned = tuple(f"{name}={value}" for name, value in values.items())
    return Recipe(set=assigned, data=text, steps=steps, **options, **often)


def measure(name: str, text: tuple[str, ...]) -> dict[str, Any]:
    """Train all variants of an experiment; return what LEARNING.md says about them."""
    experiment = EXPERIMENTS[name]
    runs = [
        Run(ROOT / name / re.sub(r"\W+", "-", variant), experiment.model, recipe(experiment, changes, text))
        for variant, changes in experiment.variants.items()
    ]
    pooled(train, runs)
    found = [{"name": v} | collect(run.folder) for v, run in zip(experiment.variants, runs, strict=True)]
    if name == "sizes":
        for each, auc in zip(found, common_auc(runs), strict=True):
            each["common_auc"] = auc
    return {"machine": machine.cpu_model(), "torch": torch.__version__, "runs": found}


def common_auc(runs: list[Run]) -> list[tuple[float, float, float]]:
    """Return the AUC of each discriminator, with its interval, on the same text and replaced tokens.

    The generator of the first run replaces them, because an AUC against a run's own generator is lower if
    that generator is better.
    """
    first = Pretraining(runs[0].recipe, runs[0].folder, device="cpu")
    batches = [first.held_out_loader[index] for index in range(JUDGED)]
    found = (final_model(run.folder, MODELS[run.model][0]) for run in runs)
    return [interval([_auc(first.model, model, b, i) for i, b in enumerate(batches)]) for model in found]


def _auc(base: Electra, model: Electra, batch: dict[str, Any], index: int) -> float:
    """Return the AUC of a model on a batch in which the generator of `base` has replaced tokens."""
    ids, layout = batch["ids"], Layout(batch["key_mask"])
    rng = torch.tensor([SEED, index])
    with torch.no_grad():
        masked = base.mask(ids, rng, layout)
        samples = base.generator.propose(ids, masked, layout, type_ids=None, rng=rng).samples
        corrupt = base.ops.replace_tokens(ids, masked.positions, samples, masked.weights)
        logits = model.discriminator(corrupt.ids, key_mask=batch["key_mask"])
    return area_under_curve(logits, corrupt.replaced, batch["key_mask"].float()).item()


def main() -> None:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.learning.variants",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("experiment", choices=tuple(EXPERIMENTS))
    p.add_argument("text", nargs="*", help="files or folders; default: the manual of Python")
    options = p.parse_args()
    found = measure(options.experiment, tuple(options.text))
    everything = results.read()
    everything.setdefault("variants", {})[options.experiment] = found
    results.write(everything)


if __name__ == "__main__":
    results.run(main)
