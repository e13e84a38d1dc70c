"""A linear layer that can keep a low-precision copy of its float32 weights.

Autocast casts each weight in every forward and its gradient in every backward: 816 of the 2176 kernels in an
eager step of ELECTRA-small. `LowPrecisionWeights` casts all weights together, once after each update.
"""

import torch
from torch import Tensor, nn

from electra_fast.ops import FUSED, Ops


class Linear(nn.Linear):
    """`nn.Linear` computed by `ops.linear`; optionally without the bias, for an op that adds it itself."""

    low: tuple[Tensor, Tensor] | None = None  # copies of (weight, bias), set by `LowPrecisionWeights`

    def __init__(self, inputs: int, outputs: int, ops: Ops = FUSED):
        super().__init__(inputs, outputs)
        self.ops = ops

    def forward(self, x: Tensor, *, with_bias: bool = True) -> Tensor:
        bias = self.bias if with_bias else None
        if self.low is None or not _autocasts_to(self.low[0], x.device.type):
            return self.ops.linear(x, self.weight, bias)
        low_weight, low_bias = self.low
        low_bias = low_bias if with_bias else None
        return self.ops.linear(x, self.weight, bias, low_weight=low_weight, low_bias=low_bias)

    def __getstate__(self):  # `low` belongs to the weights of this object, not to those of a copy
        return {name: value for name, value in self.__dict__.items() if name != "low"}


def _autocasts_to(x: Tensor, device: str) -> bool:
    return torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == x.dtype


class LowPrecisionWeights:
    """Makes every `Linear` of a model compute with copies of its weights while autocast is enabled.

    Call `refresh` after each change of the weights: changes are not detected.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        self._layers = [layer for layer in model.modules() if isinstance(layer, Linear)]
        self._masters = [p for layer in self._layers for p in (layer.weight, layer.bias)]
        self._low = [torch.empty_like(p, dtype=dtype, requires_grad=False) for p in self._masters]
        for layer, *low in zip(self._layers, self._low[::2], self._low[1::2], strict=True):
            layer.low = tuple(low)
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        torch._foreach_copy_(self._low, self._masters)

    def drop(self) -> None:
        """Remove the copies; autocast casts the weights again."""
        for layer in self._layers:
            layer.low = None
