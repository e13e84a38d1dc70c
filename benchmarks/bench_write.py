"""Writing: a training step of an encoder and a decoder, and what they write for some sources.

`huggingface` is transformers' EncoderDecoderModel of two ELECTRAs; each batch is padded to its longest source
and its longest target. `fused` is the same model after `electra_fast.hf.patch`, and `packed` is what
`python -m electra_fast finetune write` trains: both without padding. In a step all compute the same loss, and
AdamW follows. Only the first two generate, because transformers' `generate` does so here too.

All have ELECTRA-small twice, with the same weights, and dropout 0.1 in a step. The lengths of sources and
targets are those of public data sets (`harness/lengths.py`); ids are random.
"""

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.harness import lengths
from benchmarks.harness.cases import Case, Run, parametrize
from benchmarks.harness.inputs import REHEARSAL
from benchmarks.harness.machine import device
from benchmarks.harness.models import without_dropout
from electra_fast.config import ElectraConfig
from electra_fast.tasks.examples import Examples
from electra_fast.tasks.task import TaskModel
from electra_fast.tasks.write import Write
from electra_fast.tasks.written import WriteExamples
from electra_fast.train.fine_tune_recipe import FineTuneRecipe

STEP, GENERATE = "step", "generate"  # passes
SOURCES, TARGETS = "squadshifts 384", "banking77"
ITEMS = 2 if REHEARSAL else 8
SIZE = f"{ITEMS} sources of {SOURCES}"
NEW_TOKENS = 16
CONFIG = ElectraConfig.tiny() if REHEARSAL else ElectraConfig.small()
WORDS = 1000  # the first id of a word
PROVIDERS = {STEP: ("fused", "packed", "huggingface"), GENERATE: ("fused", "huggingface")}


def sequences(data: str, random: np.random.Generator) -> Examples:
    """Return sequences with the lengths of a data set, in random order."""
    sizes = random.permutation(lengths.sample(data, ITEMS))
    ends = sizes.cumsum()
    ids = random.integers(WORDS, CONFIG.vocab_size, ends[-1], dtype=np.int32)
    ids[ends - sizes], ids[ends - 1] = CONFIG.cls_id, CONFIG.sep_id
    return Examples(ids, np.concatenate([[0], ends]), sizes)


class WriteCase(Case):
    headline = ("fused", "huggingface")
    seconds = 8.0
    rounds = (3, 20)

    def __init__(self, passes: str):
        self.passes, self.providers = passes, PROVIDERS[passes]
        self.name = f"write, {SIZE}, {passes}"
        random = np.random.default_rng(0)
        source, targets = sequences(SOURCES, random), sequences(TARGETS, random)
        self.examples = WriteExamples(
            source.ids, source.offsets, source.first, targets=targets, tokenizer=None
        )
        batch = self.examples.batch(np.arange(ITEMS))
        self.packed = {n: x.to(device()) if isinstance(x, Tensor) else x for n, x in batch.items()}
        ids, labels = (
            padded(batch[name], batch[f"{of}cu_seqlens"], fill)
            for name, of, fill in (("ids", "", -1), ("labels", "target_", -100))
        )
        self.padded = {
            "input_ids": ids.clamp(min=CONFIG.pad_id).to(device()),
            "attention_mask": (ids >= 0).long().to(device()),
            "labels": labels.to(device()),
        }
        self.right: set[str] = set()

    def model(self, provider: str) -> nn.Module:
        """Return the model of a provider in training mode; all have the same weights."""
        import transformers

        from electra_fast import hf

        torch.manual_seed(0)
        task = Write(FineTuneRecipe(task="write"))
        ours = TaskModel(task.head(CONFIG), task)
        if provider == "packed":
            return ours.to(device()).train()
        config = transformers.EncoderDecoderConfig(**ours.head.described())
        model = transformers.EncoderDecoderModel(config)
        model.load_state_dict(ours.head.state_dict())
        if provider == "fused":
            hf.patch(model)
        return model.to(device()).train()

    def loss(self, model: nn.Module) -> Tensor:
        return model(**(self.packed if isinstance(model, TaskModel) else self.padded)).loss

    def results(self, provider: str) -> tuple[float, float]:
        """Return the loss and the norm of its gradient, without dropout."""
        model = self.model(provider)
        if isinstance(model, TaskModel):
            model.eval()
        with without_dropout(model):
            loss = self.loss(model)
            loss.backward()
        return loss.item(), nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()

    @functools.cached_property
    def truth(self) -> tuple[float, float]:
        return self.results("huggingface")

    def prepare(self, provider: str):
        if provider not in self.right:
            for got, wanted in zip(self.results(provider), self.truth, strict=True):
                assert abs(got / wanted - 1) < 1e-4, f"{got:.6g}, transformers has {wanted:.6g}"
            self.right.add(provider)
        model = self.model(provider)
        run = self.generate(model) if self.passes == GENERATE else self.step(model)
        run.eager = "eager calls, as a trainer makes them"
        return run

    def step(self, model: nn.Module):
        optim = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

        def run() -> None:
            optim.zero_grad(set_to_none=True)
            self.loss(model).backward()
            optim.step()

        return run

    def generate(self, model: nn.Module):
        model.eval()
        inputs = {name: self.padded[name] for name in ("input_ids", "attention_mask")}
        options = {"min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS}

        def run() -> None:
            with torch.inference_mode():
                model.generate(**inputs, **options)

        return run

    def info(self, provider: str) -> dict[str, Any]:
        facts = {"op": "write", "size": SIZE, "passes": self.passes, "served_by": None}
        return facts | {"unit": "texts/s", "work": ITEMS}


def padded(values: Tensor, cu_seqlens: Tensor, fill: int) -> Tensor:
    """Return a packed batch as ``[B, L]``."""
    parts = values.split(cu_seqlens.diff().tolist())
    return nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=fill)


@functools.cache
def case(size: str, passes: str) -> WriteCase:
    return WriteCase(passes)


bench_write = parametrize(
    case, [Run(SIZE, passes, p, 94) for passes, providers in PROVIDERS.items() for p in providers]
)
