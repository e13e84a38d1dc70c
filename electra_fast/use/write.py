"""Texts that a model of `finetune write` writes: titles, summaries, answers."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch

from electra_fast.errors import must
from electra_fast.tasks.examples import Examples
from electra_fast.tasks.generation import generate, generator, require_new_tokens, target_log_probs, text_of
from electra_fast.tasks.items import Writing
from electra_fast.tasks.task import EVALUATION_TOKENS
from electra_fast.use.fine_tuned import FineTuned
from electra_fast.use.texts import listed


class Written(NamedTuple):
    text: str
    log_prob: float  # of the text given the source, with [SEP] if it has ended


class Writer(FineTuned):
    """A model of `finetune write`, or an EncoderDecoderModel of two ELECTRAs. A long source is cut off.

    Arguments as in `FineTuned`, without int8, which decoders do not have; of the lengths only ``max_len``.
    """

    task: ClassVar[str] = "write"

    def __init__(self, folder: str | Path, *, int8: bool = False, **options: Any):
        if int8:
            raise ValueError(must("Writer: int8", "be False", True, "decoders are not computed in int8"))
        super().__init__(folder, **options)
        self._generator = generator(self.model)

    def __call__(
        self,
        texts: str | Sequence[str],
        *,
        beams: int | None = None,
        max_new_tokens: int | None = None,
        sample: bool = False,
    ) -> list[Written] | Written:
        """Return what the model writes for each text; for one string, the result is not a list.

        Args:
            texts: the sources.
            beams: hypotheses of the beam search, 1: the most probable token at each position; None: as the
                run evaluated.
            max_new_tokens: the longest result, [SEP] included; None: the longest target of the run.
            sample: draw each token, by transformers' defaults and from PyTorch's default generator.

        Raises:
            TypeError, ValueError: a text is not a string with a token, or an option is out of range.
        """
        texts = listed("Writer: texts", texts)
        if isinstance(texts, str):
            return self([texts], beams=beams, max_new_tokens=max_new_tokens, sample=sample)[0]
        beams = self._task.options.beams if beams is None else beams
        new_tokens = self._task.max_target - 1 if max_new_tokens is None else max_new_tokens
        require_new_tokens("Writer: max_new_tokens", self.model, new_tokens)
        if isinstance(beams, bool) or not isinstance(beams, int) or beams < 1:
            raise ValueError(must("Writer: beams", "be an integer of 1 or more", beams))
        self.check("text", texts)
        if not texts:
            return []
        options = {"beams": beams, "new_tokens": new_tokens, "sample": sample}
        return self._write([Writing(text, None, f"text {n}") for n, text in enumerate(texts, 1)], **options)

    def _write(self, items: list[Writing], **options: Any) -> list[Written]:
        examples, device = self._examples(items), self._generator.device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.precision == "bf16"):
            found = generate(self._generator, examples.sources(), **options, progress=True, desc=self.name)
            scored = dataclasses.replace(examples, targets=self._targets(found))
            log_probs = target_log_probs(self.model, scored, EVALUATION_TOKENS[device])
        texts = [text_of(self.tokenizer, ids) for ids in found]
        return [Written(*each) for each in zip(texts, log_probs, strict=True)]

    def _targets(self, found: list[list[int]]) -> Examples:
        """Return what was written as targets; one that has not ended has no [SEP]."""
        sequences = [[self.model.config.cls_id, *ids] for ids in found]
        lengths = np.array([len(ids) for ids in sequences])
        offsets = np.concatenate([[0], lengths.cumsum()])
        return Examples(np.concatenate(sequences).astype(np.int32), offsets, lengths)
