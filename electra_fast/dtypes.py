"""The dtypes of the definitions: the one of the arithmetic, and the one of autocast."""

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """Return x in the dtype of the arithmetic: float64 stays, every other dtype becomes float32."""
    return x if x.dtype == torch.float64 else x.float()


def wide_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that `wide` gives x."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors in the autocast dtype if autocast is enabled on their device, else unchanged."""
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):  # "meta" has no autocast state
        return tensors
    return tuple(x.to(torch.get_autocast_dtype(device)) for x in tensors)
