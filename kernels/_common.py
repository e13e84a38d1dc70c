"""What more than one kernel uses."""

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b, acc):
    """acc + a b with float32 accumulation; of float32 operands three products of TF32 keep 22 bits."""
    if INTERPRETED:  # the interpreter multiplies the raw bits of bfloat16
        return acc + tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, acc, input_precision="tf32x3")


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """Return float32 x in dtype, rounded to the nearest."""
    if INTERPRETED and dtype == tl.bfloat16:  # the interpreter cuts bits off
        bits = x.to(tl.uint32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def keep(rng_ptr, stream, row, column, threshold, COLUMNS: tl.constexpr):
    """Return dropout's bool mask of the rows `row` and of COLUMNS columns from `column` on.

    Both are multiples of 32, for which there are four calls of Philox: call (column % 8) // 2, word
    (column // 8) % 4, half column % 2 (`electra_fast.philox`). Each call is made once, and its bits are then
    permuted into the order of the columns.
    """
    call = (column // 8 + tl.arange(0, COLUMNS // 8)).to(tl.uint32)[None, :]
    step = tl.load(rng_ptr + 1).to(tl.uint32)
    row, stream = row.to(tl.uint32)[:, None], stream.to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(tl.load(rng_ptr), call, row, step, stream, n_rounds=7)
    word = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(row.shape[0], COLUMNS // 32, 4, 2, 2)
    kept = tl.join((word & 0xFFFF) >= threshold, (word >> 16) >= threshold)
    return kept.permute(0, 1, 3, 4, 2, 5).reshape(row.shape[0], COLUMNS)


def architecture() -> int:
    """Return the compute capability that a launch is compiled for, 90 for 9.0."""
    return 90 if triton.knobs.runtime.interpret else triton.runtime.driver.active.get_current_target().arch


def dropout_arguments(p: float, rng: Tensor | None, stream: int) -> dict:
    """Return a kernel's arguments for dropout p; without an rng it draws nothing."""
    rng = rng if p > 0 else None
    return {"rng_ptr": rng, "threshold": round(p * 65536), "scale": 1 / (1 - p), "site": stream}


def refuse_float64(op: str, name: str, x: Tensor) -> None:
    """Raise where the Triton kernel of an op, which computes in float32, would lose digits."""
    if x.dtype == torch.float64:
        raise TypeError(
            f"{op}: {name} must be float32, float16 or bfloat16 for the Triton kernel, got float64; "
            f"electra_fast.reference.{op} takes it"
        )
