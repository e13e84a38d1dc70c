"""Does the trainer learn? Do kernels and reference learn the same? Is RTD better than masking only?

    python -m benchmarks.learning manual                      # the built-in corpus
    python -m benchmarks.learning wiki TEXT... --probes DIR   # any text; also masked models and probes
    python -m benchmarks.learning report                      # write LEARNING.md from all results

Each run is a `Pretraining` in its own process and its own folder under runs/learning, on one thread; an
interrupted run is resumed. `masked` trains an encoder of the discriminator's size on masked tokens only, with
the same number of FLOPs.
"""

import argparse
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from benchmarks.harness import machine
from benchmarks.learning import report
from benchmarks.learning.probes import probe
from benchmarks.learning.runs import MODELS, RESULTS, MaskedLM, Run, collect, flops, train
from electra_fast.model import Electra


def main() -> None:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.learning",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("corpus", help="a name for the text; `manual` for the built-in corpus; or `report`")
    p.add_argument("texts", nargs="*", help="the files of the text")
    p.add_argument("--steps", type=int, default=1200)
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--probes", type=Path, help="folder with goemotions/ and blimp/; trains masked models too")
    options = p.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"runs": [], "probes": []}
    if options.corpus != "report":
        measure(options, results)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    report.write(results)


def measure(options: argparse.Namespace, results: dict) -> None:
    """Train and probe all models of a corpus, and put their results into `results`."""
    steps = {name: options.steps for name in ("fused", "reference")}
    if options.probes:
        results["flops"] = {"electra": flops(Electra), "masked": flops(MaskedLM)}
        steps["masked"] = round(options.steps * results["flops"]["electra"] / results["flops"]["masked"])
    texts = tuple(options.texts)
    runs = [Run(options.corpus, texts, m, s, n) for s in range(options.seeds) for m, n in steps.items()]
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(train, runs))
    new = [collect(run) for run in runs]
    results["runs"] = [r for r in results["runs"] if r["corpus"] != options.corpus] + new
    results["machine"], results["torch"] = machine.cpu_model(), torch.__version__
    if options.probes:
        encoders = [run for run in runs if run.model != "reference"]
        with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
            folders, models = [run.folder for run in encoders], [MODELS[run.model][0] for run in encoders]
            found = pool.map(probe, folders, models, [options.probes] * len(encoders))
            results["probes"] = [run.facts | x for run, x in zip(encoders, found, strict=True)]


if __name__ == "__main__":
    main()
