"""A whole training step: mask, generate, sample, discriminate, backward, clip, AdamW.

`fused`, `eager` and `packed` are `electra_fast.step`, what pre-training runs: as one CUDA graph on a GPU, and
launched kernel by kernel; `packed` without padding. `torch` is the same model over plain PyTorch, in the loop
that everybody writes; `huggingface` what users of transformers write. All start from the same weights.
"""

import collections
import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import roofline
from benchmarks.cases import Case, Round, Run, parametrize
from benchmarks.gate import Errors, check_close
from benchmarks.huggingface import HuggingFace
from benchmarks.inputs import CUDA, REHEARSAL, STEPS, Make, batches
from benchmarks.machine import bound
from benchmarks.providers import COMPILED
from electra_fast import optimizer
from electra_fast.ledger import Ledger
from electra_fast.model import Electra
from electra_fast.ops import FUSED, REFERENCE
from electra_fast.recipe import PAPER
from electra_fast.step import WARM_UP, Step, cuda_graph
from electra_fast.testing.baseline import TORCH

OURS = ("fused", "eager", "packed")  # `eager` differs from `fused` on CUDA alone
PROVIDERS = ("fused", *(["eager"] if CUDA else []), "huggingface", "torch", "packed", "compile")
PROVIDERS += ("compile_max", "huggingface_compile") if CUDA else ()
# On a GPU a provider takes seconds, so that all take turns; on a CPU half a minute.
HEADLINE = tuple(p for p in PROVIDERS if p not in COMPILED) if CUDA else ("fused", "torch")
DTYPE = torch.bfloat16 if CUDA else None


class StepCase(Case):
    providers = PROVIDERS
    headline = HEADLINE
    seconds = 20.0
    rounds = (3, 20)
    compiling = 120.0 if CUDA else 180.0  # two towers of twelve layers, both directions

    def __init__(self, size: str):
        self.size, self.accumulate = STEPS[size]
        self.name = f"step, {size}, step"
        self.make = Make(self.size)
        self.batch = self.make.batch()
        self.errors: dict[str, Errors] = {}  # of each provider's logits

    def model(self, provider: str) -> nn.Module:
        config = self.size.config
        if provider.startswith("huggingface"):
            model = HuggingFace(config)
        else:
            ops = FUSED if provider in OURS else REFERENCE if provider == "reference" else TORCH
            model = Electra(config, ops)
        torch.manual_seed(0)  # after the model's own draws; one state for all, under one set of names
        twin = Electra(config)
        for half in ("generator", "discriminator"):
            getattr(model, half).load_state_dict(getattr(twin, half).state_dict())
        return model.to(self.make.device)

    def inputs(self, provider: str) -> dict[str, Any]:
        if provider != "packed":
            return {"ids": self.batch.ids, "key_mask": self.batch.key_mask}
        batch = batches(self.make.B, self.make.L).packed(0)
        bounds = {"cu_seqlens": batch.cu_seqlens.to(self.make.device), "max_seqlen": batch.max_seqlen}
        return {"ids": batch.ids.to(self.make.device)} | bounds

    def prepare(self, provider: str):
        model = self.model(provider)
        forward = model
        if provider in COMPILED:
            mode = "max-autotune" if provider == "compile_max" else None
            forward = torch.compile(model, dynamic=False, mode=mode)
        inputs = self.inputs(provider)
        if provider not in self.errors:
            self.errors[provider] = self.check(model, forward, inputs)
        step = (self.ours if provider in OURS else self.loop)(provider, model, forward, inputs)
        step.eager = "steps as a trainer takes them"  # with a graph of their own, where they have one
        return step

    def ours(self, provider: str, model, forward, inputs):
        ledger = Ledger(1, torch.device(self.make.device))
        capture = cuda_graph if CUDA and provider != "eager" else None
        optim = optimizer.adamw(model)
        take = Step(model, optim, clip=1.0, dtype=DTYPE, ledger=ledger, capture=capture)
        rngs = torch.tensor([[0, micro] for micro in range(self.accumulate)])
        side = torch.cuda.Stream() if CUDA else None  # the default stream cannot be captured

        def step():
            if CUDA:
                side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                take([inputs] * self.accumulate, rngs, 1e-4, 0)
            if CUDA:
                torch.cuda.current_stream().wait_stream(side)

        for _ in range(WARM_UP + 1 if capture else 0):
            step()
        assert take.why_eager is None, take.why_eager
        return step

    def loop(self, provider: str, model, forward, inputs):
        parameters = list(model.parameters())  # each shared one once
        optim = torch.optim.AdamW(parameters, lr=1e-4, eps=1e-6, weight_decay=0.01, fused=True)

        def step():
            optim.zero_grad(set_to_none=True)
            for _ in range(self.accumulate):
                with torch.autocast(self.make.device, DTYPE, enabled=CUDA):
                    loss = _loss(forward(**inputs))
                (loss / self.accumulate).backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optim.step()

        return step

    @functools.cached_property
    def truth(self):
        """The reference: logits of two sequences in float64 and in float32, its loss and gradient.

        Loss and gradient of base 32x512 need 31 GB beside the model, those of large 16x512 38 GB: from a
        CPU, 0.95 and 2.3 GB per sequence. That fits a GPU of 80 GB, so the batch is not cut.
        """
        model = self.model("reference")
        measured = self.loss_and_gradient(model, model, self.inputs("reference"))
        low = self.logits(model)
        return self.logits(model.double()), low, measured

    def logits(self, model):
        ids, key_mask = (x[:2] for x in (self.batch.ids, self.batch.key_mask))
        cast = self.make.dtype == torch.bfloat16 and next(model.parameters()).dtype == torch.float32
        model.eval()
        with torch.no_grad(), torch.autocast(self.make.device, torch.bfloat16, enabled=cast):
            if isinstance(model, HuggingFace):
                logits = model.logits(ids, key_mask)
            else:
                logits = tuple(
                    half(ids, key_mask=key_mask) for half in (model.generator, model.discriminator)
                )
        model.train()
        return [x[key_mask] for x in logits]  # padding may hold anything

    def loss_and_gradient(self, model, forward, inputs) -> tuple[float, float]:
        torch.manual_seed(0)
        with torch.autocast(self.make.device, DTYPE, enabled=CUDA):
            loss = _loss(forward(**inputs))
        loss.backward()
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        model.zero_grad(set_to_none=True)
        return loss.item(), norm.item()

    def check(self, model, forward, inputs) -> Errors:
        """Refuse a model whose halves give other logits, or whose step has another loss or gradient.

        Each masks and samples by itself, so that loss and gradient agree within chance only.
        """
        ref, low, measured = self.truth
        names = [f"logits of the {half}" for half in ("generator", "discriminator")]
        logits = zip(names, self.logits(model), ref, low, strict=True)
        errors = {name: check_close(name, *close) for name, *close in logits}
        rules = (("loss", 0.02), ("gradient norm", 0.1))
        found = zip(rules, self.loss_and_gradient(model, forward, inputs), measured, strict=True)
        for (name, chance), got, wanted in found:
            off = abs(got / wanted - 1)
            chance *= 10 if REHEARSAL else 1  # a batch of two sequences
            assert off < chance, f"{name}: {got:.4g}, the reference has {wanted:.4g}"
        return errors

    def info(self, provider):
        config, B, L = self.size.config, self.make.B, self.make.L
        tokens = self.accumulate * int(self.batch.key_mask.sum())
        paper = PAPER[self.size.preset.__name__]
        return {
            "op": "step",
            "size": self.name.split(", ", 1)[1].removesuffix(", step"),
            "passes": "step",
            "served_by": None,
            "unit": "tokens/s",
            "work": tokens,
            "flops": self.accumulate * roofline.model_flops(config, B, L),
            # Of the paper's steps this many of ours have as many tokens.
            "paper_steps": paper["steps"] * paper["batch_tokens"] / (self.accumulate * B * L),
            "errors": self.errors[provider],
        }

    def counts(self, provider: str, function) -> dict[str, Any]:
        """Return what one call dispatches and, on CUDA, launches; of ours also where its time goes."""
        if provider in COMPILED:
            return {}
        found: dict[str, Any] = {}
        if not (CUDA and provider in ("fused", "packed")):  # a replay dispatches nothing
            with Dispatched() as mode:
                function()
            found["operators"] = mode.by_name.total()
        if CUDA:
            found["launches"] = launches(function)
        if provider == ("eager" if CUDA else "fused"):
            parts = self.components(function)
            if any(part["seconds"] for part in parts.values()):  # a profiler may be denied the device's times
                found["components"] = parts
        return found

    def components(self, function) -> dict[str, dict[str, float | None]]:
        """Return the seconds of each part of a step, on the device, and what `roofline` says of it."""
        with torch.profiler.profile() as profile:
            function()
        total = "device_time_total" if CUDA else "cpu_time_total"
        own = "self_device_time_total" if CUDA else "self_cpu_time_total"
        events = profile.key_averages()
        seconds = collections.Counter(
            {name: 0.0 for name in roofline.step(self.size.config, self.make.B, self.make.L, 0)}
        )
        for event in events:
            name = event.key.removeprefix("electra_fast::").removesuffix("_fwd").removesuffix("_bwd")
            name = PARTS.get(name, name)
            if event.key.startswith("electra_fast::") or name == "optimizer":
                seconds[name] += getattr(event, total) * 1e-6
        seconds["other"] = sum(getattr(event, own) for event in events) * 1e-6 - seconds.total()
        numbers = sum(p.numel() for p in self.model("fused").parameters())
        work = roofline.step(self.size.config, self.make.B, self.make.L, numbers)
        times = {name: 1 if name == "optimizer" else self.accumulate for name in work}
        bounds = {name: bound(*w) for name, w in work.items()}
        return {
            name: {"seconds": s, "bound": bounds[name] * times[name] if bounds.get(name) else None}
            for name, s in seconds.items()
        }


# Operators that `roofline` counts under another name.
PARTS = {"attention_qkv": "attention", "rtd_loss": "masking, loss"}
PARTS |= {name: "masking, loss" for name in ("mask_tokens", "replace_tokens")}
PARTS |= {f"aten::{name}": "optimizer" for name in ("_fused_adamw_", "_foreach_norm", "_foreach_copy_")}


class Dispatched(TorchDispatchMode):
    """Counts the operators that PyTorch dispatches, by name."""

    def __init__(self):
        super().__init__()
        self.by_name = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.by_name[str(function)] += 1
        return function(*args, **(kwargs or {}))


def launches(function) -> int:
    """Return how many kernels, copies and fills run on the device in one call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


def _loss(out) -> Tensor:
    return out if isinstance(out, Tensor) else out.loss


@functools.cache
def case(size: str, passes: str) -> StepCase:
    return StepCase(size)


first = next(iter(STEPS))
runs = [
    Run(size, "step", p, 100 if size == first else 5, Round.STEP if size == first and p in HEADLINE else None)
    for size in STEPS
    for p in PROVIDERS
]
bench_step = parametrize(case, runs)
