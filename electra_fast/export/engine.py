"""What runs an exported model, and the results of many texts in padded batches of different shapes."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from electra_fast.export.model import INPUTS, Output
from electra_fast.heads import IntentClassifier, IntentLogits, MultipleChoice, QuestionAnswerer
from electra_fast.tasks.examples import Examples

# An exported model: ids, mask and types, each int64 [B, L], to its outputs.
Engine = Callable[[np.ndarray, np.ndarray, np.ndarray], Sequence[np.ndarray]]
SIZES = (1, 7, 3, 16)  # of the batches in turn, so that the shapes differ


def of_module(module: nn.Module) -> Engine:
    """Return a function that runs a module of PyTorch whose arguments are `INPUTS`."""

    def run(ids: np.ndarray, mask: np.ndarray, types: np.ndarray) -> list[np.ndarray]:
        given = dict(zip(INPUTS, map(torch.from_numpy, (ids, mask, types)), strict=True))
        with torch.no_grad():
            return [output.numpy() for output in module(**given)]

    return run


def run(
    engine: Engine,
    outputs: Sequence[Output],
    examples: Examples,
    pad_id: int,
    sizes: Sequence[int] = SIZES,
    done: Callable[[int], Any] = lambda sequences: None,
) -> list[np.ndarray]:
    """Return each output for all sequences, ``[S, C]``, or for all tokens without the padding, ``[T, C]``.

    Args:
        engine: the exported model.
        outputs: what it returns.
        examples: the sequences.
        pad_id: the id of padding.
        sizes: the numbers of sequences in the batches; they repeat.
        done: is called with the number of sequences of each batch.
    """
    found: list[list[np.ndarray]] = [[] for _ in outputs]
    for ids, mask, types in batches(examples, pad_id, sizes):
        results = engine(ids, mask, types)
        for parts, output, result in zip(found, outputs, results, strict=True):
            parts.append(result[mask.astype(bool)] if output.per_token else result)
        done(len(ids))
    return [np.concatenate(parts) for parts in found]


def batches(
    examples: Examples, pad_id: int, sizes: Sequence[int]
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield all sequences in order as (ids, mask, types), padded to the longest of each batch."""
    lengths, begin, number = np.diff(examples.offsets), 0, 0
    while begin < len(lengths):
        some = slice(begin, begin + sizes[number % len(sizes)])
        position = np.arange(lengths[some].max())
        mask = position < lengths[some, None]
        t = np.minimum(examples.offsets[:-1][some, None] + position, len(examples.ids) - 1)
        ids = np.where(mask, examples.ids[t], pad_id).astype(np.int64)
        types = mask & (position >= examples.first[some, None])
        yield ids, mask.astype(np.int64), types.astype(np.int64)
        begin, number = some.stop, number + 1


def as_logits(head: nn.Module, arrays: Sequence[np.ndarray]) -> Any:
    """Return the results of `run` in the form of `tasks.task.predict`."""
    if isinstance(head, QuestionAnswerer):
        return np.stack(arrays, axis=-1)
    if isinstance(head, IntentClassifier):
        return IntentLogits(*arrays)
    return arrays[0][:, 0] if isinstance(head, MultipleChoice) else arrays[0]
