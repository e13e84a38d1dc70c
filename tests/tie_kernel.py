"""A kernel around the threshold search of `mask_tokens`, so that a test can hand it keys that tie."""

import triton
import triton.language as tl

from electra_fast.kernels.mask_tokens import _smallest


@triton.jit
def take_smallest(key_ptr, candidate_ptr, taken_ptr, k, N: tl.constexpr):
    offs = tl.arange(0, N)
    candidate = tl.load(candidate_ptr + offs) != 0
    key = tl.where(candidate, tl.load(key_ptr + offs).to(tl.uint32), 0xFFFFFFFF)
    tl.store(taken_ptr + offs, _smallest(key, candidate, k).to(tl.uint8))
