"""A whole training step: mask, generate, sample, discriminate, backward, clip, AdamW.

`fused`, `packed` and `torch` are `Electra` over our ops, over them without padding, and over plain
PyTorch; `huggingface` is what users of transformers write. All start from the same weights.
"""

import functools

import pytest
import torch
from torch import nn

from benchmarks.cases import Case, parametrize
from benchmarks.gate import check_close
from benchmarks.huggingface import HuggingFace
from benchmarks.inputs import CUDA, STEPS, Make, batches
from electra_fast.model import Electra
from electra_fast.ops import FUSED, REFERENCE
from electra_fast.testing.baseline import TORCH


class Joint(Electra):
    """`Electra`, called as the others are here."""

    def __init__(self, config, ops, packed=None):
        super().__init__(config, ops)
        self.packed = packed

    def forward(self, ids, key_mask):
        if self.packed is not None:
            ids, cu_seqlens, max_seqlen = self.packed
            return super().forward(ids, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen).loss
        return super().forward(ids, key_mask=key_mask).loss

    def logits(self, ids, key_mask):
        return tuple(half(ids, key_mask=key_mask) for half in (self.generator, self.discriminator))


class StepCase(Case):
    providers = ("fused", "huggingface", "torch", "packed", "compile")
    seconds = 15.0
    rounds = (3, 20)
    compiling = 120.0 if CUDA else 180.0  # two towers of twelve layers, both directions

    def __init__(self, size: str, passes: str):
        self.size = STEPS[size]
        self.name = f"pretraining, {size}, {passes}"
        self.make = Make(self.size)
        self.batch = self.make.batch()

    def model(self, provider: str) -> nn.Module:
        config = self.size.config
        if provider == "huggingface":
            model = HuggingFace(config)
        else:
            packed = None
            if provider == "packed":
                batch = batches(self.make.B, self.make.L).packed(0)
                ids, bounds = batch.ids.to(self.make.device), batch.cu_seqlens.to(self.make.device)
                packed = ids, bounds, batch.max_seqlen
            ops = {"fused": FUSED, "packed": FUSED, "reference": REFERENCE}.get(provider, TORCH)
            model = Joint(config, ops, packed)
        torch.manual_seed(0)  # after the model's own draws; one state for all, under one set of names
        twin = Electra(config)
        for half in ("generator", "discriminator"):
            getattr(model, half).load_state_dict(getattr(twin, half).state_dict())
        return model.to(self.make.device)

    def prepare(self, provider: str):
        model = self.model(provider)
        forward = torch.compile(model, dynamic=False) if provider == "compile" else model
        self.check(model, forward)
        device, cuda = self.make.device, self.make.device == "cuda"
        parameters = list(model.parameters())  # each shared one once
        optimizer = torch.optim.AdamW(
            parameters, lr=1e-4, eps=1e-6, weight_decay=0.01, fused=True, capturable=cuda
        )

        def step():
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device, torch.bfloat16, enabled=cuda):
                loss = forward(self.batch.ids, self.batch.key_mask)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            return loss.detach()

        step.synchronizes = getattr(model, "synchronizes", False)
        return step

    @functools.cached_property
    def truth(self):
        """The reference: logits of two sequences in float64 and in float32, its loss and gradient."""
        model = self.model("reference")
        measured = self.loss_and_gradient(model, model)
        low = self.logits(model)
        return self.logits(model.double()), low, measured

    def logits(self, model):
        ids, key_mask = (x[:2] for x in (self.batch.ids, self.batch.key_mask))
        cast = self.make.dtype == torch.bfloat16 and next(model.parameters()).dtype == torch.float32
        model.eval()
        with torch.no_grad(), torch.autocast(self.make.device, torch.bfloat16, enabled=cast):
            logits = model.logits(ids, key_mask)
        model.train()
        return [x[key_mask] for x in logits]  # padding may hold anything

    def loss_and_gradient(self, model, forward) -> tuple[float, float]:
        torch.manual_seed(0)
        with torch.autocast(self.make.device, torch.bfloat16, enabled=self.make.device == "cuda"):
            loss = forward(self.batch.ids, self.batch.key_mask)
        loss.backward()
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        model.zero_grad(set_to_none=True)
        return loss.item(), norm.item()

    def check(self, model, forward) -> None:
        """Refuse a model whose halves give other logits, or whose step has another loss or gradient.

        Each masks and samples by itself, so that loss and gradient agree within chance only.
        """
        ref, low, measured = self.truth
        halves = ("generator", "discriminator")
        for half, *logits in zip(halves, self.logits(model), ref, low, strict=True):
            check_close(f"logits of the {half}", *logits)
        rules = (("loss", 0.02), ("gradient norm", 0.1))
        found = zip(rules, self.loss_and_gradient(model, forward), measured, strict=True)
        for (name, chance), got, wanted in found:
            off = abs(got / wanted - 1)
            assert off < chance, f"{name}: {got:.4g}, the reference has {wanted:.4g}"

    def info(self, provider):
        tokens = int(self.batch.key_mask.sum())
        facts = {"op": "pretraining", "size": self.size.name, "passes": "step", "served_by": None}
        return facts | {"unit": "tokens/s", "work": tokens}


runs = [(size, "step", provider) for size in STEPS for provider in StepCase.providers]
bench_pretraining = pytest.mark.value(100)(parametrize(functools.cache(StepCase), runs))
