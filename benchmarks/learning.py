"""Does the trainer learn, do its kernels learn what the reference learns, and does RTD beat masking alone?

    python -m benchmarks.learning manual                      # the built-in corpus
    python -m benchmarks.learning wiki TEXT... --probes DIR   # any text; masked models too, and `probes`
    python -m benchmarks.learning report                      # LEARNING.md of all that was run

Each run is a `Pretraining` in a process and a folder of its own under runs/learning, on one thread; one
that was broken off goes on where it was. `masked` trains an encoder of the discriminator's size on masked
tokens alone, with as many FLOPs. The curves need matplotlib (`pip install matplotlib`).
"""

import argparse
import dataclasses
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import machine
from electra_fast.config import ElectraConfig
from electra_fast.model import Electra, ElectraOutput, Generator
from electra_fast.modules import draw_rng
from electra_fast.ops import FUSED, REFERENCE, Ops
from electra_fast.pretrain import Pretraining
from electra_fast.recipe import Recipe
from electra_fast.testing.baseline import TORCH

ROOT = Path("runs/learning")
RESULTS = Path(__file__).parent / "results" / "learning.json"


class MaskedLM(nn.Module):
    """A masked language model of the discriminator's size: `Electra` without the discriminator."""

    def __init__(self, config: ElectraConfig, ops: Ops = FUSED):
        super().__init__()
        sizes = {f"generator_{name}": getattr(config, name) for name in ("layers", "hidden", "heads", "ffn")}
        self.config, self.ops = dataclasses.replace(config, **sizes), ops
        self.generator = Generator(self.config, ops)

    candidates, mask = Electra.candidates, Electra.mask

    def forward(self, ids, *, type_ids=None, key_mask=None, rng=None) -> ElectraOutput:
        rng = draw_rng(ids) if rng is None else rng
        masked = self.mask(ids, rng, key_mask=key_mask)
        x, words = self.generator.encoder(
            masked.ids, type_ids=type_ids, key_mask=key_mask, rng=rng, return_words=True
        )
        x = x.flatten(0, -2).index_select(0, masked.positions)
        mlm = self.generator.head(x, words, masked.targets, masked.weights, rng)
        nothing = torch.zeros((), device=ids.device)
        masked = masked.weights.sum()
        return ElectraOutput(mlm.loss, mlm.loss, nothing, mlm.correct, masked, nothing.expand(4))


MODELS = {"fused": (Electra, FUSED), "reference": (Electra, REFERENCE), "masked": (MaskedLM, FUSED)}


class Run(NamedTuple):
    corpus: str
    texts: tuple[str, ...]
    model: str
    seed: int
    steps: int

    @property
    def folder(self) -> Path:
        return ROOT / f"{self.corpus}-{self.model}-{self.seed}"

    @property
    def facts(self) -> dict:
        return self._asdict() | {"texts": len(self.texts)}


def flops(make_model) -> int:
    """Count a training step's FLOPs, those of its products, at the sizes of the runs, in plain PyTorch."""
    config = dataclasses.replace(ElectraConfig.tiny(), vocab_size=4096, dropout=0.0)
    ids = torch.randint(200, 4096, (8, 128))
    # The counter does not know the CPU's fused attention.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        make_model(config, TORCH)(ids, key_mask=torch.ones_like(ids, dtype=torch.bool)).loss.backward()
    return counter.get_total_flops()


def train(run: Run) -> None:
    begun = run.folder / "config.json"
    if begun.exists() and (steps := Recipe.load(begun).steps) != run.steps:
        # Its rate fell to 0 elsewhere: what went on from there would be another experiment.
        raise ValueError(f"learning: --steps must be {steps} in {run.folder}, got {run.steps}; or remove it")
    torch.set_num_threads(1)
    make_model, ops = MODELS[run.model]
    recipe = Recipe(
        preset="tiny",
        set=("dropout=0",),  # by Philox in the reference it would be half of a step
        data=run.texts,
        steps=run.steps,
        seed=run.seed,
        eval_every=max(1, run.steps // 12),
    )
    Pretraining(recipe, run.folder, ops=ops, make_model=make_model, device="cpu").run()


def collect(run: Run) -> dict:
    """Read a run's log; of a step that was taken twice, the last line."""
    lines = [json.loads(line) for line in (run.folder / "log.jsonl").read_text().splitlines()]
    begin, train, held_out = (
        {line["step"]: line for line in lines if line["kind"] == kind}
        for kind in ("begin", "train", "held_out")
    )
    curve = []
    for step, line in held_out.items():
        tokens = sum(past["tokens"] for at, past in train.items() if at <= step)
        keep = ("step", "mlm_loss", "mlm_accuracy", "rtd_loss", "replaced", "auc", "auc_low", "auc_high")
        curve.append({"tokens": tokens} | {name: line[name] for name in keep})
    facts = {name: begin[0][name] for name in ("parameters", "vocabulary", "train_tokens", "unigram_loss")}
    seconds = sum(line["tokens"] / line["tokens_per_second"] for line in train.values())
    return run.facts | facts | {"seconds": seconds, "curve": curve}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.learning", description=__doc__)
    parser.add_argument("corpus", help="a name for the text, `manual` for the built-in one; or `report`")
    parser.add_argument("texts", nargs="*", help="its files")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--probes", type=Path, help="the folder of goemotions/ and blimp/: masked models too")
    options = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"runs": [], "probes": []}
    if options.corpus != "report":
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
            from benchmarks.probes import probe

            encoders = [run for run in runs if run.model != "reference"]
            with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
                folders, models = [run.folder for run in encoders], [MODELS[run.model][0] for run in encoders]
                found = pool.map(probe, folders, models, [options.probes] * len(encoders))
                results["probes"] = [run.facts | x for run, x in zip(encoders, found, strict=True)]
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    from benchmarks.learning_report import write

    write(results)


if __name__ == "__main__":
    main()
