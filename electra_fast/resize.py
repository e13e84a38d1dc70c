"""Change the size of the vocabulary in everything with one row per token: tables, bias, optimizer state.

The parameters remain the same objects. So towers still share a table, and an optimizer still refers to the
parameters that it trains.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from electra_fast.errors import must


class TokenRows(NamedTuple):
    """A parameter with one row per token, and a function that initializes new rows in place."""

    parameter: nn.Parameter
    fill: Callable[[Tensor], object]


def resize(model: nn.Module, vocab_size: int, optimizer: torch.optim.Optimizer | None) -> None:
    """Resize every parameter with one row per token to `vocab_size` rows, and its state in the optimizer.

    Raises:
        ValueError: the optimizer's state of such a parameter has a tensor of another shape; nothing has
            changed then.
    """
    owners = (module for module in model.modules() if hasattr(module, "token_rows"))
    rows = [row for owner in owners for row in owner.token_rows()]
    states = [optimizer.state.get(row.parameter, {}) if optimizer else {} for row in rows]
    for row, state in zip(rows, states, strict=True):
        for name, value in state.items():
            if isinstance(value, Tensor) and value.numel() > 1 and value.shape != row.parameter.shape:
                rule = f"have state of shape {list(row.parameter.shape)}"
                got, remedy = f"{name} of shape {list(value.shape)}", "make a new optimizer after resizing"
                raise ValueError(must("resize_token_embeddings: optimizer", rule, got, remedy))
    for (parameter, fill), state in zip(rows, states, strict=True):
        averages = [n for n, v in state.items() if isinstance(v, Tensor) and v.shape == parameter.shape]
        state.update({n: _resized(state[n], vocab_size, Tensor.zero_) for n in averages})
        parameter.data = _resized(parameter.data, vocab_size, fill)
        parameter.grad = None


def _resized(old: Tensor, size: int, fill: Callable[[Tensor], object]) -> Tensor:
    new = old.new_empty(size, *old.shape[1:])
    kept = min(size, len(old))
    new[:kept] = old[:kept]
    fill(new[kept:])
    return new
