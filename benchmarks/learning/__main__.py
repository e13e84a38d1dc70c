"""Does the trainer learn? Do kernels and reference learn the same? Is RTD better than masking only?

    python -m benchmarks.learning manual                      # the built-in corpus
    python -m benchmarks.learning wiki TEXT... --probes DIR   # any text; also masked models and probes
    python -m benchmarks.learning report                      # write LEARNING.md from all results
    python -m benchmarks.learning report equal_compute.json   # the same, with a result of `equal_compute`

Each run is a `Pretraining` in its own process and its own folder under runs/learning, on one thread; an
interrupted run is resumed. `masked` trains an encoder of the discriminator's size on masked tokens only, with
the same number of FLOPs.
"""

import argparse
import dataclasses
import itertools
import json
from pathlib import Path

import torch

from benchmarks.harness import machine
from benchmarks.learning import report
from benchmarks.learning.objectives import MODELS, MaskedLM
from benchmarks.learning.probes import probe
from benchmarks.learning.runs import RESULTS, ROOT, Run, collect, flops, pooled, train
from electra_fast.config import ElectraConfig
from electra_fast.model import Electra
from electra_fast.train.recipe import PAPER, Recipe


def main(arguments: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.learning",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("corpus", help="a name for the text; `manual` for the built-in corpus; or `report`")
    p.add_argument("texts", nargs="*", help="the files of the text, or of results")
    p.add_argument("--steps", type=int, default=1200)
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--probes", type=Path, help="folder with goemotions/ and blimp/; trains masked models too")
    options = p.parse_args(arguments)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"runs": [], "probes": []}
    if options.corpus != "report":
        measure(options, results)
    for file in options.texts if options.corpus == "report" else ():
        found = json.loads(Path(file).read_text())
        results.setdefault("equal_compute", {})[f"{found['preset']}-{found['device']}"] = found
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    report.write(results)


def measure(options: argparse.Namespace, results: dict) -> None:
    """Train and probe all models of a corpus, and put their results into `results`."""
    steps = {name: options.steps for name in ("fused", "reference")}
    if options.probes:
        config = dataclasses.replace(ElectraConfig.tiny(), vocab_size=4096, dropout=0.0)
        models = {"electra": Electra, "masked": MaskedLM}
        results["flops"] = {
            name: flops(model, config, PAPER["tiny"]["seq"]) for name, model in models.items()
        }
        steps["masked"] = round(options.steps * results["flops"]["electra"] / results["flops"]["masked"])
    names = [(seed, model) for seed, model in itertools.product(range(options.seeds), steps)]
    facts = [{"corpus": options.corpus, "model": m, "seed": s, "steps": steps[m]} for s, m in names]
    runs = [run(each, tuple(options.texts)) for each in facts]
    pooled(train, runs)
    new = [each | collect(run.folder) for each, run in zip(facts, runs, strict=True)]
    results["runs"] = [r for r in results["runs"] if r["corpus"] != options.corpus] + new
    results["machine"], results["torch"] = machine.cpu_model(), torch.__version__
    if options.probes:
        encoders = [(each, run) for each, run in zip(facts, runs, strict=True) if run.model != "reference"]
        folders, models = zip(*((run.folder, MODELS[run.model][0]) for _, run in encoders), strict=True)
        found = pooled(probe, folders, models, [options.probes] * len(encoders))
        results["probes"] = [each | x for (each, _), x in zip(encoders, found, strict=True)]


def run(facts: dict, texts: tuple[str, ...]) -> Run:
    recipe = Recipe(
        preset="tiny",
        set=("dropout=0",),  # in the reference, dropout's Philox would need half of a step
        data=texts,
        steps=facts["steps"],
        seed=facts["seed"],
        eval_every=max(1, facts["steps"] // 12),
    )
    return Run(ROOT / "{corpus}-{model}-{seed}".format(**facts), facts["model"], recipe)


if __name__ == "__main__":
    main()
