"""attention: separate q, k, v without padding, as in published benchmarks, and packed with real lengths."""

from benchmarks.harness.cases import FLOPS, Call, cases
from benchmarks.harness.inputs import CUDA, Size, by_name
from benchmarks.rivals.attention import RIVALS
from electra_fast.config import ElectraConfig

small, base, large = ElectraConfig.small, ElectraConfig.base, ElectraConfig.large


def generator(preset):
    return lambda: preset().for_generator()


if CUDA:
    OTHERS = by_name(
        Size("small 128x128, no dropout", 128, 128, small, dropout=0.0),
        Size("base 256x512, no dropout", 256, 512, base, dropout=0.0),
        Size("small generator 128x128", 128, 128, generator(small)),
        Size("base generator 256x512", 256, 512, generator(base)),
        Size("large 64x512", 64, 512, large),
        Size("small 128x128, packed", 128, 128, small, packed=True),
        Size("base 256x512, packed", 256, 512, base, packed=True),
    )
else:
    OTHERS = by_name(Size("small 16x128, packed", 16, 128, small, packed=True))


@cases(value=30, sizes=OTHERS, rivals=RIVALS, forward=CUDA)
def bench_attention(make):
    H, D = make.config.heads, make.config.hidden // make.config.heads
    bounds = make.bounds() if make.size.packed else {}
    T = bounds["cu_seqlens"][-1].item() if bounds else None
    shape = (T, H, D) if bounds else (make.B, make.L, H, D)
    q, k, v = (make.normal(*shape) for _ in range(3))
    pairs = bounds["cu_seqlens"].long().diff().square().sum().item() if bounds else make.B * make.L**2
    size = q.numel() * q.element_size()
    product = 2 * H * pairs * D
    return Call(
        {"q": q, "k": k, "v": v, **bounds, **make.dropout(3)},
        gradients=("q", "k", "v"),
        unit=FLOPS,
        forward=2 * product,  # q k^T and p v
        backward=5 * product,  # q k^T again, and the gradients of p, q, k and v
        moved=(4 * size, 8 * size),  # q, k, v, o; these and their gradients
    )
