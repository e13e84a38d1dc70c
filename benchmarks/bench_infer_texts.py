"""A classifier on texts of real lengths: strings in, labels with their scores out, no gradient.

`fused` is `electra_fast.use.Classifier` of a folder, which computes the texts in packed batches, and
`fused_int8` the same with `int8=True`. `pipeline` is `transformers.pipeline` with batches of 32 texts in the
given order, padded to the longest text. `pipeline_sorted` gets the texts sorted by length, and the model of
`pipeline_patched` is patched. The inference engines get padded batches of 32 texts that are sorted by length,
which is their best case. The tokenizer's time is included, and the results are in the order of the texts.

All have the same weights, those of ELECTRA-small with a random head. The lengths are those of a public data
set (`harness/texts.py`). On a CPU one thread computes, on a GPU in bfloat16.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from benchmarks import rivals
from benchmarks.harness import gate
from benchmarks.harness import texts as synthetic
from benchmarks.harness.cases import FORWARD, Case, Round, Run, parametrize
from benchmarks.harness.inputs import CUDA, REHEARSAL
from benchmarks.harness.machine import device
from benchmarks.rivals.models import ENGINES

BATCH = 32
DTYPE = torch.bfloat16 if CUDA else torch.float32
CHECKED = BATCH + 8  # texts that the gate compares: two batches
LONGEST = 512
FIRST = ("fused", "pipeline")  # these two fit into the usual budget, for the first size
PROVIDERS = ("fused", "fused_int8", "pipeline", "pipeline_sorted", "pipeline_patched", *ENGINES)
INT8 = ("fused_int8", "ort_int8")


class Size(NamedTuple):
    data: str
    texts: int

    @property
    def name(self) -> str:
        return f"{self.data}, {self.texts} texts{'' if CUDA else ', one thread'}"


# In sorted batches 14 and 9 % of the tokens are padding; with more texts it would be less.
SIZES = [Size("banking77", 512), Size("squadshifts 384", 256)]
SIZES = [Size("banking77", CHECKED)] if REHEARSAL else SIZES


class Classify(NamedTuple):
    """A provider: `call` is timed, and `scores` returns the probabilities of all labels for the gate."""

    call: Callable[[list[str]], list]
    scores: Callable[[list[str]], Tensor]  # [texts, labels]


class TextsCase(Case):
    providers = PROVIDERS
    against: ClassVar[dict[str, str]] = {"ort_int8": "fused_int8"}
    threads = None if CUDA else 1
    seconds = 4.0
    rounds = (2, 20)

    def __init__(self, size: Size):
        self.size, self.name = size, f"infer_texts, {size.name}, {FORWARD}"
        self.headline = FIRST if size == SIZES[0] else PROVIDERS
        self.preparing = 0.0 if CUDA or size == SIZES[0] else 60.0
        self.texts = synthetic.texts(size.data, size.texts)
        self.errors: dict[str, gate.Errors] = {}

    def provider(self, name: str) -> Classify:
        if name in ENGINES:
            return of_engine(name)
        if name.startswith("fused"):
            return ours(int8=name in INT8)
        return of_pipeline(pipeline(patched=name == "pipeline_patched"), by_length=name == "pipeline_sorted")

    @functools.cached_property
    def truth(self) -> tuple[Tensor, Tensor]:
        """The logits of the unpatched model in float64 and in the dtype that is timed."""
        low, ref = (self.logits(of_pipeline(pipeline(dtype))) for dtype in (DTYPE, torch.float64))
        return ref, low.to(DTYPE)

    def logits(self, provider: Classify) -> Tensor:
        """Return the logits of CHECKED texts, whose mean over the labels is 0."""
        logits = provider.scores(self.texts[:CHECKED]).double().log()
        return logits - logits.mean(1, keepdim=True)

    def check(self, provider: Classify, int8: bool = False) -> gate.Errors:
        """Return the errors of the logits; raise AssertionError if they are those of another model."""
        rule = gate.INT8 if int8 else gate.ANY_ORDER
        return {"logits": gate.check_close("logits", self.logits(provider), *self.truth, roundings=rule)}

    def require(self, provider: str) -> None:
        super().require(provider)
        if provider in ENGINES:
            rivals.require(ENGINES[provider])
        if provider == "fused_int8":
            rivals.cpu()

    def prepare(self, provider: str) -> Callable[[], list]:
        classify = self.provider(provider)
        if provider not in self.errors:
            self.errors[provider] = self.check(classify, provider in INT8)
        call = functools.partial(classify.call, self.texts)
        call.eager = "calls as a user makes them"
        return call

    def info(self, provider: str) -> dict[str, Any]:
        facts = {"op": "infer_texts", "size": self.size.name, "passes": FORWARD, "served_by": None}
        return facts | {"unit": "texts/s", "work": self.size.texts, "errors": self.errors[provider]}


def ours(int8: bool) -> Classify:
    from electra_fast.use import Classifier  # this and the others below are imported late: it takes seconds

    options = {"precision": "bf16" if CUDA else "float32", "int8": int8, "max_len": LONGEST}
    model = Classifier(synthetic.folder(), device=device(), **options)
    return Classify(model, lambda texts: table([found.scores for found in model(texts)], model.labels))


def pipeline(dtype: torch.dtype = DTYPE, patched: bool = False) -> Any:
    """Return transformers' TextClassificationPipeline with the model of the folder."""
    import transformers

    from electra_fast import hf

    options = {"batch_size": BATCH, "device": device(), "dtype": dtype}
    pipe = transformers.pipeline("text-classification", str(synthetic.folder()), **options)
    if patched:
        hf.patch(pipe.model)
    return pipe


def of_pipeline(pipe: Any, by_length: bool = False) -> Classify:
    def call(texts: list[str], **options: Any) -> list[dict[str, Any]]:
        if by_length:
            return in_order_of_length(texts, lambda some: pipe(some, **options))
        return pipe(texts, **options)

    def scores(texts: list[str]) -> Tensor:
        found = [{each["label"]: each["score"] for each in of} for of in call(texts, top_k=None)]
        return table(found, pipe.model.config.id2label.values())

    return Classify(call, scores)


def of_engine(name: str) -> Classify:
    """Return an inference engine with transformers' tokenizer in front, and batches sorted by length."""
    import transformers

    folder = synthetic.folder()
    model = transformers.ElectraForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    logits, labels = ENGINES[name](model), list(model.config.id2label.values())

    def shares_of_ids(ids: list[list[int]]) -> list[Tensor]:
        found = []
        for begin in range(0, len(ids), BATCH):
            batch = [torch.tensor(x) for x in ids[begin : begin + BATCH]]
            padded = pad_sequence(batch, batch_first=True, padding_value=tokenizer.pad_token_id)
            found += logits(padded, (padded != tokenizer.pad_token_id).long()).softmax(1)
        return found

    def shares(texts: list[str]) -> list[Tensor]:
        return in_order_of_length(tokenizer(texts)["input_ids"], shares_of_ids)

    def call(texts: list[str]) -> list[tuple[str, float]]:
        best, numbers = torch.stack(shares(texts)).max(1)
        return [(labels[i], share) for i, share in zip(numbers.tolist(), best.tolist(), strict=True)]

    return Classify(call, lambda texts: torch.stack(shares(texts)))


def in_order_of_length(items: Sequence, function: Callable[[list], list]) -> list:
    """Call a function with the items sorted by length; return its results in the order of the items."""
    order = sorted(range(len(items)), key=lambda i: len(items[i]))
    found = dict(zip(order, function([items[i] for i in order]), strict=True))
    return [found[i] for i in range(len(items))]


def table(scores: list[dict[str, float]], labels: Iterable[str]) -> Tensor:
    """Return the scores by label of each text as [texts, labels], float64."""
    return torch.tensor([[of[label] for label in labels] for of in scores], dtype=torch.float64)


@functools.cache
def case(size: str, passes: str) -> TextsCase:
    return TextsCase(next(s for s in SIZES if s.name == size))


def runs() -> list[Run]:
    """Return all cases. Only FIRST of the first size fit into the usual budget."""
    early, late = (95, None), (0, Round.DEFINITIONS)
    return [
        Run(s.name, FORWARD, p, *(early if s == SIZES[0] and p in FIRST else late))
        for s in SIZES
        for p in PROVIDERS
    ]


bench_infer_texts = parametrize(case, runs())
