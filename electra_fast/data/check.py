"""A check for ids outside their tables."""

import torch
from torch import Tensor

from electra_fast.errors import must


def check_batch(
    ids: Tensor,
    vocab_size: int,
    *,
    type_ids: Tensor | None = None,
    type_vocab_size=2,
    position_ids: Tensor | None = None,
    max_positions=512,
) -> None:
    """Raise an error for the first id outside its table.

    This works on any device, and synchronises with it: do not call it in a hot loop.

    Raises:
        IndexError: an id is outside; the message names it, its row and column, and the table's size.
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
            raise TypeError(must(f"check_batch: {name}", "be int32 or int64", tensor.dtype))
        bad = ((tensor < 0) | (tensor >= size)).nonzero()
        if len(bad):
            *row, column = bad[0].tolist()
            where = f"row {row[-1]}, column {column}" if row else f"position {column}"
            got = f"{tensor[tuple(bad[0])].item()} at {where}"
            raise IndexError(must(f"check_batch: {name}", f"be in [0, {size})", got))
