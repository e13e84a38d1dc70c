"""The sizes that are timed, and what makes the arguments at them."""

import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from benchmarks.machine import device
from electra_fast import data, reference
from electra_fast.config import ElectraConfig
from electra_fast.data import Padded

CUDA = device() == "cuda"
REHEARSAL = os.environ.get("ELECTRA_FAST_REHEARSAL") == "1"  # of `make gpu`, without a GPU


class Size(NamedTuple):
    name: str
    B: int  # sequences
    L: int  # positions a sequence
    preset: Callable[[], ElectraConfig]
    vocab: int = 30_522
    uniform: bool = False  # each id as likely as another; else a real text's, a few of them most of it
    dropout: float = 0.1 if CUDA else 0.0  # on the CPU it would be measured in place of the op
    packed: bool = False  # the lengths of a real text, one after the other

    @property
    def config(self) -> ElectraConfig:
        return dataclasses.replace(self.preset(), dropout=self.dropout, vocab_size=self.vocab)


def by_name(*sizes: Size) -> dict[str, Size]:
    return {size.name: size for size in sizes}


if REHEARSAL:  # the names of a GPU's sizes, at sizes that take no time
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
    # What all providers hold at once must fit: base and large are some of the paper's micro-batches.
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
def corpus() -> data.Encoded:
    """Return the default corpus as ids."""
    documents = data.documents()
    return data.encode(documents, data.train_tokenizer(documents))


@functools.cache
def batches(B: int, L: int) -> data.Batches:
    """Return batches of it: real ids, and as much padding as documents leave."""
    return data.Batches(corpus(), seq_len=L, batch_size=B)


class Make:
    """Makes the arguments of a case, the same numbers each time, in the dtype that is timed."""

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
        """Return the sequences of a packed batch, the corpus's lengths, as an op's arguments."""
        batch = batches(self.B, self.L).packed(0)
        return {"cu_seqlens": batch.cu_seqlens.to(self.device), "max_seqlen": batch.max_seqlen}

    def batch(self) -> Padded:
        batch = batches(self.B, self.L).padded(0)
        return Padded(batch.ids.to(self.device), batch.key_mask.to(self.device))

    def candidates(self, ids: torch.Tensor) -> torch.Tensor:
        return ~torch.isin(ids, torch.tensor(self.config.special_ids, device=ids.device))

    def masked(self) -> reference.MaskedTokens:
        """Return a real batch's masked tokens."""
        ids, key_mask, _ = self.batch()
        settings = {"mask_id": self.config.mask_id, "mask_prob": self.config.mask_prob}
        candidates = self.candidates(ids)
        return reference.mask_tokens(ids, candidates, self.rng, key_mask=key_mask, **settings)

    def site(self, stream: int) -> dict[str, Any]:
        """Return the keyword arguments of a dropout site."""
        return {"dropout": self.config.dropout, "rng": self.rng, "stream": stream}
