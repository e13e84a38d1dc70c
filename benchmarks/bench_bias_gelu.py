"""bias_gelu, between the two products of a feed-forward block."""

from benchmarks.harness.cases import BYTES, Call, cases


@cases(value=60)
def bench_bias_gelu(make):
    F = make.config.ffn
    x, bias = make.normal(make.B, make.L, F), make.normal(F)
    return Call(
        {"x": x, "bias": bias},
        gradients=("x", "bias"),
        unit=BYTES,
        forward=2 * x.nbytes,  # read x, write y
        backward=3 * x.nbytes,  # read x and dy, write dx
    )
