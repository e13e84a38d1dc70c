"""Uninitialized memory with known contents, and with guards around it."""

import contextlib
import math

import torch
from torch.utils._python_dispatch import TorchDispatchMode

MARGIN = 64  # elements before and after each tensor; a multiple of every vector width
aten = torch.ops.aten


class _Guard(TorchDispatchMode):
    def __init__(self, poison: float, who: str):
        super().__init__()
        self.poison, self.who, self.buffers = poison, who, []
        self.integer = 77 if math.isnan(poison) else 44  # for integer tensors; odd means True

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function not in (
            aten.empty.memory_format,
            aten.empty_like.default,
            aten.new_empty.default,
            aten.empty_strided.default,
        ):
            return result
        value = self.poison if result.dtype.is_floating_point else self.integer
        value = value % 2 == 1 if result.dtype == torch.bool else value
        buffer = torch.full((result.numel() + 2 * MARGIN,), value, dtype=result.dtype, device=result.device)
        self.buffers.append((buffer, value))
        return buffer[MARGIN : MARGIN + result.numel()].as_strided(result.shape, result.stride(), MARGIN)

    def check(self):
        for buffer, value in self.buffers:
            for edge in (buffer[:MARGIN], buffer[-MARGIN:]):
                intact = edge.isnan().all() if math.isnan(value) else (edge == value).all()
                size = buffer.numel() - 2 * MARGIN
                if not intact:
                    raise AssertionError(f"{self.who} wrote outside of a tensor of {size} {buffer.dtype}")


@contextlib.contextmanager
def guarded_memory(poison: float = math.nan, who: str = "a kernel"):
    """Fill uninitialized tensors with `poison`, and raise AssertionError for a write outside of them.

    A result that differs between NaN and another poison was read before it was written. Memory that compiled
    code allocates itself is not guarded. `who` is the subject of the message.
    """
    guard = _Guard(poison, who)
    with guard:
        yield
    guard.check()
