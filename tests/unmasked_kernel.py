"""A kernel that reads the next block of its input too, and ignores what it read."""

import triton
import triton.language as tl


@triton.jit
def copy_with_a_look_ahead(x_ptr, y_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)
    ahead = tl.load(x_ptr + N + offs)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs) + tl.where(offs < N, 0.0, ahead))
