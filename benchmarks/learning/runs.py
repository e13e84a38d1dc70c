"""The training runs of the learning experiments: the models, their FLOPs, training, and reading the logs."""

import dataclasses
import json
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from electra_fast.config import ElectraConfig
from electra_fast.errors import must
from electra_fast.model import Electra, ElectraOutput, Generator
from electra_fast.modules import Layout, draw_rng
from electra_fast.ops import FUSED, REFERENCE, TORCH, Ops
from electra_fast.train.pretrain import Pretraining
from electra_fast.train.recipe import Recipe
from electra_fast.train.run_folder import find_recipe

ROOT = Path("runs/learning")
RESULTS = Path(__file__).parents[1] / "results" / "learning.json"


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
        layout = Layout(key_mask)
        masked = self.mask(ids, rng, layout)
        x, words = self.generator.encoder(masked.ids, layout, type_ids=type_ids, rng=rng, return_words=True)
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
    """Return the FLOPs of the products of one training step, at the sizes of the runs, in plain PyTorch."""
    config = dataclasses.replace(ElectraConfig.tiny(), vocab_size=4096, dropout=0.0)
    ids = torch.randint(200, 4096, (8, 128))
    # The counter does not support the CPU's fused attention.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        make_model(config, TORCH)(ids, key_mask=torch.ones_like(ids, dtype=torch.bool)).loss.backward()
    return counter.get_total_flops()


def train(run: Run) -> None:
    recipe = find_recipe(run.folder)
    if recipe and (steps := Recipe.load(recipe).steps) != run.steps:
        # The learning rate fell to 0 at that step, so resuming would be another experiment.
        rule, remedy = f"be {steps} in {run.folder}", "or remove that folder"
        raise ValueError(must("learning: --steps", rule, run.steps, remedy))
    torch.set_num_threads(1)
    make_model, ops = MODELS[run.model]
    recipe = Recipe(
        preset="tiny",
        set=("dropout=0",),  # in the reference, dropout's Philox would need half of a step
        data=run.texts,
        steps=run.steps,
        seed=run.seed,
        eval_every=max(1, run.steps // 12),
    )
    Pretraining(recipe, run.folder, ops=ops, make_model=make_model, device="cpu").run()


def collect(run: Run) -> dict:
    """Return the results of a run from its log; the last line counts if a step was taken twice."""
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
