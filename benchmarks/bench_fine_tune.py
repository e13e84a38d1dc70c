"""Fine-tuning a classifier of transformers: one step on 32 search queries, forward, loss, backward, AdamW.

`huggingface` is ElectraForSequenceClassification with its default config, on queries that are padded to the
longest one. `fused` is the same model after `electra_fast.hf.patch`. `packed` gives the patched encoder the
queries end to end with their bounds, and the classifier the first token of each. On a GPU the step runs under
autocast to bfloat16.
"""

import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import gate
from benchmarks.harness.cases import Case, Run, parametrize
from benchmarks.harness.compiled import compiled
from benchmarks.harness.inputs import CUDA, REHEARSAL, tokenizer
from benchmarks.harness.machine import device
from benchmarks.harness.models import build, without_dropout
from benchmarks.harness.providers import COMPILED
from electra_fast import data

PROVIDERS = ("fused", "packed", "huggingface", "huggingface_compile")
SMALLER = {"num_hidden_layers": 2} if REHEARSAL else {}  # the default has 12

# The label says whether the query is about programming.
QUERIES = (
    ("sort a list of dictionaries by value", 1),
    ("what is the time in new york", 0),
    ("read a file line by line without loading all of it into memory", 1),
    ("how long do you boil an egg if you want it soft in the middle", 0),
    ("difference between a process and a thread and when to use which", 1),
    ("train times from london to paris", 0),
    ("remove an item from a list while you iterate over it", 1),
    ("weather tomorrow", 0),
    ("convert a string to a date and add three days to it", 1),
    ("what is the best way to learn to play the piano as an adult without a teacher", 0),
    ("regular expression for an email address", 1),
    ("how to grow tomatoes in a small garden", 0),
    ("import error no module named numpy", 1),
    ("who wrote the song of the wind", 0),
    ("run two functions at the same time and wait until both of them have returned a result", 1),
    ("opening hours of the city library on sunday and on public holidays", 0),
    ("merge two sorted arrays", 1),
    ("cheap second hand cars near me", 0),
    ("why is my loop so slow when I append a character to a string in each step", 1),
    ("what to wear to a wedding in winter", 0),
    ("send a message over a socket and close the connection", 1),
    ("distance between the earth and the moon", 0),
    ("print a number with two decimal places", 1),
    ("can I return a book that I have already opened if I still have the receipt", 0),
    ("how do I catch an exception write it to a log and raise it again with its traceback", 1),
    ("symptoms of the common cold and how long they last", 0),
    ("copy a folder and all files in it", 1),
    ("easy dinner for two", 0),
    ("install a package for one user only on a machine where I am not root", 1),
    ("how much water should a person drink in a day when it is hot outside", 0),
    ("test whether two objects are equal or whether they are the same object", 1),
    ("names of the planets in order of their size", 0),
)


class Batch(NamedTuple):
    inputs: dict[str, Any]  # arguments of the model, or of its encoder if the batch is packed
    labels: Tensor
    first: Tensor | None = None  # offsets of the first tokens in a packed batch


def sequences() -> list[Tensor]:
    """Return the ids of each query between [CLS] and [SEP]."""
    special = data.special_ids(tokenizer())
    cls, sep = special["[CLS]"], special["[SEP]"]
    return [torch.tensor([cls, *tokenizer().encode(text).ids, sep]) for text, _ in QUERIES]


def batch(packed: bool) -> Batch:
    """Return the queries as one batch, padded or packed."""
    found, labels = sequences(), torch.tensor([label for _, label in QUERIES]).to(device())
    lengths = torch.tensor([len(ids) for ids in found])
    longest = int(lengths.max())
    if not packed:
        ids = nn.utils.rnn.pad_sequence(found, batch_first=True)
        mask = (torch.arange(longest) < lengths[:, None]).long()
        return Batch({"input_ids": ids.to(device()), "attention_mask": mask.to(device())}, labels)
    bounds = F.pad(lengths.cumsum(0), (1, 0)).int().to(device())
    positions = torch.cat([torch.arange(n) for n in lengths]).to(device())
    inputs = {"input_ids": torch.cat(found)[None].to(device()), "position_ids": positions[None]}
    inputs |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
    inputs |= {"max_length_q": longest, "max_length_k": longest}
    return Batch(inputs, labels, bounds[:-1].long())


class FineTuneCase(Case):
    name = "fine_tune, 32 queries, step"
    providers = PROVIDERS
    headline = ("fused", "packed", "huggingface")
    seconds = 4.0
    rounds = (3, 20)
    compiling = 200.0  # twelve layers, both directions, without dropout for the gate and with it

    def __init__(self):
        self.batches = {packed: batch(packed) for packed in (False, True)}
        self.errors: dict[str, gate.Errors] = {}

    @functools.cached_property
    def config(self):
        import transformers  # imported late, because it takes seconds

        return transformers.ElectraConfig(**SMALLER)

    def model(self, provider: str) -> nn.Module:
        return build("ElectraForSequenceClassification", self.config, provider, device())

    def loss(self, model: nn.Module, provider: str) -> tuple[Tensor, Tensor]:
        """Return the loss and the logits."""
        inputs, labels, first = self.batches[provider == "packed"]
        with torch.autocast(device(), torch.bfloat16, enabled=CUDA):
            if first is None:
                logits = model(**inputs).logits
            else:  # the classifier reads the first position of [B, L, W]
                logits = model.classifier(model.electra(**inputs).last_hidden_state[0, first][:, None])
            return F.cross_entropy(logits, labels), logits

    def results(self, model: nn.Module, provider: str) -> dict[str, Tensor]:
        """Return logits, loss and the gradient of all parameters as one vector, without dropout."""
        with without_dropout(model):
            loss, logits = self.loss(model, provider)
            gradients = torch.autograd.grad(loss, list(model.parameters()))
        found = {"logits": logits, "loss": loss, "gradient": torch.cat([g.flatten() for g in gradients])}
        return {name: x.detach() for name, x in found.items()}

    @functools.cached_property
    def truth(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The results of the unpatched model in float64 and in the dtype that is timed."""
        model = self.model("huggingface")
        low = self.results(model, "huggingface")
        return self.results(model.double(), "huggingface"), low

    def check(self, model: nn.Module, provider: str) -> gate.Errors:
        """Return the errors of the results; raise AssertionError if they are those of another step."""
        got, (ref, low) = self.results(model, provider), self.truth
        return {name: gate.check_close(name, got[name], ref[name], low[name]) for name in ref}

    def prepare(self, provider: str):
        model = self.model(provider)
        forward = compiled(model, provider) if provider in COMPILED else model
        if provider not in self.errors:
            self.errors[provider] = self.check(forward, provider)
        optim = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

        def step() -> None:
            optim.zero_grad(set_to_none=True)
            self.loss(forward, provider)[0].backward()
            optim.step()

        step.eager = "eager steps, as a trainer runs them"
        return step

    def info(self, provider: str) -> dict[str, Any]:
        facts = {"op": "fine_tune", "size": "32 queries", "passes": "step", "served_by": None}
        tokens = len(self.batches[True].inputs["input_ids"][0])
        return facts | {"unit": "tokens/s", "work": tokens, "errors": self.errors[provider]}


@functools.cache
def case(size: str, passes: str) -> FineTuneCase:
    return FineTuneCase()


values = {p: 5 if p in COMPILED else 97 for p in PROVIDERS}
bench_fine_tune = parametrize(case, [Run("32 queries", "step", p, values[p]) for p in PROVIDERS])
