"""Ids that may be outside of their table: refused on the CPU, turned into NaN on a GPU."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from electra_fast.dtypes import wide
from electra_fast.errors import must


def require(legal: Tensor, error: Callable[[], Exception], rule: str) -> None:
    """Raise `error()` unless `legal`; a compiled graph has no branch and asserts `rule` instead."""
    if torch.compiler.is_compiling():
        torch._assert_async(legal, rule)
    elif not legal:
        raise error()


def legal_ids(op: str, name: str, ids: Tensor, size: int) -> tuple[Tensor, Tensor | None]:
    """Return (ids with the bad ones replaced by 0, mask of the bad ones).

    On the CPU a bad id raises at once, and the mask is None.
    """
    bad = (ids < 0) | (ids >= size)
    if ids.device.type != "cpu":
        return ids.masked_fill(bad, 0), bad

    def error() -> IndexError:
        got = f"{ids[bad][0].item()} at {bad.nonzero()[0].tolist()}"
        remedy = "electra_fast.check_batch finds such ids before training"
        return IndexError(must(f"{op}: {name}", f"be in [0, {size})", got, remedy))

    require(~bad.any(), error, f"{op}: {name} must be rows of its table")
    return ids, None


def rows_of(op: str, name: str, table: Tensor, ids: Tensor) -> Tensor:
    """Return the rows ``[*ids.shape, E]`` of a table in the dtype of the arithmetic, NaN for a bad id."""
    ids, bad = legal_ids(op, name, ids, table.shape[0])
    rows = wide(F.embedding(ids, table))
    return rows if bad is None else rows.masked_fill(bad[..., None], math.nan)
