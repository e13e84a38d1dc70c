"""linear: the first product of a feed-forward block, and its gradients."""

from benchmarks.harness.cases import FLOPS, Call, cases
from benchmarks.rivals.linear import RIVALS


@cases(value=20, rivals=RIVALS)
def bench_linear(make):
    W, F = make.config.hidden, make.config.ffn
    x, weight, bias = make.normal(make.B, make.L, W), make.normal(F, W, scale=0.02), make.normal(F)
    product, T = 2 * make.B * make.L * W * F, make.B * make.L
    moved = (T * (W + F) + F * W) * x.element_size()
    return Call(
        {"x": x, "weight": weight, "bias": bias},
        gradients=("x", "weight", "bias"),
        unit=FLOPS,
        forward=product,
        backward=2 * product,
        moved=(moved, 2 * moved),
    )
