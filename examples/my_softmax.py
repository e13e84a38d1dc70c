"""A softmax in Triton with a planted fault: a load without a mask, whose surplus numbers are not used.

Its results are right, so no comparison finds the fault. On a GPU it may read memory that is not its own.
docs/check_your_kernel.md shows the check that finds it.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def _softmax(x_ptr, y_ptr, W, BLOCK_W: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    offs_w = tl.arange(0, BLOCK_W)
    in_w = offs_w < W
    x = tl.load(x_ptr + row * W + offs_w).to(tl.float32)  # the fault: mask=in_w is missing
    x = tl.where(in_w, x, float("-inf"))
    e = tl.exp(x - tl.max(x, axis=0))
    tl.store(y_ptr + row * W + offs_w, e / tl.sum(e, axis=0), mask=in_w)


def softmax(x: torch.Tensor) -> torch.Tensor:
    """Return the softmax over the last axis of x ``[T, W]``, without a gradient."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel():
        _softmax[(x.shape[0],)](x.contiguous(), y, x.shape[1], BLOCK_W=triton.next_power_of_2(x.shape[1]))
    return y


def reference(x: torch.Tensor) -> torch.Tensor:
    return x.softmax(-1)
