"""Helpers of more than one kernel."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
LOG2E = tl.constexpr(1.4426950408889634)  # exp(x) = exp2(LOG2E x), and exp2 is one instruction


@triton.jit
def dot(a, b, acc):
    """Return acc + a b, accumulated in float32; float32 operands keep 22 bits, by three TF32 products."""
    if INTERPRETED:  # the interpreter multiplies the raw bits of bfloat16
        return acc + tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, acc, input_precision="tf32x3")


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """Return float32 x in dtype, rounded to nearest."""
    if INTERPRETED and dtype == tl.bfloat16:  # the interpreter truncates
        bits = x.to(tl.uint32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def keep(rng_ptr, dropout_stream, row, column, threshold, COLUMNS: tl.constexpr):
    """Return dropout's bool mask of the rows `row` and of COLUMNS columns from `column` on.

    `column` and COLUMNS are multiples of 32. Four Philox calls cover 32 columns of a row: column c has call
    (c % 8) // 2, word (c // 8) % 4, half c % 2 (`electra_fast.philox`). Each call is computed once, and its
    bits are then permuted into column order.
    """
    call = (column // 8 + tl.arange(0, COLUMNS // 8)).to(tl.uint32)[None, :]
    step = tl.load(rng_ptr + 1).to(tl.uint32)
    row, dropout_stream = row.to(tl.uint32)[:, None], dropout_stream.to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(tl.load(rng_ptr), call, row, step, dropout_stream, n_rounds=7)
    word = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(row.shape[0], COLUMNS // 32, 4, 2, 2)
    kept = tl.join((word & 0xFFFF) >= threshold, (word >> 16) >= threshold)
    return kept.permute(0, 1, 3, 4, 2, 5).reshape(row.shape[0], COLUMNS)


def architecture() -> int:
    """Return the compute capability that a launch is compiled for, 90 for 9.0."""
    if INTERPRETED:
        return 90
    active = triton.runtime.driver.active
    return _architecture(active, active.get_current_device())


@functools.cache
def _architecture(active, device: int) -> int:
    return active.get_current_target().arch


# Triton's own cdiv and next_power_of_2 take 2 us on the host.
def cdiv(a: int, b: int) -> int:
    """Return a / b, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """Return the smallest power of two that is at least n, which is 1 or more."""
    return 1 << (n - 1).bit_length()


def dropout_arguments(p: float, rng: Tensor | None, dropout_stream: int) -> tuple:
    """Return a kernel's rng_ptr, threshold, keep_scale and dropout_stream for dropout p.

    With p = 0 the kernel has no rng_ptr and draws nothing.
    """
    return rng if p > 0 else None, round(p * 65536), 1 / (1 - p), dropout_stream


def refuse_float64(op: str, name: str, x: Tensor) -> None:
    """Raise for float64, which would lose digits: the Triton kernels compute in float32."""
    if x.dtype == torch.float64:
        raise TypeError(
            f"{op}: {name} must be float32, float16 or bfloat16 for the Triton kernel, got float64; "
            f"use electra_fast.reference.{op}"
        )
