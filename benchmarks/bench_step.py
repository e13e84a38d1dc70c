"""A whole training step: mask, generate, sample, discriminate, backward, clip, AdamW.

`fused` is `electra_fast.train.step`, which pre-training runs: on a GPU one CUDA graph. `eager` launches its
kernels one by one, and `packed` runs it without padding. `torch` is the same model in plain PyTorch, in the
usual training loop, and `huggingface` is what a user of transformers writes. All start from the same weights.
"""

import collections
import functools
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import roofline
from benchmarks.harness.cases import Case, Round, Run, parametrize
from benchmarks.harness.clock import on_a_stream
from benchmarks.harness.compiled import compiled
from benchmarks.harness.dispatched import Dispatched
from benchmarks.harness.gate import Errors, check_close
from benchmarks.harness.huggingface import HuggingFace
from benchmarks.harness.inputs import CUDA, REHEARSAL, STEPS, Make, batches
from benchmarks.harness.machine import bound
from benchmarks.harness.providers import COMPILED, OURS
from electra_fast.capture import cuda_graph
from electra_fast.config import ElectraConfig
from electra_fast.model import Electra
from electra_fast.ops import FUSED, REFERENCE, TORCH
from electra_fast.train import optimizer
from electra_fast.train.metrics import MetricBuffer
from electra_fast.train.recipe import PAPER
from electra_fast.train.step import WARM_UP, Step

PROVIDERS = ("fused", *(["eager"] if CUDA else []), "huggingface", "torch", "packed", "compile")
PROVIDERS += ("compile_max", "compile_rand4x", *(["huggingface_compile"] if CUDA else []))
# All providers are timed together on a GPU, where each needs seconds; on a CPU each needs half a minute.
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
        self.errors: dict[str, Errors] = {}  # errors of the logits, by provider

    @property
    def config(self) -> ElectraConfig:
        return self.size.config

    def model(self, provider: str) -> nn.Module:
        config = self.config
        if provider.startswith("huggingface"):
            model = HuggingFace(config)
        else:
            ops = FUSED if provider in OURS else REFERENCE if provider == "reference" else TORCH
            model = Electra(config, ops)
        torch.manual_seed(0)  # after the model's own draws, so that all providers get the same weights
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
            forward = compiled(model, provider)
        inputs = self.inputs(provider)
        if provider not in self.errors:
            self.errors[provider] = self.check(model, forward, inputs)
        step = (self.ours if provider in OURS else self.loop)(provider, model, forward, inputs)
        step.eager = "eager steps, as a trainer runs them"  # `fused` captures its own graph
        return step

    def ours(self, provider: str, model, forward, inputs):
        metrics = MetricBuffer(1, torch.device(self.make.device))
        capture = cuda_graph if CUDA and provider != "eager" else None
        optim = optimizer.adamw(model)
        take = Step(model, optim, clip=1.0, dtype=DTYPE, metrics=metrics, capture=capture)
        rngs = torch.tensor([[0, micro] for micro in range(self.accumulate)])
        step = on_a_stream(lambda: take([inputs] * self.accumulate, rngs, 1e-4, 0))
        for _ in range(WARM_UP + 1 if capture else 0):
            step()
        assert take.why_eager is None, take.why_eager
        return step

    def loop(self, provider: str, model, forward, inputs):
        parameters = list(model.parameters())  # shared parameters appear once
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
        """The reference: logits of two sequences in float64 and in float32; loss and gradient norm.

        In addition to the model, loss and gradient of base 32x512 need 31 GB and those of large 16x512 need
        38 GB (measured on a CPU: 0.95 and 2.3 GB per sequence). This fits into 80 GB, so the whole batch is
        computed at once.
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
        return [x[key_mask] for x in logits]  # logits of padding are undefined

    def loss_and_gradient(self, model, forward, inputs) -> tuple[float, float]:
        torch.manual_seed(0)
        with torch.autocast(self.make.device, DTYPE, enabled=CUDA):
            loss = _loss(forward(**inputs))
        loss.backward()
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        model.zero_grad(set_to_none=True)
        return loss.item(), norm.item()

    def check(self, model, forward, inputs) -> Errors:
        """Refuse a model with different logits, or a step with a different loss or gradient norm.

        Providers draw their own masks and samples, so loss and gradient norm agree only within chance.
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
        config, B, L = self.config, self.make.B, self.make.L
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
            # This many steps have as many tokens as the paper's schedule.
            "paper_steps": paper["steps"] * paper["batch_tokens"] / (self.accumulate * B * L),
            "errors": self.errors[provider],
        }

    def counts(self, provider: str, function) -> dict[str, Any]:
        """Count a call's operators and, on CUDA, its launches; for ours also time each component."""
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
            if any(part["seconds"] for part in parts.values()):  # the profiler may lack access
                found["components"] = parts
        return found

    def components(self, function) -> dict[str, dict[str, float | None]]:
        """Return the seconds of each component of a step, and its bound by `roofline`."""
        with torch.profiler.profile() as profile:
            function()
        total = "device_time_total" if CUDA else "cpu_time_total"
        own = "self_device_time_total" if CUDA else "self_cpu_time_total"
        events = profile.key_averages()
        seconds = collections.Counter(
            {name: 0.0 for name in roofline.step(self.config, self.make.B, self.make.L, 0)}
        )
        for event in events:
            name = event.key.removeprefix("electra_fast::").removesuffix("_fwd").removesuffix("_bwd")
            name = PARTS.get(name, name)
            if event.key.startswith("electra_fast::") or name == "optimizer":
                seconds[name] += getattr(event, total) * 1e-6
        seconds["other"] = sum(getattr(event, own) for event in events) * 1e-6 - seconds.total()
        numbers = sum(p.numel() for p in self.model("fused").parameters())
        work = roofline.step(self.config, self.make.B, self.make.L, numbers)
        times = {name: 1 if name == "optimizer" else self.accumulate for name in work}
        bounds = {name: bound(*w) for name, w in work.items()}
        return {
            name: {"seconds": s, "bound": bounds[name] * times[name] if bounds.get(name) else None}
            for name, s in seconds.items()
        }


# The component of `roofline` that an operator belongs to, if the names differ.
PARTS = {"attention_qkv": "attention", "rtd_loss": "masking, loss"}
PARTS |= {name: "masking, loss" for name in ("mask_tokens", "replace_tokens", "nce_loss")}
PARTS |= {f"aten::{name}": "optimizer" for name in ("_fused_adamw_", "_foreach_norm", "_foreach_copy_")}


def launches(function) -> int:
    """Return the number of kernels, copies and fills that one call runs on the device."""
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
