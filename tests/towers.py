"""A small model and a batch for it, shared by the tests of the model and of its checkpoints."""

import torch

from electra_fast.config import ElectraConfig

# Towers of different shapes, widths that differ from the embedding's.
CONFIG = ElectraConfig(
    vocab_size=300, max_positions=40, embedding=24,
    layers=2, hidden=32, heads=2, ffn=64,
    generator_layers=1, generator_hidden=16, generator_heads=1, generator_ffn=48,
)  # fmt: skip


def padded(*lengths, L=24):
    """Return (ids, key_mask) of random sentences: [CLS] tokens [SEP], padded to L."""
    ids = torch.randint(104, 300, (len(lengths), L))
    n = torch.tensor(lengths)[:, None]
    place = torch.arange(L)
    ids = ids.masked_fill(place == 0, 101).masked_fill(place == n - 1, 102)
    return ids.masked_fill(place >= n, 0), place < n


def assert_all_equal(first, second):
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
