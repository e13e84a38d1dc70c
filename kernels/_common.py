"""What more than one kernel uses."""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b, acc):
    """acc + a b with float32 accumulation; of float32 operands three products of TF32 keep 22 bits."""
    if INTERPRETED:  # the interpreter multiplies the raw bits of bfloat16
        return acc + tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, acc, input_precision="tf32x3")


def architecture() -> int:
    """Return the compute capability that a launch is compiled for, 90 for 9.0."""
    return 90 if triton.knobs.runtime.interpret else triton.runtime.driver.active.get_current_target().arch
