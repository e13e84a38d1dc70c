"""`attention` of other libraries: torch's kernels by name, FlexAttention, and FlashAttention 2 to 4.

`torch` in the results is SDPA as a user calls it, and the results name the kernel that it chooses. Only SDPA
and FlashAttention-2 have dropout.
"""

import functools
import importlib

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.rivals import gpu, needs, package, torch_has


def sdpa(backend, q, k, v, *, dropout=0.0, rng=None, stream=0, cu_seqlens=None, max_seqlen=None):
    """torch's attention, forced to use one of its kernels."""
    if cu_seqlens is not None:
        raise ImportError("has no packed batches, which `torch` pads")
    with sdpa_kernel(backend):
        heads = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(*heads, dropout_p=dropout).transpose(1, 2)


def bounds(q: Tensor, cu_seqlens: Tensor | None, max_seqlen: int | None) -> tuple[Tensor, int]:
    """Return the bounds of packed sequences and the longest length, also for a batch without padding."""
    if cu_seqlens is not None:
        return cu_seqlens.int(), max_seqlen
    B, L = q.shape[:2]
    return torch.arange(0, (B + 1) * L, L, dtype=torch.int32, device=q.device), L


def refuse_dropout(dropout: float) -> None:
    if dropout > 0:
        raise ImportError("has no dropout, so it runs only at sizes without dropout")


def varlen(backend, q, k, v, *, dropout=0.0, rng=None, stream=0, cu_seqlens=None, max_seqlen=None):
    """torch's attention for packed sequences, forced to use one of its kernels."""
    from torch.nn.attention.varlen import varlen_attn

    refuse_dropout(dropout)
    shape, (cu, longest) = q.shape, bounds(q, cu_seqlens, max_seqlen)
    q, k, v = (x.reshape(-1, *x.shape[-2:]) for x in (q, k, v))
    with sdpa_kernel(backend):
        return varlen_attn(q, k, v, cu, cu, longest, longest).view(shape)


def varlen_selects_a_kernel() -> None:
    """Require a torch whose varlen_attn follows `sdpa_kernel`; before 2.15 it always runs flash."""
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 15):
        raise ImportError(f"varlen_attn of torch {torch.__version__} runs flash only")


@functools.cache
def compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def flex(backend, q, k, v, *, dropout=0.0, rng=None, stream=0, cu_seqlens=None, max_seqlen=None):
    """Compiled FlexAttention on one of its back ends."""
    refuse_dropout(dropout)
    if cu_seqlens is not None:
        raise ImportError("needs a block mask for each packed batch")
    heads = (x.transpose(1, 2) for x in (q, k, v))
    return compiled_flex()(*heads, kernel_options={"BACKEND": backend}).transpose(1, 2)


def flash(module, q, k, v, *, dropout=0.0, rng=None, stream=0, cu_seqlens=None, max_seqlen=None):
    """One of the versions of FlashAttention, all of which have the same two functions."""
    library, options = importlib.import_module(module), {"dropout_p": dropout}
    if module != "flash_attn":
        refuse_dropout(dropout)
        options = {}
    if cu_seqlens is None:
        o = library.flash_attn_func(q, k, v, **options)
    else:
        cu, longest = bounds(q, cu_seqlens, max_seqlen)
        options |= {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": longest, "max_seqlen_k": longest}
        o = library.flash_attn_varlen_func(q, k, v, **options)
    return o[0] if isinstance(o, tuple) else o  # some versions also return the log-sum-exp


def rival(function, choice, *requirements):
    return needs(*requirements)(functools.partial(function, choice))


has_varlen = torch_has("torch.nn.attention.varlen", "varlen_attn")
RIVALS = {
    "sdpa_flash": rival(sdpa, SDPBackend.FLASH_ATTENTION),
    "sdpa_efficient": rival(sdpa, SDPBackend.EFFICIENT_ATTENTION, gpu),
    "sdpa_cudnn": rival(sdpa, SDPBackend.CUDNN_ATTENTION, gpu),
    "sdpa_math": rival(sdpa, SDPBackend.MATH),
    "varlen_flash": rival(varlen, SDPBackend.FLASH_ATTENTION, gpu, has_varlen),
    "varlen_cudnn": rival(varlen, SDPBackend.CUDNN_ATTENTION, gpu, has_varlen, varlen_selects_a_kernel),
    "flex": rival(flex, "AUTO", gpu),
    "flex_flash": rival(flex, "FLASH", gpu, package("flash_attn.cute")),
    "flash_attn": rival(flash, "flash_attn", gpu, package("flash_attn")),
    "flash_attn_3": rival(flash, "flash_attn_interface", gpu, package("flash_attn_interface")),
    "flash_attn_4": rival(flash, "flash_attn.cute", gpu, package("flash_attn.cute")),
}
