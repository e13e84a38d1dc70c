"""Small heads for tasks and batches for them, for the tests of heads."""

import json

import numpy as np
import torch
from torch import nn
from towers import CONFIG, padded

from electra_fast.heads import (
    IntentClassifier,
    MultipleChoice,
    QuestionAnswerer,
    SequenceClassifier,
    TokenClassifier,
)

LABELS = {
    SequenceClassifier: ("negative", "neutral", "positive"),
    TokenClassifier: ("O", "B-LOC", "I-LOC"),
    QuestionAnswerer: ("start", "end"),
    MultipleChoice: ("score",),
    IntentClassifier: ("play", "rate"),
}
SLOTS = ("O", "B-when", "I-when", "B-who")
LENGTHS = (24, 1, 13)
CUT = 2  # tokens of padding at the end of a packed batch, in one sequence


def labels_of(kind):
    return next(labels for each, labels in LABELS.items() if issubclass(kind, each))


def small(kind, seed=0, config=CONFIG, **options):
    """Return a head in eval mode with outputs that differ from 0."""
    torch.manual_seed(seed)
    more = [SLOTS] if kind is IntentClassifier else []
    head = kind(config, labels_of(kind), *more, **options)
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.1)
    return head.eval()


def batch():
    """Return texts with types, padded and packed; the packed batch ends with padding and empty sequences."""
    ids, key_mask = padded(*LENGTHS)
    types = torch.randint(0, 2, ids.shape)
    ends = np.cumsum(LENGTHS)
    bounds = torch.tensor([0, *ends, *[ends[-1] + CUT] * 3], dtype=torch.int32)
    flat = [torch.cat([x[key_mask], x.new_zeros(CUT)]) for x in (ids, types)]
    in_rows = {"ids": ids, "type_ids": types, "key_mask": key_mask}
    return in_rows, {"ids": flat[0], "type_ids": flat[1], "cu_seqlens": bounds, "max_seqlen": 24}


def real(x, given):
    """Return the rows of an output that belong to the texts, or to their tokens."""
    padded, ids = "key_mask" in given, given["ids"]
    if padded and x.shape[:2] == ids.shape:
        return x[given["key_mask"]]
    return x[:-CUT] if not padded and len(x) == len(ids) else x[: len(LENGTHS)]


def loss_of(out, given):
    """Return a loss of the texts in `batch`."""
    outputs = [real(x, given) for x in (out if isinstance(out, tuple) else (out,))]
    return sum((x * torch.linspace(-1, 1, x.numel()).view_as(x)).sum() for x in outputs)


def real_logits(head, given, **more):
    with torch.no_grad():
        out = head(**given, **more)
    return [real(x, given) for x in (out if isinstance(out, tuple) else (out,))]


def edit(folder, **change):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
