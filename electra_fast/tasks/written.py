"""Sources with their targets as packed batches."""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np
import torch

from electra_fast.tasks.examples import Examples, assemble


@dataclass(eq=False)
class WriteExamples(Examples):
    """The sources, and one target for each. The number of tokens of an item is that of both."""

    _: KW_ONLY
    targets: Examples  # [CLS] target [SEP]
    tokenizer: Any  # that made the ids

    @property
    def lengths(self) -> np.ndarray:
        return super().lengths + self.targets.lengths - 1  # [SEP] of a target is predicted, but not read

    def batch(self, items: np.ndarray) -> dict[str, Any]:
        """Return some items as one packed batch of sources and one of targets.

        The decoder reads ``target_ids``, a target without [SEP], and predicts ``labels``, it without [CLS].
        """
        target = self.targets.batch(items)
        ids, bounds = target["ids"], target["cu_seqlens"].long()
        read, predicted = torch.ones(2, len(ids), dtype=torch.bool)
        read[bounds[1:] - 1] = False
        predicted[bounds[:-1]] = False
        return super().batch(items) | {
            "target_ids": ids[read],
            "labels": ids[predicted],
            "target_cu_seqlens": (bounds - torch.arange(len(bounds))).int(),
            "target_max_seqlen": target["max_seqlen"] - 1,
        }

    def sources(self) -> list[np.ndarray]:
        """Return the ids of each source."""
        return np.split(self.ids, self.offsets[1:-1])

    def arrays(self) -> list[np.ndarray]:
        return [*super().arrays(), *self.targets.arrays()]


def write_examples(
    sources: Sequence[Sequence[int]],
    targets: Sequence[Sequence[int]],
    tokenizer: Any,
    max_len: int,
    max_target: int,
) -> WriteExamples:
    """Put the token ids of sources and targets between [CLS] and [SEP].

    Args:
        max_len, max_target: the largest number of tokens of a source and of a target; longer ones lose those
            at the end. `truncated` counts both.
    """
    source, target = (
        assemble(sources, None, tokenizer, max_len),
        assemble(targets, None, tokenizer, max_target),
    )
    truncated = source.truncated + target.truncated
    found = (source.ids, source.offsets, source.first)
    return WriteExamples(*found, truncated=truncated, targets=target, tokenizer=tokenizer)
