"""Encoded items as packed batches.

A sequence is ``[CLS] A [SEP]`` or ``[CLS] A [SEP] B [SEP]``. An item has one sequence, or one per option.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import numpy as np
import torch

from electra_fast import data
from electra_fast.data.order import Order

BATCH = 256  # texts per call of the tokenizer, whose objects need 100 bytes per character
IGNORE = -100  # the class of a target without a loss
MULTIPLE = 64  # the fixed number of tokens of a batch is a multiple of this number
SAMPLED = 500  # batches from which the fixed number of items is taken; about one in 500 others has more


@dataclass(eq=False)
class Examples:
    """The sequences of a data set end to end, and their targets.

    The targets of an item are integers (`IGNORE`: no target) or floats (NaN: no target).
    """

    ids: np.ndarray  # [T] int32, special ids included
    offsets: np.ndarray  # [S + 1] int64: sequence s is ids[offsets[s]:offsets[s + 1]]
    first: np.ndarray  # [S] int64, number of tokens of [CLS] A [SEP]; those after it have type 1
    _: KW_ONLY
    truncated: int = 0  # sequences that were longer than the model
    group: int = 1  # sequences per item
    item_targets: dict[str, np.ndarray] = field(default_factory=dict)  # each [N] or [N, C]
    token_targets: dict[str, np.ndarray] = field(default_factory=dict)  # each [T]
    aligned: Any = None  # what a task needs to turn logits into predictions

    def __len__(self) -> int:
        """Return the number of items."""
        return (len(self.offsets) - 1) // self.group

    @property
    def lengths(self) -> np.ndarray:
        """The number of tokens of each item."""
        return np.diff(self.offsets[:: self.group])

    def arrays(self) -> list[np.ndarray]:
        """Return all sequences and targets, for a hash."""
        targets = self.item_targets | self.token_targets
        return [self.ids, self.offsets, self.first, *targets.values()]

    def batch(self, items: np.ndarray) -> dict[str, Any]:
        """Return some items as one packed batch: the arguments of `TaskHead.forward` and the targets."""
        sequences = (items[:, None] * self.group + np.arange(self.group)).ravel()
        lengths = np.diff(self.offsets)[sequences]
        bounds = np.concatenate([[0], lengths.cumsum()])
        position = np.arange(bounds[-1]) - np.repeat(bounds[:-1], lengths)
        t = position + np.repeat(self.offsets[sequences], lengths)
        arrays = {
            "ids": self.ids[t].astype(np.int64),
            "type_ids": (position >= np.repeat(self.first[sequences], lengths)).astype(np.int64),
            "cu_seqlens": bounds.astype(np.int32),
            **{name: x[items] for name, x in self.item_targets.items()},
            **{name: x[t] for name, x in self.token_targets.items()},
        }
        tensors = {name: torch.from_numpy(x) for name, x in arrays.items()}
        return tensors | {"max_seqlen": int(lengths.max(initial=1))}

    def in_order(self, tokens: int) -> Iterator[tuple[slice, dict[str, Any]]]:
        """Yield all items as batches of about `tokens` tokens, each with the slice of its items."""
        ends = self.lengths.cumsum()
        begin = 0
        while begin < len(self):
            before = ends[begin - 1] if begin else 0
            end = max(begin + 1, int(np.searchsorted(ends, before + tokens, side="right")))
            yield slice(begin, end), self.batch(np.arange(begin, end))
            begin = end


def assemble(
    first: Sequence[Sequence[int]],
    second: Sequence[Sequence[int] | None] | None,
    tokenizer: Any,
    max_len: int,
) -> Examples:
    """Put token ids between [CLS] and [SEP].

    A pair that is too long loses tokens at the end of its longer text, as in BERT.

    Args:
        first: the ids of each text A.
        second: those of each text B, None for a single text; None: all are single texts.
        tokenizer: it has the ids of [CLS] and [SEP].
        max_len: the largest number of tokens in a sequence.
    """
    special = data.special_ids(tokenizer)
    cls, sep = special["[CLS]"], special["[SEP]"]
    ids: list[int] = []
    offsets, firsts, truncated = [0], [], 0
    for i, a in enumerate(first):
        b = None if second is None else second[i]
        space = max_len - (2 if b is None else 3)
        keep_a, keep_b = len(a), 0 if b is None else len(b)
        truncated += keep_a + keep_b > space
        if b is None:
            keep_a = min(keep_a, space)
        elif keep_a + keep_b > space:
            keep_b = min(keep_b, max(space - keep_a, space // 2))
            keep_a = space - keep_b
        ids += [cls, *a[:keep_a], sep]
        firsts.append(keep_a + 2)
        if b is not None:
            ids += [*b[:keep_b], sep]
        offsets.append(len(ids))
    return Examples(np.array(ids, np.int32), np.array(offsets), np.array(firsts, int), truncated=truncated)


def token_ids(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """Return the token ids of each text, without special ids."""
    return [encoding.ids for encoding in encodings(texts, tokenizer)]


def encodings(texts: Sequence[Any], tokenizer: Any, **options: Any) -> Iterator[Any]:
    """Yield the tokenizer's encoding of each text, without special ids."""
    for begin in range(0, len(texts), BATCH):
        batch = list(texts[begin : begin + BATCH])
        yield from tokenizer.encode_batch(batch, add_special_tokens=False, **options)


@dataclass(eq=False)
class TaskBatches:
    """Endless packed batches of `batch` items on average; each is a pure function of (seed, index).

    A batch has as many items as fit into `batch` times the mean number of tokens, so that batches are equally
    large although they have no padding. An epoch is all items in a random order of its own, and the largest
    batch is as large as an epoch.
    """

    examples: Examples
    batch: int
    seed: int
    pad_id: int
    fixed: bool = False  # fill all batches up to the same shape, for a CUDA graph

    def __post_init__(self) -> None:
        lengths = self.examples.lengths
        items = min(self.batch, len(lengths))
        self.order = Order(lengths, max(1, round(items * lengths.mean())), self.seed)

    @property
    def steps_per_epoch(self) -> float:
        return self.order.epoch_size / self.order.capacity

    def make(self, index: int) -> dict[str, Any]:
        """Return a batch: the arguments of `TaskModel.forward`."""
        items = self.order.numbers(index)
        while not len(items):  # a single item is longer than the mean batch: repeat the one before
            index -= 1
            items = self.order.numbers(index)
        batch = self.examples.batch(items)
        return self._filled(batch, len(items)) if self.fixed else batch

    @functools.cached_property
    def _shape(self) -> tuple[int, int]:
        """The number of tokens of a filled batch, and the number of items that suffices for nearly all."""
        most = self.order.capacity - 1 + int(self.examples.lengths.max())
        tokens = -(-most // MULTIPLE) * MULTIPLE
        padding = -(-tokens // int(np.diff(self.examples.offsets).max()))  # sequences of padding
        return tokens, padding + max(len(self.order.numbers(index)) for index in range(SAMPLED))

    def _filled(self, batch: dict[str, Any], items: int) -> dict[str, Any]:
        """Fill up with sequences of padding, empty sequences, and items without targets."""
        examples, begin, (tokens, most_items) = self.examples, len(batch["ids"]), self._shape
        longest = int(np.diff(examples.offsets).max())
        more_tokens = tokens - begin
        # The padding is cut into sequences that are not longer than those of the data.
        bounds = [*range(begin + longest, tokens, longest)] + [tokens] * (more_tokens > 0)
        more_items = max(most_items - items, -(-len(bounds) // examples.group))
        bounds += [tokens] * (more_items * examples.group - len(bounds))

        def fill(x: torch.Tensor, rows: int, value: float) -> torch.Tensor:
            return torch.cat([x, x.new_full((rows, *x.shape[1:]), value)])

        filled = {
            "ids": fill(batch["ids"], more_tokens, self.pad_id),
            "type_ids": fill(batch["type_ids"], more_tokens, 0),
            "cu_seqlens": torch.cat([batch["cu_seqlens"], batch["cu_seqlens"].new_tensor(bounds)]),
            "max_seqlen": longest,
        }
        rows = dict.fromkeys(examples.item_targets, more_items) | dict.fromkeys(
            examples.token_targets, more_tokens
        )
        for name, more in rows.items():
            x = batch[name]
            filled[name] = fill(x, more, torch.nan if x.is_floating_point() else IGNORE)
        return filled
