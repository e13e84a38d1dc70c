"""attention_qkv as the encoder calls it: q, k, v in one tensor, with the padding of a real batch."""

from benchmarks.harness.cases import FLOPS, Call, cases


@cases(value=90)
def bench_attention_qkv(make):
    H, D = make.config.heads, make.config.hidden // make.config.heads
    qkv = make.normal(make.B, make.L, 3, H, D)
    size = qkv.numel() // 3 * qkv.element_size()
    product = 2 * make.B * H * make.L**2 * D  # padding included, so skipped padding counts as speed
    return Call(
        {"qkv": qkv, "key_mask": make.batch().key_mask, **make.dropout(3)},
        gradients=("qkv",),
        unit=FLOPS,
        forward=2 * product,  # q k^T and p v
        backward=5 * product,  # q k^T again, and the gradients of p, q, k and v
        moved=(4 * size, 8 * size),  # q, k, v, o; these and their gradients
    )
