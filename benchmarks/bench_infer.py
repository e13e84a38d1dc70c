"""The latency of a classifier: one call of ElectraForSequenceClassification, random weights, no gradient.

`huggingface` is the model of transformers, whose attention is SDPA, and `fused` is the same model after
`electra_fast.hf.patch`. `fused_int8` is patched with `int8=True`. `packed` is
`electra_fast.heads.SequenceClassifier` with the same weights, which gets the texts end to end. The inference
engines run the model that transformers exports. On a CPU one thread runs each of them, as in a server with a
process per core. On a GPU the model is in bfloat16. `fused_graph` (`hf.patch(model, graphs=True)`),
`packed_graph` and torch.compile's reduce-overhead replay CUDA graphs; the others launch their kernels.

`bench_infer_texts.py` has the rate on texts of real lengths.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from benchmarks import rivals
from benchmarks.harness import gate
from benchmarks.harness.cases import FORWARD, Case, Round, Run, parametrize
from benchmarks.harness.compiled import compiled
from benchmarks.harness.inputs import CUDA, REHEARSAL
from benchmarks.harness.machine import device
from benchmarks.harness.models import build, patch_has_int8, with_our_layers
from benchmarks.harness.providers import COMPILED
from benchmarks.rivals.models import ENGINES, Logits
from electra_fast.capture import capturable_stream, cuda_graph
from electra_fast.heads import SequenceClassifier

GRAPHS = ("fused_graph", "packed_graph")
PROVIDERS = ("fused", "fused_int8", "packed", *GRAPHS, "huggingface", "huggingface_compile")
PROVIDERS += ("huggingface_reduce", *ENGINES)
TOGETHER = ("fused", "fused_int8", "packed", *(GRAPHS if CUDA else ()), "huggingface")
THREADS = None if CUDA else 1
SHAPES = [(B, L) for B in (1, 32) for L in (16, 64, 128, 512)]  # sequences and their length
SHAPES = [(1, 16), (2, 8)] if REHEARSAL else SHAPES
# On a CPU these do not fit into the usual budget.
LONG = () if CUDA or REHEARSAL else ((1, 512), (32, 64), (32, 128), (32, 512))
SIZES = {f"{B}x{L}{'' if CUDA else ', one thread'}": (B, L) for B, L in SHAPES}
SMALLER = {"num_hidden_layers": 2} if REHEARSAL else {}  # the default has 12
IDS = (1000, 30_522)  # of words in BERT's vocabulary, which the default config has
CHECKED = 16  # sequences that the gate compares: two logits of one sequence may be right by chance
WARM_UP = 3  # calls before a graph is captured; the patch captures a shape at its third call
INT8 = ("fused_int8", "ort_int8")


class InferCase(Case):
    providers = PROVIDERS
    against: ClassVar[dict[str, str]] = {"ort_int8": "fused_int8"}
    threads = THREADS
    seconds = 2.0
    rounds = (20, 60)  # a 95th percentile needs 20
    compiling = 60.0

    def __init__(self, size: str):
        self.size, self.name = size, f"infer, {size}, {FORWARD}"
        self.B, self.L = SIZES[size]
        long = SIZES[size] in LONG
        self.headline = (*TOGETHER, *ENGINES) if long else TOGETHER  # together, so that fused is timed once
        self.preparing = 30.0 if long else 0.0
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
        logits = of_module(compiled(model, provider) if provider in COMPILED else model)
        for _ in range(WARM_UP if provider in GRAPHS else 0):
            logits(*self.batches[0])
        return graph(logits, self.batches[0]) if provider == "packed_graph" else logits

    def run(self, logits: Logits, most: int | None = None) -> Tensor:
        """Return the logits of CHECKED sequences, of batches cut to `most` sequences."""
        return torch.cat([logits(ids[:most], mask[:most]) for ids, mask in self.batches])[:CHECKED]

    @functools.cached_property
    def truth(self) -> tuple[Tensor, Tensor]:
        """The logits of the unpatched model in float64 and in the dtype that is timed."""
        model = classifier("huggingface")
        low = self.run(of_module(model), CHECKED)
        return self.run(of_module(model.double()), CHECKED), low

    def check(self, logits: Logits, int8: bool = False) -> gate.Errors:
        """Return the errors of the logits; raise AssertionError if they are those of another model."""
        rule = gate.INT8 if int8 else gate.ANY_ORDER
        return {"logits": gate.check_close("logits", self.run(logits), *self.truth, roundings=rule)}

    def require(self, provider: str) -> None:
        super().require(provider)
        if provider in ENGINES:
            rivals.require(ENGINES[provider])
        if provider in GRAPHS:
            rivals.gpu()
        if provider == "fused_int8":
            rivals.cpu()
            patch_has_int8()

    def prepare(self, provider: str) -> Callable[[], Tensor]:
        logits = self.logits(provider)
        if provider not in self.errors:
            self.errors[provider] = self.check(logits, provider in INT8)
        call = functools.partial(logits, *self.batches[0])
        call.eager = "calls as a server makes them"
        return call

    def info(self, provider: str) -> dict[str, Any]:
        facts = {"op": "infer", "size": self.size, "passes": FORWARD, "served_by": None}
        facts |= {"unit": "tokens/s", "work": self.B * self.L}
        return facts | {"errors": self.errors[provider]}


def classifier(provider: str) -> torch.nn.Module:
    import transformers  # imported late, because it takes seconds

    config = transformers.ElectraConfig(**SMALLER)
    model = build("ElectraForSequenceClassification", config, provider, device(), training=False)
    model = model.bfloat16() if CUDA else model
    return with_our_layers(model) if provider.startswith("packed") else model


@functools.cache
def engine(name: str) -> Logits:
    """Return an inference engine with the model, for all sizes; to convert the model takes seconds."""
    return ENGINES[name](classifier("huggingface"))


def of_module(model: torch.nn.Module) -> Logits:
    """Return a model as a function. Sequences are packed for our model; they have no padding here."""

    def logits(ids: Tensor, mask: Tensor) -> Tensor:
        with torch.no_grad():
            if isinstance(model, SequenceClassifier):
                B, L = ids.shape
                bounds = torch.arange(0, B * L + 1, L, dtype=torch.int32, device=ids.device)
                return model(ids.flatten(), cu_seqlens=bounds, max_seqlen=L)
            return model(input_ids=ids, attention_mask=mask).logits

    return logits


def graph(logits: Logits, batch: tuple[Tensor, Tensor]) -> Logits:
    """Return the function as a CUDA graph for batches of this shape, which are copied to fixed addresses."""
    fixed, result = [x.clone() for x in batch], []

    def body() -> None:
        result[:] = [logits(*fixed)]

    with capturable_stream(torch.device(device())):
        replay = cuda_graph(body)

    def replayed(ids: Tensor, mask: Tensor) -> Tensor:
        fixed[0].copy_(ids)
        fixed[1].copy_(mask)
        replay()
        return result[0].clone()

    return replayed


@functools.cache
def case(size: str, passes: str) -> InferCase:
    return InferCase(size)


def plan(size: str, provider: str) -> tuple[int, Round | None]:
    """Return the value of a number to a reader and its round, None for the usual one.

    A compilation needs as much time as everything else, so it is last.
    """
    if SIZES[size] in LONG:
        return 0, Round.DEFINITIONS
    return 5 if provider in COMPILED else 96, None


runs = [Run(size, FORWARD, p, *plan(size, p)) for size in SIZES for p in PROVIDERS]
bench_infer = parametrize(case, runs)
