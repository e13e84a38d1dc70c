"""attention: q, k, v apart and no padding, the setting of published numbers."""

from benchmarks.cases import FLOPS, Call, cases


@cases(value=30)
def bench_attention(make):
    H, D = make.config.heads, make.config.hidden // make.config.heads
    q, k, v = (make.normal(make.B, make.L, H, D) for _ in range(3))
    product = 2 * make.B * H * make.L**2 * D
    return Call(
        {"q": q, "k": k, "v": v, **make.site(3)},
        gradients=("q", "k", "v"),
        unit=FLOPS,
        forward=2 * product,  # q k^T and p v
        backward=5 * product,  # q k^T again, and the gradients of p, q, k and v
    )
