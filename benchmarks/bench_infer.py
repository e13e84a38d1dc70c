"""Inference by a classifier of transformers: ElectraForSequenceClassification, random weights, no gradient.

`huggingface` is the model of transformers, whose attention is SDPA, and `fused` is the same model after
`electra_fast.hf.patch`. `fused_int8` is patched with `int8=True`. The inference engines run the model that
transformers exports. On a CPU one thread runs each of them, as in a server with a process per core. On a GPU
the model is in bfloat16, and each call launches its kernels.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from benchmarks import rivals
from benchmarks.harness import gate
from benchmarks.harness.cases import FORWARD, Case, Run, parametrize
from benchmarks.harness.compiled import compiled
from benchmarks.harness.inputs import CUDA, REHEARSAL
from benchmarks.harness.machine import device
from benchmarks.harness.models import build, patch_has_int8
from benchmarks.harness.providers import COMPILED
from benchmarks.rivals.models import ENGINES, Logits

PROVIDERS = ("fused", "fused_int8", "huggingface", "huggingface_compile", *ENGINES)
THREADS = None if CUDA else 1
SHAPES = ((1, 16), (2, 8)) if REHEARSAL else ((1, 16), (1, 64), (1, 128), (32, 32))
SIZES = {f"{B}x{L}{'' if CUDA else ', one thread'}": (B, L) for B, L in SHAPES}
SMALLER = {"num_hidden_layers": 2} if REHEARSAL else {}  # the default has 12
IDS = (1000, 30_522)  # of words in BERT's vocabulary, which the default config has
CHECKED = 16  # sequences that the gate compares: two logits of one sequence may be right by chance
INT8 = ("fused_int8", "ort_int8")


class InferCase(Case):
    providers = PROVIDERS
    headline = ("fused", "fused_int8", "huggingface")
    against: ClassVar[dict[str, str]] = {"ort_int8": "fused_int8"}
    threads = THREADS
    seconds = 2.0
    compiling = 60.0

    def __init__(self, size: str):
        self.size, self.name = size, f"infer, {size}, {FORWARD}"
        self.B, self.L = SIZES[size]
        self.errors: dict[str, gate.Errors] = {}

    @functools.cached_property
    def batches(self) -> list[tuple[Tensor, Tensor]]:
        """Ids and masks of the batches that the gate compares; the first one is timed."""
        generator = torch.Generator().manual_seed(0)
        shape, count = (self.B, self.L), math.ceil(CHECKED / self.B)
        ids = [torch.randint(*IDS, shape, generator=generator).to(device()) for _ in range(count)]
        return [(x, torch.ones_like(x)) for x in ids]

    def logits(self, provider: str) -> Logits:
        """Return the provider as a function of ids and mask."""
        if provider in ENGINES:
            return engine(provider)
        model = classifier(provider)
        return of_module(compiled(model, provider) if provider in COMPILED else model)

    def run(self, logits: Logits) -> Tensor:
        return torch.cat([logits(*batch) for batch in self.batches])

    @functools.cached_property
    def truth(self) -> tuple[Tensor, Tensor]:
        """The logits of the unpatched model in float64 and in the dtype that is timed."""
        model = classifier("huggingface")
        low = self.run(of_module(model))
        return self.run(of_module(model.double())), low

    def check(self, logits: Logits, int8: bool = False) -> gate.Errors:
        """Return the errors of the logits; raise AssertionError if they are those of another model."""
        rule = gate.INT8 if int8 else gate.ANY_ORDER
        return {"logits": gate.check_close("logits", self.run(logits), *self.truth, roundings=rule)}

    def require(self, provider: str) -> None:
        super().require(provider)
        if provider in ENGINES:
            rivals.require(ENGINES[provider])
        if provider == "fused_int8":
            rivals.cpu()
            patch_has_int8()

    def prepare(self, provider: str) -> Callable[[], Tensor]:
        logits = self.logits(provider)
        if provider not in self.errors:
            self.errors[provider] = self.check(logits, provider in INT8)
        call = functools.partial(logits, *self.batches[0])
        call.eager = "eager calls, as a server makes them"
        return call

    def info(self, provider: str) -> dict[str, Any]:
        facts = {"op": "infer", "size": self.size, "passes": FORWARD, "served_by": None}
        facts |= {"unit": "tokens/s", "work": self.B * self.L}
        return facts | {"errors": self.errors[provider]}


def classifier(provider: str) -> torch.nn.Module:
    import transformers  # imported late, because it takes seconds

    config = transformers.ElectraConfig(**SMALLER)
    model = build("ElectraForSequenceClassification", config, provider, device(), training=False)
    return model.bfloat16() if CUDA else model


@functools.cache
def engine(name: str) -> Logits:
    """Return an inference engine with the model, for all sizes; to convert the model takes seconds."""
    return ENGINES[name](classifier("huggingface"))


def of_module(model: torch.nn.Module) -> Logits:
    def logits(ids: Tensor, mask: Tensor) -> Tensor:
        with torch.no_grad():
            return model(input_ids=ids, attention_mask=mask).logits

    return logits


@functools.cache
def case(size: str, passes: str) -> InferCase:
    return InferCase(size)


# A compilation needs as much time as everything else here, so it is the last one.
values = {p: 5 if p in COMPILED else 96 for p in PROVIDERS}
bench_infer = parametrize(case, [Run(size, FORWARD, p, values[p]) for size in SIZES for p in PROVIDERS])
