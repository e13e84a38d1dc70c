"""A small model and a batch for it, for the tests of the model and of its checkpoints."""

import torch

from electra_fast.config import ElectraConfig

# The towers have different shapes, and widths that differ from the embedding's.
CONFIG = ElectraConfig(
    vocab_size=300, max_positions=40, embedding=24,
    layers=2, hidden=32, heads=2, ffn=64,
    generator_layers=1, generator_hidden=16, generator_heads=1, generator_ffn=48,
)  # fmt: skip


def padded(*lengths, L=24):
    """Return (ids, key_mask) of random sentences: [CLS] tokens [SEP], padded to L."""
    ids = torch.randint(104, 300, (len(lengths), L))
    n = torch.tensor(lengths)[:, None]
    position = torch.arange(L)
    ids = ids.masked_fill(position == 0, 101).masked_fill(position == n - 1, 102)
    return ids.masked_fill(position >= n, 0), position < n


def assert_all_equal(first, second):
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
