"""A linear layer that can keep its weights in the dtype of the arithmetic, beside the float32 ones.

Autocast casts each weight in every forward and each weight's gradient in every backward: 816 of the 2176
kernels of ELECTRA-small's eager step. With `Copies` the weights are cast all together, where the optimizer
changes them, and a gradient leaves its product in float32, not rounded on the way.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class _Linear(torch.autograd.Function):
    """x W^T + b with the copies of W and b; the gradients are those of the float32 W and b."""

    @staticmethod
    def forward(ctx, x, weight, bias, low_weight, low_bias):
        ctx.save_for_backward(x, low_weight)
        return F.linear(x, low_weight, low_bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, low_weight = ctx.saved_tensors
        need_x, need_weight, need_bias, *_ = ctx.needs_input_grad
        rows = dy.flatten(0, -2)
        dx = dy @ low_weight if need_x else None
        dweight = _float32_product(rows.t(), x.flatten(0, -2)) if need_weight else None
        dbias = rows.sum(0, dtype=torch.float32) if need_bias else None
        return dx, dweight, dbias, None, None


def _float32_product(a: Tensor, b: Tensor) -> Tensor:
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else (a @ b).float()


class Dense(nn.Linear):
    """`nn.Linear`, and the same without its bias for an op that adds it itself."""

    low: tuple[Tensor, Tensor] | None = None  # the copies of (weight, bias), if somebody keeps them

    def forward(self, x: Tensor, *, with_bias: bool = True) -> Tensor:
        if self.low is None or not _autocasts_to(self.low[0], x.device.type):
            return F.linear(x, self.weight, self.bias if with_bias else None)
        low_weight, low_bias = self.low
        bias, low_bias = (self.bias, low_bias) if with_bias else (None, None)
        return _Linear.apply(x.to(low_weight.dtype), self.weight, bias, low_weight, low_bias)

    def __getstate__(self):  # a copy of the layer has weights of its own, of which nobody keeps copies
        return {name: value for name, value in self.__dict__.items() if name != "low"}


def _autocasts_to(x: Tensor, device: str) -> bool:
    return torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == x.dtype


class Copies:
    """Has every `Dense` of a model compute with copies of its weights wherever autocast is on.

    Whoever changes the weights calls `refresh`: nothing else looks whether they have changed.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        self._layers = [layer for layer in model.modules() if isinstance(layer, Dense)]
        self._masters = [p for layer in self._layers for p in (layer.weight, layer.bias)]
        self._low = [torch.empty_like(p, dtype=dtype, requires_grad=False) for p in self._masters]
        for layer, *low in zip(self._layers, self._low[::2], self._low[1::2], strict=True):
            layer.low = tuple(low)
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        torch._foreach_copy_(self._low, self._masters)

    def drop(self) -> None:
        """Have the model cast for itself again."""
        for layer in self._layers:
            layer.low = None
