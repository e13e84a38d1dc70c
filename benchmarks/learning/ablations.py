"""ELECTRA and what its paper compares it with (Clark et al. 2020, table 5 and figure 3), at a small scale.

    python -m benchmarks.learning.ablations TEXT --data DATA

TEXT and DATA are those of `equal_compute.py`. All are trained with the same text and number of steps, on one
thread each, and judged by the probes of `probes.py` and the tasks of `transfer.py`. LEARNING.md has the
result.
"""

import argparse
import functools
import re
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import machine
from benchmarks.learning import probes, results, transfer
from benchmarks.learning.objectives import MODELS
from benchmarks.learning.runs import ROOT, Run, collect, pooled, train
from benchmarks.learning.variants import COMMON, Experiment, recipe

WITHOUT_SCORES = ("replace", "all tokens")  # their discriminator's head is not trained
ABLATIONS = Experiment(
    "fused",
    6000,
    COMMON | {"seq": 32, "lr": 1e-3},
    {
        "ELECTRA": {},
        "generator of 1/8": {"generator_hidden": 16, "generator_ffn": 64},
        "generator of 1/4": {"generator_hidden": 32, "generator_ffn": 128},
        "generator of the full width": {"generator_hidden": 128, "generator_heads": 2, "generator_ffn": 512},
        "unigram generator": {"model": "unigram"},
        "uniform generator": {"generator": "uniform"},
        "loss at masked tokens only": {"model": "masked only"},
        "All-Tokens MLM": {"model": "all tokens", "rtd_weight": 1.0},
        "Replace MLM": {"model": "replace", "rtd_weight": 1.0},
        "masked LM": {"model": "masked"},
    },
)


def runs(text: tuple[str, ...]) -> dict[str, Run]:
    found = {}
    for name, changes in ABLATIONS.variants.items():
        options = dict(changes)
        model = options.pop("model", ABLATIONS.model)
        folder = ROOT / "ablations" / re.sub(r"\W+", "-", name)
        found[name] = Run(folder, model, recipe(ABLATIONS, options, text))
    return found


def encoder(run: Run) -> Path:
    """Return the folder of the half that is judged."""
    return run.folder / ("generator" if run.model == "masked" else "discriminator")


def probed(run: Run, data: Path) -> dict[str, Any]:
    found = probes.probe(run.folder, MODELS[run.model][0], data)
    if run.model in WITHOUT_SCORES:
        del found["pairs"]
    return found


def measure(text: tuple[str, ...], data: Path, seeds: int) -> dict[str, Any]:
    trained = runs(text)
    pooled(train, trained.values())
    scores = pooled(functools.partial(probed, data=data), trained.values())
    starts = {name: encoder(run) for name, run in trained.items()}
    tasks = transfer.runs(starts, ABLATIONS.base["preset"], data, seeds)
    found = [
        {"name": name, "model": run.model, "probes": score} | collect(run.folder)
        for (name, run), score in zip(trained.items(), scores, strict=True)
    ]
    facts = {"machine": machine.cpu_model(), "torch": torch.__version__}
    return facts | {"runs": found, "tasks": pooled(transfer.train, tasks)}


def main() -> None:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.learning.ablations",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("text", nargs="+", help="files or folders")
    p.add_argument("--data", type=Path, required=True, help="the folder with the tasks")
    p.add_argument("--seeds", type=results.positive, default=2, help="of fine-tuning")
    options = p.parse_args()
    transfer.require_files("learning: --data", options.data, transfer.NEEDED)
    found = measure(tuple(options.text), options.data, options.seeds)
    results.write(results.read() | {"ablations": found})


if __name__ == "__main__":
    results.run(main)
