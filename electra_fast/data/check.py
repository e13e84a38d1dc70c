"""Which id of a batch is outside its table."""

import torch
from torch import Tensor


def check_batch(
    ids: Tensor,
    vocab_size: int,
    *,
    type_ids: Tensor | None = None,
    type_vocab_size=2,
    position_ids: Tensor | None = None,
    max_positions=512,
) -> None:
    """Find the first id outside its table, on any device; it synchronises, so not in a hot loop.

    Raises:
        IndexError: names the id, its row and column, and the table's size.
        TypeError: a tensor is neither int32 nor int64.
    """
    for name, tensor, size in (
        ("ids", ids, vocab_size),
        ("type_ids", type_ids, type_vocab_size),
        ("position_ids", position_ids, max_positions),
    ):
        if tensor is None:
            continue
        if tensor.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"check_batch: {name} must be int32 or int64, got {tensor.dtype}")
        bad = ((tensor < 0) | (tensor >= size)).nonzero()
        if len(bad):
            *row, column = bad[0].tolist()
            place = f"row {row[-1]}, column {column}" if row else f"place {column}"
            value = tensor[tuple(bad[0])].item()
            raise IndexError(f"check_batch: {name}: {value} at {place} is outside [0, {size})")
