"""Fine-tuning a classifier: a training step, an epoch and an evaluation on texts of real lengths.

`fused` is what `python -m electra_fast finetune` runs: batches without padding, `train/step.py`, and in an
evaluation the operator for inference. The others are transformers' Trainer (`harness/trainer.py`) with
ElectraForSequenceClassification. `trainer` pads each batch to its longest text; the texts in a batch of
`trainer_grouped` have similar lengths. `trainer_patched` is `trainer` after `electra_fast.hf.patch`, and
`trainer_packed` gives the patched model the texts end to end.

All have ELECTRA-small with dropout 0.1, the same weights, and the same texts. Their lengths are those of a
public data set (`harness/lengths.py`); ids and labels are random. On a GPU autocast to bfloat16 is on.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.harness import gate, lengths
from benchmarks.harness.cases import FORWARD, Case, Round, Run, parametrize
from benchmarks.harness.clock import on_a_stream
from benchmarks.harness.inputs import CUDA, REHEARSAL
from benchmarks.harness.machine import device
from benchmarks.harness.models import with_our_layers
from benchmarks.harness.providers import OURS
from electra_fast.capture import cuda_graph
from electra_fast.tasks.classify import Classify
from electra_fast.tasks.examples import Examples, TaskBatches
from electra_fast.tasks.task import EVALUATION_TOKENS, TaskModel, predict
from electra_fast.train import optimizer
from electra_fast.train.fine_tune_recipe import FineTuneRecipe
from electra_fast.train.loader import Loader
from electra_fast.train.metrics import MetricBuffer, TaskMetrics
from electra_fast.train.step import Step

STEP, EPOCH = "step", "epoch"  # passes, in addition to FORWARD
BATCH = 8 if REHEARSAL else 32
SMALLER = {"num_hidden_layers": 2} if REHEARSAL else {}  # the default has 12
VOCABULARY, WORDS, CLS, SEP = 30_522, 1000, 101, 102  # BERT's: its size, the first id of a word
# With length grouping Trainer sorts this many texts at a time: 50 batches, or a quarter of the data. If an
# epoch has this number of texts, the share of padding is that of the whole data; with fewer it is larger.
GROUP = {"banking77": 1600, "clinc150": 1600, "wnut17": 832}
EVALUATED = 4 * BATCH  # texts of a short evaluation


class Size(NamedTuple):
    data: str
    passes: str
    texts: int

    @property
    def short(self) -> bool:
        return self.texts in (BATCH, EVALUATED)

    @property
    def name(self) -> str:
        word = "evaluation" if self.passes == FORWARD else self.passes
        return f"{self.data}, {word} of {self.texts}"

    @property
    def providers(self) -> tuple[str, ...]:
        grouped = ("trainer_grouped",) if self.texts == GROUP.get(self.data) else ()
        return ("fused", "trainer", *grouped, "trainer_patched", "trainer_packed")


SIZES = [Size(data, *part) for data in GROUP for part in ((STEP, BATCH), (FORWARD, EVALUATED))]
SIZES += [Size(data, passes, texts) for data, texts in GROUP.items() for passes in (EPOCH, FORWARD)]
SIZES += [Size(f"squadshifts {longest}", STEP, BATCH) for longest in (384, 512)]
SIZES = SIZES[:2] if REHEARSAL else SIZES


class Texts:
    """Texts with the lengths of a data set, in random order, ids and labels at random."""

    def __init__(self, data: str, count: int):
        random, self.labels = np.random.default_rng(0), lengths.described(data)["labels"]
        self.lengths = random.permutation(lengths.sample(data, count))
        ends = self.lengths.cumsum()
        ids = random.integers(WORDS, VOCABULARY, ends[-1], dtype=np.int32)
        ids[ends - self.lengths], ids[ends - 1] = CLS, SEP
        targets = {"labels": random.integers(self.labels, size=count)}
        offsets = np.concatenate([[0], ends])
        self.examples = Examples(ids, offsets, self.lengths, item_targets=targets)
        self.longest_first = np.argsort(-self.lengths, kind="stable")


class FineTuneCase(Case):
    def __init__(self, size: Size):
        self.size, self.name = size, f"fine_tune, {size.name}, {size.passes}"
        self.providers = self.headline = size.providers
        self.seconds, self.rounds = (4.0, (3, 20)) if size.short else (0.0, (2, 2))
        self.preparing = 0.0 if CUDA or size.short else 60.0
        self.texts = Texts(size.data, size.texts)
        self.checked = Texts(size.data, BATCH)  # the texts that the gate compares
        self.errors: dict[str, gate.Errors] = {}

    def model(self, provider: str, **changes: Any) -> nn.Module:
        """Return a model with the weights that all providers have; `changes` are fields of its config."""
        import transformers  # imported late, because it takes seconds

        from benchmarks.harness.trainer import PackedClassifier
        from electra_fast import hf

        packed = provider == "trainer_packed"
        make = PackedClassifier if packed else transformers.ElectraForSequenceClassification
        torch.manual_seed(0)
        model = make(transformers.ElectraConfig(num_labels=self.texts.labels, **SMALLER | changes))
        if provider == "fused":
            model = ours(model)
        elif provider in OURS:
            hf.patch(model)
        return model.to(device()).train()

    def trainer(self, model: nn.Module, provider: str, texts: Texts):
        from benchmarks.harness.trainer import items, trainer

        grouped, of_all = provider == "trainer_grouped", items(texts.examples)
        found = [of_all[i] for i in texts.longest_first] if grouped else of_all
        return trainer(model, found, BATCH, "sequential" if grouped else "random")

    def predictions(self, model: nn.Module, provider: str, texts: Texts) -> Callable[[], np.ndarray]:
        """Return an evaluation: a function that returns the logits of all texts, in order."""
        if provider == "fused":
            evaluate = functools.partial(predict, model.head, texts.examples, EVALUATION_TOKENS[device()])
            return torch.autocast(device(), torch.bfloat16, enabled=CUDA)(evaluate)
        of = self.trainer(model, provider, texts)
        if provider != "trainer_grouped":
            return lambda: of.predict(of.train_dataset).predictions
        return lambda: of.predict(of.train_dataset).predictions[np.argsort(texts.longest_first)]

    def training(self, model: nn.Module, provider: str) -> Callable[[], None]:
        """Return a function that trains on all texts once."""
        if provider != "fused":
            from benchmarks.harness.trainer import epoch

            return epoch(self.trainer(model, provider, self.texts))
        where, steps = torch.device(device()), self.size.texts // BATCH
        batches = TaskBatches(self.texts.examples, BATCH, seed=0, pad_id=0, fixed=CUDA)
        stream = Loader(batches, batches.make, where).prefetch()
        metrics, capture = MetricBuffer(1, where, TaskMetrics), cuda_graph if CUDA else None
        dtype = torch.bfloat16 if CUDA else None
        take = Step(model, optimizer.adamw(model), clip=1.0, dtype=dtype, metrics=metrics, capture=capture)
        rngs = torch.tensor([[0, 0]])

        def run() -> None:
            for batch, _ in itertools.islice(stream, steps):
                take([batch], rngs, 1e-5, 0)

        return on_a_stream(run)

    def results(self, model: nn.Module, provider: str) -> dict[str, Tensor]:
        """Return what the gate compares: the logits, or in training the loss and the gradient."""
        if self.size.passes == FORWARD:
            return {"logits": torch.from_numpy(self.predictions(model, provider, self.checked)())}
        with torch.autocast(device(), torch.bfloat16, enabled=CUDA):
            if provider == "fused":
                batch = self.checked.examples.batch(np.arange(BATCH))
                batch = {n: x.to(device()) if isinstance(x, Tensor) else x for n, x in batch.items()}
                loss = model(**batch).loss
            else:
                of = self.trainer(model, provider, self.checked)
                loss = of.compute_loss(model, of._prepare_inputs(of.data_collator(of.train_dataset)))
        loss.backward()
        return {"loss": loss.detach(), "gradient": gradient(model)}

    @functools.cached_property
    def truth(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The results of the unpatched model without dropout in float64, and in the dtype that is timed."""
        model = self.model("trainer", **NO_DROPOUT)
        low = self.results(model, "trainer")
        return self.results(model.double(), "trainer"), low

    def check(self, model: nn.Module, provider: str) -> gate.Errors:
        """Return the errors of a model without dropout; raise AssertionError if it computes another."""
        got, (ref, low) = self.results(model, provider), self.truth
        return {name: gate.check_close(name, got[name], ref[name], low[name]) for name in ref}

    def prepare(self, provider: str) -> Callable[[], Any]:
        if provider not in self.errors:
            self.errors[provider] = self.check(self.model(provider, **NO_DROPOUT), provider)
        model = self.model(provider)
        forward = self.size.passes == FORWARD
        run = self.predictions(model, provider, self.texts) if forward else self.training(model, provider)
        run.eager = "eager calls, as a trainer makes them"  # `fused` captures its own graph
        return run

    def info(self, provider: str) -> dict[str, Any]:
        facts = {"op": "fine_tune", "size": self.size.name, "passes": self.size.passes, "served_by": None}
        return facts | {"unit": "texts/s", "work": self.size.texts, "errors": self.errors[provider]}


NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def ours(model: nn.Module) -> TaskModel:
    """Return the model of `finetune` with the weights of a classifier of transformers."""
    return TaskModel(with_our_layers(model), Classify(FineTuneRecipe(task="classify")))


def gradient(model: nn.Module) -> Tensor:
    """Return the gradients of all parameters as one vector, in the order of transformers' names."""
    parameters = list(model.parameters())
    weights = [p.data for p in parameters]
    for p in parameters:
        p.data, p.grad = p.grad, None
    state = (model.head if isinstance(model, TaskModel) else model).state_dict()
    found = torch.cat([state[name].flatten() for name in sorted(state)])
    for p, weight in zip(parameters, weights, strict=True):
        p.data = weight
    return found


@functools.cache
def case(size: str, passes: str) -> FineTuneCase:
    return FineTuneCase(next(s for s in SIZES if (s.name, s.passes) == (size, passes)))


def runs() -> list[Run]:
    """Return all cases. Only the short ones of the first data set fit into the usual budget."""
    early, late = (97, None), (0, Round.DEFINITIONS)
    return [
        Run(s.name, s.passes, p, *(early if s.short and s.data == SIZES[0].data else late))
        for s in SIZES
        for p in s.providers
    ]


bench_fine_tune = parametrize(case, runs())
