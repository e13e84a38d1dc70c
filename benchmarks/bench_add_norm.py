"""add_norm, which ends both halves of a layer."""

from benchmarks.harness.cases import BYTES, Call, cases
from benchmarks.rivals.add_norm import RIVALS


@cases(value=70, rivals=RIVALS)
def bench_add_norm(make):
    W = make.config.hidden
    x, residual = (make.normal(make.B, make.L, W) for _ in range(2))
    norm = {"weight": make.normal(W, scale=0.1, mean=1.0), "bias": make.normal(W, scale=0.1)}
    kept = x.nbytes if make.config.dropout else 0  # then x and residual have different gradients
    return Call(
        {"x": x, "residual": residual, **norm, "eps": make.config.eps, **make.dropout(4)},
        gradients=("x", "residual", "weight", "bias"),
        unit=BYTES,
        forward=3 * x.nbytes,  # read x and residual, write y
        backward=4 * x.nbytes + kept,  # read x, residual and dy, write dx
    )
