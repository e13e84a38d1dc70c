"""The sizes that are timed, and the arguments at these sizes."""

import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from benchmarks.harness.machine import device
from electra_fast import data, reference
from electra_fast.config import ElectraConfig
from electra_fast.data import Padded

CUDA = device() == "cuda"
REHEARSAL = os.environ.get("ELECTRA_FAST_REHEARSAL") == "1"  # `make gpu-rehearse`, without a GPU


class Size(NamedTuple):
    name: str
    B: int  # sequences
    L: int  # positions per sequence
    preset: Callable[[], ElectraConfig]
    vocab: int = 30_522
    uniform: bool = False  # uniformly distributed ids instead of those of a real text
    dropout: float = 0.1 if CUDA else 0.0  # on the CPU most of the time would be dropout's
    packed: bool = False  # sequences of a real text's lengths, without padding
    queries: int | None = None  # of attention, per sequence; None: those of the L keys
    causal: bool = False

    @property
    def config(self) -> ElectraConfig:
        return dataclasses.replace(self.preset(), dropout=self.dropout, vocab_size=self.vocab)


def by_name(*sizes: Size) -> dict[str, Size]:
    return {size.name: size for size in sizes}


if REHEARSAL:  # the names of the GPU's sizes with tiny dimensions
    SIZES = by_name(
        Size("small 128x128", 2, 32, ElectraConfig.tiny), Size("base 256x512", 2, 64, ElectraConfig.tiny)
    )
    STEPS = {
        "small 128x128": (SIZES["small 128x128"], 1),
        "base 8 of 32x512": (Size("base 32x512", 2, 64, ElectraConfig.tiny), 2),
        "large 4 of 16x512": (Size("large 16x512", 2, 64, ElectraConfig.tiny), 2),
    }
elif CUDA:
    SIZES = by_name(
        Size("small 128x128", 128, 128, ElectraConfig.small),
        Size("base 256x512", 256, 512, ElectraConfig.base),
    )
    # All providers are in memory together, so base and large are micro-batches of the paper's batch.
    STEPS = {
        "small 128x128": (SIZES["small 128x128"], 1),
        "base 8 of 32x512": (Size("base 32x512", 32, 512, ElectraConfig.base), 8),
        "large 4 of 16x512": (Size("large 16x512", 16, 512, ElectraConfig.large), 4),
    }
else:
    SIZES = by_name(Size("small 16x128", 16, 128, ElectraConfig.small))
    STEPS = {
        "small 16x128, dropout 0.1": (Size("small 16x128", 16, 128, ElectraConfig.small, dropout=0.1), 1),
        "small 16x128, no dropout": (SIZES["small 16x128"], 1),
    }


@functools.cache
def tokenizer():
    """Return the WordPiece tokenizer that is trained on the default corpus."""
    return data.train_tokenizer(data.documents())


@functools.cache
def corpus() -> data.Encoded:
    """Return the default corpus as ids."""
    return data.encode(data.documents(), tokenizer())


@functools.cache
def batches(B: int, L: int) -> data.Batches:
    """Return batches of the default corpus: real ids, padded where documents are shorter than L."""
    return data.Batches(corpus(), seq_len=L, batch_size=B)


class Make:
    """Makes the arguments of a case: the same values each time, in the dtype that is timed."""

    def __init__(self, size: Size):
        self.size, self.config = size, size.config
        self.B, self.L = size.B, size.L
        self.device = device()
        self.dtype = torch.bfloat16 if CUDA else torch.float32
        self.generator = torch.Generator(self.device).manual_seed(0)
        self.rng = torch.tensor([0, 1], device=self.device)  # (seed, step)

    def normal(self, *shape: int, scale: float = 1.0, mean: float = 0.0) -> torch.Tensor:
        x = torch.randn(*shape, generator=self.generator, device=self.device)
        return (mean + scale * x).to(self.dtype)

    def bounds(self) -> dict[str, Any]:
        """Return `cu_seqlens` and `max_seqlen` of a packed batch of the corpus."""
        batch = batches(self.B, self.L).packed(0)
        return {"cu_seqlens": batch.cu_seqlens.to(self.device), "max_seqlen": batch.max_seqlen}

    def batch(self) -> Padded:
        batch = batches(self.B, self.L).padded(0)
        return Padded(batch.ids.to(self.device), batch.key_mask.to(self.device))

    def candidates(self, ids: torch.Tensor) -> torch.Tensor:
        return ~torch.isin(ids, torch.tensor(self.config.special_ids, device=ids.device))

    def masked(self) -> reference.MaskedTokens:
        """Return the masked tokens of a real batch."""
        ids, key_mask, _ = self.batch()
        settings = {"mask_id": self.config.mask_id, "mask_prob": self.config.mask_prob}
        candidates = self.candidates(ids)
        return reference.mask_tokens(ids, candidates, self.rng, key_mask=key_mask, **settings)

    def dropout(self, stream: int) -> dict[str, Any]:
        """Return the dropout arguments of an op; `stream` is the number of the dropout use."""
        return {"dropout": self.config.dropout, "rng": self.rng, "stream": stream}
