"""attention: separate q, k, v without padding, as in published benchmarks, and packed with real lengths."""

import functools

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.harness.cases import FLOPS, Call, cases
from benchmarks.harness.inputs import CUDA, Size, by_name
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


def sdpa(backend, q, k, v, *, dropout=0.0, rng=None, stream=0, cu_seqlens=None, max_seqlen=None):
    """torch's attention, forced to use one of its kernels."""
    if cu_seqlens is not None:
        raise ImportError("torch's kernels do not support packed batches; `torch` pads them")
    with sdpa_kernel(backend):
        heads = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(*heads, dropout_p=dropout).transpose(1, 2)


@functools.cache
def compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def flex(q, k, v, *, dropout=0.0, rng=None, stream=0, cu_seqlens=None, max_seqlen=None):
    if dropout > 0 or cu_seqlens is not None:
        raise ImportError("FlexAttention has no dropout, and needs a block mask per packed batch")
    return compiled_flex()(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def flash_attn(q, k, v, *, dropout=0.0, rng=None, stream=0, cu_seqlens=None, max_seqlen=None):
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    if cu_seqlens is None:
        return flash_attn_func(q, k, v, dropout)
    bounds = (cu_seqlens.int(), cu_seqlens.int(), max_seqlen, max_seqlen)
    return flash_attn_varlen_func(q, k, v, *bounds, dropout)


BACKENDS = {
    "sdpa_flash": SDPBackend.FLASH_ATTENTION,
    "sdpa_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa_math": SDPBackend.MATH,
}
RIVALS = {name: functools.partial(sdpa, backend) for name, backend in BACKENDS.items()}
RIVALS |= {"flex": flex, "flash_attn": flash_attn}


@cases(value=30, sizes=OTHERS, rivals=RIVALS if CUDA else None, forward=CUDA)
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
