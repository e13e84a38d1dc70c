"""Another size of the vocabulary, for everything that has a row a token: tables, bias, optimizer state.

Parameters stay the objects that they are, with other rows, so that towers which share a table still do, and
an optimizer still holds what it trains.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Rows(NamedTuple):
    """A parameter with a row a token, and what fills the rows that are new."""

    parameter: nn.Parameter
    fill: Callable[[Tensor], object]


def resize(model: nn.Module, vocab_size: int, optimizer: torch.optim.Optimizer | None) -> None:
    """Give each parameter that has a row a token `vocab_size` rows, and the optimizer's averages of it too.

    Raises:
        ValueError: the optimizer keeps something of a parameter that is no average of its shape; nothing has
            been changed then.
    """
    owners = (module for module in model.modules() if hasattr(module, "token_rows"))
    rows = [row for owner in owners for row in owner.token_rows()]
    states = [optimizer.state.get(row.parameter, {}) if optimizer else {} for row in rows]
    for row, state in zip(rows, states, strict=True):
        for name, value in state.items():
            if isinstance(value, Tensor) and value.numel() > 1 and value.shape != row.parameter.shape:
                raise ValueError(
                    f"resize_token_embeddings: optimizer must keep averages of shape "
                    f"{list(row.parameter.shape)}, got {name} of shape {list(value.shape)}; make a new "
                    "optimizer for the resized model"
                )
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
