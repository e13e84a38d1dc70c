"""Inference by a classifier of transformers: ElectraForSequenceClassification, random weights, no gradient.

`huggingface` is the model of transformers, whose attention is SDPA, and `fused` is the same model after
`electra_fast.hf.patch`. `fused_int8` is patched with `int8=True`. The inference engines run the model that
transformers exports. On a CPU one thread runs each of them, as in a server with a process per core. On a GPU
the model is in bfloat16, and each call launches its kernels.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

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
SMALLER = {"num_hidden_layers": 2, "vocab_size": 500} if REHEARSAL else {}  # the default has 12 and 30,522
CHECKED = 16  # sequences that the gate compares: two logits of one sequence may be right by chance
INT8 = ("fused_int8", "ort_int8")


class InferCase(Case):
    providers = PROVIDERS
    headline = ("fused", "fused_int8", "huggingface")
    against = {"ort_int8": "fused_int8"}  # noqa: RUF012
    threads = THREADS
    seconds = 2.0
    compiling = 60.0

    def __init__(self, size: str):
        self.size, self.name = size, f"infer, {size}, {FORWARD}"
        (self.B, self.L), self.device = SIZES[size], device()
        self.errors: dict[str, gate.Errors] = {}

    @functools.cached_property
    def batches(self) -> list[tuple[Tensor, Tensor]]:
        """Ids and masks of the batches that the gate compares; the first one is timed."""
        generator = torch.Generator().manual_seed(0)
        low, high, shape = 105, self.config.vocab_size, (self.B, self.L)  # below 105 are BERT's special ids
        ids = [torch.randint(low, high, shape, generator=generator) for _ in range(-(-CHECKED // self.B))]
        return [(x.to(self.device), torch.ones_like(x, device=self.device)) for x in ids]

    @functools.cached_property
    def config(self):
        import transformers  # imported late, because it takes seconds

        return transformers.ElectraConfig(**SMALLER)

    def model(self, provider: str):
        model = build("ElectraForSequenceClassification", self.config, provider, self.device).eval()
        return model.bfloat16() if CUDA else model

    def logits(self, provider: str) -> Logits:
        """Return the provider as a function of ids and mask."""
        if provider in ENGINES:
            return ENGINES[provider](self.model("huggingface"))
        model = self.model(provider)
        return of_module(compiled(model, provider) if provider in COMPILED else model)

    def run(self, logits: Logits) -> Tensor:
        return torch.cat([logits(*batch) for batch in self.batches])

    @functools.cached_property
    def truth(self) -> tuple[Tensor, Tensor]:
        """The logits of the unpatched model in float64 and in the dtype that is timed."""
        model = self.model("huggingface")
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
        facts |= {"unit": "tokens/s", "work": math.prod(SIZES[self.size])}
        return facts | {"errors": self.errors[provider]}


def of_module(model: torch.nn.Module) -> Logits:
    def logits(ids: Tensor, mask: Tensor) -> Tensor:
        with torch.no_grad():
            return model(input_ids=ids, attention_mask=mask).logits

    return logits


@functools.cache
def case(size: str, passes: str) -> InferCase:
    return InferCase(size)


bench_infer = parametrize(case, [Run(size, FORWARD, p, 96) for size in SIZES for p in PROVIDERS])
