"""The results of the ops that return several tensors."""

from typing import NamedTuple

from torch import Tensor


class MaskedTokens(NamedTuple):
    ids: Tensor  # shape and dtype of the input: [MASK] at most masked positions
    positions: Tensor  # [M] flat indices t, rising within a sequence; 0 in an unused slot
    targets: Tensor  # [M] original ids at `positions`; 0 in an unused slot
    weights: Tensor  # [M] float32: 1, or 0 in an unused slot


class Embedded(NamedTuple):
    x: Tensor  # [.., E] the input of the encoder
    word: Tensor  # [V, E] the table of the lookup, unchanged


class MLMHead(NamedTuple):
    loss: Tensor  # [] float32, weighted mean cross-entropy; the only field with a gradient
    samples: Tensor  # [M] one token per slot, drawn from the generator; dtype of the targets
    correct: Tensor  # [] float32, weighted count of slots whose arg-max is the target
    lse: Tensor  # [M] float32 log-sum-exp of the logits
    table: Tensor | None = None  # [V, E] the table itself, if `return_table`


class ReplacedTokens(NamedTuple):
    ids: Tensor  # original ids with the samples in place
    replaced: Tensor  # bool, shape of ids: True where the id differs from the original


class RTDLoss(NamedTuple):
    loss: Tensor  # [] float32, weighted mean; the only field with a gradient
    counts: Tensor  # [4] float32, weighted true positives, false positives, false negatives, true negatives


class NCELoss(NamedTuple):
    loss: Tensor  # [] float32, weighted mean; the only field with a gradient
    counts: Tensor  # [4] float32, weighted true positives, false positives, false negatives, true negatives
