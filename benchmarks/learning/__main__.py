"""Does the trainer learn, and do kernels and reference learn the same?

    python -m benchmarks.learning manual                      # preset tiny on the built-in corpus
    python -m benchmarks.learning wiki TEXT...                # on any text
    python -m benchmarks.learning report                      # write LEARNING.md from all results
    python -m benchmarks.learning report equal_compute.json   # the same, with a result of `equal_compute`

Each run is a `Pretraining` in its own process and its own folder under runs/learning, on one thread; an
interrupted run is resumed.
"""

import argparse
import dataclasses
import itertools
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import machine
from benchmarks.learning import equal_compute_report, results
from benchmarks.learning.runs import ROOT, Run, collect, pooled, train
from electra_fast.errors import must
from electra_fast.local import json_object
from electra_fast.train.recipe import Recipe

EVALUATIONS = 12


def main(arguments: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.learning",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("corpus", help="a name for the text; `manual` for the built-in corpus; or `report`")
    p.add_argument("texts", nargs="*", help="the files of the text, or of results")
    p.add_argument("--steps", type=int, help="default: those of the preset")
    p.add_argument("--seeds", type=results.positive, default=3)
    options = p.parse_args(arguments)
    if options.corpus == "report":
        compared = [comparison(Path(file)) for file in options.texts]
        everything = results.read()
        for found in compared:
            everything.setdefault("equal_compute", {})[f"{found['preset']}-{found['device']}"] = found
    else:
        found = measure(options)
        everything = results.read()
        others = [run for run in everything["runs"] if run["corpus"] != options.corpus]
        everything |= {"runs": others + found}
    results.write(everything)


def comparison(file: Path) -> dict[str, Any]:
    """Return a result of `equal_compute`.

    Raises:
        FileNotFoundError, ValueError: the file does not exist, or contains something else.
    """
    found = json_object("learning", file)
    try:
        equal_compute_report.section(found, "")
    except (LookupError, TypeError, ValueError) as error:
        rule = "be a result of equal_compute"
        raise ValueError(must(f"learning: {file}", rule, f"{type(error).__name__} {error}")) from error
    return found


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Train all models of a corpus; return their results.

    Raises:
        ValueError: the name of the corpus is not that of the text.
    """
    if (options.corpus == "manual") == bool(options.texts):
        rule, got = "have files, and `manual` none", f"{options.corpus} with {len(options.texts)}"
        raise ValueError(must("learning: a corpus", rule, got))
    names = itertools.product(range(options.seeds), ("fused", "reference"))
    facts = [{"corpus": options.corpus, "model": model, "seed": seed} for seed, model in names]
    runs = [run(each, tuple(options.texts), options.steps) for each in facts]
    pooled(train, runs)
    here = {"machine": machine.cpu_model(), "torch": torch.__version__}
    return [each | here | described(run) | collect(run.folder) for each, run in zip(facts, runs, strict=True)]


def run(facts: dict[str, Any], texts: tuple[str, ...], steps: int | None) -> Run:
    """Return the run of a corpus, a model and a seed; `steps` None: those of the preset."""
    recipe = Recipe(preset="tiny", precision="bf16", data=texts, steps=steps, seed=facts["seed"])
    steps = recipe.resolved().steps
    recipe = dataclasses.replace(recipe, steps=steps, eval_every=max(1, steps // EVALUATIONS))
    return Run(ROOT / "{corpus}-{model}-{seed}".format(**facts), facts["model"], recipe)


def described(run: Run) -> dict[str, Any]:
    """Return the options of a run that LEARNING.md names."""
    names = ("preset", "set", "seq", "batch_tokens", "lr", "precision", "steps")
    return {name: getattr(run.recipe.resolved(), name) for name in names}


if __name__ == "__main__":
    results.run(main)
