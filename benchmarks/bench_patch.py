"""A training step of transformers' models, patched and unpatched: forward, backward, AdamW.

`huggingface` is the unpatched model, and `fused` is the same model after `electra_fast.hf.patch`. The rest of
the step is the same. On a GPU the step runs under autocast to bfloat16.
"""

import functools
from typing import Any

import torch
from torch import nn

from benchmarks.harness.cases import Case, Run, parametrize
from benchmarks.harness.compiled import compiled
from benchmarks.harness.inputs import CUDA, Make, Size
from benchmarks.harness.models import build, without_dropout
from benchmarks.harness.providers import COMPILED
from electra_fast.config import ElectraConfig
from electra_fast.pretrained import config_to_hugging_face

DTYPE = torch.bfloat16 if CUDA else None
PROVIDERS = ("fused", "huggingface", *(["huggingface_compile"] if CUDA else []))
SMALL = Size("8x128", 8, 128, ElectraConfig.small, dropout=0.1)
SIZES = {"ElectraForMaskedLM 8x128": SMALL, "ElectraForPreTraining 8x128": SMALL}
if CUDA:
    sizes = (
        Size("small 128x128", 128, 128, ElectraConfig.small),
        Size("base 32x512", 32, 512, ElectraConfig.base),
    )
    heads = ("ElectraForMaskedLM", "ElectraForPreTraining")
    SIZES = {f"{head} {size.name}": size for head in heads for size in sizes}


class PatchCase(Case):
    providers = PROVIDERS
    headline = ("fused", "huggingface")
    seconds = 8.0
    rounds = (3, 20)
    compiling = 90.0

    def __init__(self, size: str):
        self.head = size.split()[0]
        self.size, self.name = SIZES[size], f"patch, {size}, step"
        self.make = Make(self.size)
        self.right: set[str] = set()
        ids, key_mask, _ = self.make.batch()
        self.inputs = {"input_ids": ids, "attention_mask": key_mask.long()}
        masked = torch.zeros_like(ids, dtype=torch.bool)
        slots = self.make.masked()
        masked.view(-1)[slots.positions.long()] = slots.weights > 0
        if self.head == "ElectraForMaskedLM":
            self.inputs |= {
                "input_ids": ids.masked_fill(masked, self.size.config.mask_id),
                "labels": ids.masked_fill(~masked, -100),
            }
        else:
            self.inputs["labels"] = masked.long()
        self.inputs = {name: x.long() for name, x in self.inputs.items()}

    def model(self, provider: str) -> nn.Module:
        import transformers  # imported late, because it takes seconds

        config = transformers.ElectraConfig(**config_to_hugging_face(self.size.config))
        return build(self.head, config, provider, self.make.device)

    def loss(self, model) -> torch.Tensor:
        with torch.autocast(self.make.device, DTYPE, enabled=CUDA):
            return model(**self.inputs).loss

    @functools.cached_property
    def truth(self) -> tuple[float, float]:
        return self.loss_and_gradient(self.model("huggingface"))

    def loss_and_gradient(self, model) -> tuple[float, float]:
        """Return the loss and the norm of its gradient, without dropout."""
        with without_dropout(model):
            loss = self.loss(model)
            loss.backward()
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        model.zero_grad(set_to_none=True)
        return loss.item(), norm.item()

    def prepare(self, provider: str):
        model = self.model(provider)
        allowed = 0.02 if CUDA else 1e-4
        names = ("loss", "gradient norm")
        if provider not in self.right:
            for name, got, wanted in zip(names, self.loss_and_gradient(model), self.truth, strict=True):
                assert abs(got / wanted - 1) < allowed, f"{name}: {got:.6g}, transformers has {wanted:.6g}"
            self.right.add(provider)
        forward = compiled(model, provider) if provider in COMPILED else model
        optim = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

        def step():
            optim.zero_grad(set_to_none=True)
            self.loss(forward).backward()
            optim.step()

        step.eager = "eager steps, as a trainer runs them"
        return step

    def info(self, provider: str) -> dict[str, Any]:
        size = self.name.removeprefix("patch, ").removesuffix(", step")
        work = int(self.inputs["attention_mask"].sum())
        facts = {"op": "patch", "size": size, "passes": "step", "served_by": None}
        return facts | {"unit": "tokens/s", "work": work}


@functools.cache
def case(size: str, passes: str) -> PatchCase:
    return PatchCase(size)


bench_patch = parametrize(case, [Run(size, "step", p, 95) for size in SIZES for p in PROVIDERS])
