"""attention: separate q, k, v without padding, as in published benchmarks, and packed with real lengths.

Then as a decoder uses it: to an encoder's texts, causal, and one new token with those before it.
"""

from typing import Any

import torch.nn.functional as F

from benchmarks.harness.cases import FLOPS, Call, cases
from benchmarks.harness.inputs import CUDA, Size, by_name
from benchmarks.rivals.attention import RIVALS
from electra_fast.config import ElectraConfig

small, base, large = ElectraConfig.small, ElectraConfig.base, ElectraConfig.large


def generator(preset):
    return lambda: preset().for_generator()


def decoders(B: int) -> list[Size]:
    """Return the sizes of a decoder of titles of 32 tokens, for texts of 128."""
    return [
        Size(f"small {B}x32 to {B}x128", B, 128, small, queries=32),
        Size(f"small {B}x32 to {B}x128, packed", B, 128, small, queries=32, packed=True),
        Size(f"small {B}x128, causal", B, 128, small, causal=True),
        Size(f"small {B}x1 to {B}x128", B, 128, small, queries=1, dropout=0.0),
    ]


if CUDA:
    OTHERS = by_name(
        Size("small 128x128, no dropout", 128, 128, small, dropout=0.0),
        Size("base 256x512, no dropout", 256, 512, base, dropout=0.0),
        Size("small generator 128x128", 128, 128, generator(small)),
        Size("base generator 256x512", 256, 512, generator(base)),
        Size("large 64x512", 64, 512, large),
        Size("small 128x128, packed", 128, 128, small, packed=True),
        Size("base 256x512, packed", 256, 512, base, packed=True),
        *decoders(128),
    )
else:
    OTHERS = by_name(Size("small 16x128, packed", 16, 128, small, packed=True), *decoders(16))


def bounds(make) -> dict[str, Any]:
    """Return the bounds of a packed batch; its queries are at most `queries` per sequence."""
    found = make.bounds()
    if make.size.queries is None:
        return found
    lengths = found["cu_seqlens"].diff().clamp(max=make.size.queries)
    keys = {f"{name}_k": value for name, value in found.items()}
    return {"cu_seqlens": F.pad(lengths.cumsum(0), (1, 0)).int(), "max_seqlen": make.size.queries, **keys}


@cases(value=30, sizes=OTHERS, rivals=RIVALS, forward=True)
def bench_attention(make):
    H, D = make.config.heads, make.config.hidden // make.config.heads
    L, K = make.size.queries or make.L, make.L
    if make.size.packed:
        layout = bounds(make)
        cu, cu_k = layout["cu_seqlens"], layout.get("cu_seqlens_k", layout["cu_seqlens"])
        queries, keys = ((int(x[-1]), H, D) for x in (cu, cu_k))
        pairs = (cu.diff().long() * cu_k.diff()).sum().item()
    else:
        layout, queries, keys = {}, (make.B, L, H, D), (make.B, K, H, D)
        pairs = make.B * (L * (L + 1) // 2 if make.size.causal else L * K)
    if make.size.causal:
        layout["causal"] = True
    q, k, v = (make.normal(*shape) for shape in (queries, keys, keys))
    size = (q.numel() + k.numel()) * q.element_size()
    product = 2 * H * pairs * D
    return Call(
        {"q": q, "k": k, "v": v, **layout, **make.dropout(3)},
        gradients=("q", "k", "v"),
        unit=FLOPS,
        forward=2 * product,  # q k^T and p v
        backward=5 * product,  # q k^T again, and the gradients of p, q, k and v
        moved=(2 * size, 4 * size),  # q, k, v, o; these and their gradients
    )
