"""`attention` of other libraries: torch's kernels by name, FlexAttention, and FlashAttention 2 to 4.

`torch` in the results is SDPA as a user calls it, and the results name the kernel that it chooses. Only SDPA
and FlashAttention-2 have dropout.
"""

import functools
import importlib
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.rivals import gpu, needs, package, torch_has


class Options(NamedTuple):
    """The arguments of `attention` after q, k and v, as far as the benchmarks use them."""

    dropout: float = 0.0
    rng: Tensor | None = None
    stream: int = 0
    causal: bool = False
    cu_seqlens: Tensor | None = None
    max_seqlen: int | None = None
    cu_seqlens_k: Tensor | None = None
    max_seqlen_k: int | None = None

    def bounds(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, int, int]:
        """Return the bounds of queries and of keys, and their longest lengths, for a padded batch too."""
        if self.cu_seqlens is None:
            (cu, L), (cu_k, K) = (_bounds(x) for x in (q, k))
            return cu, cu_k, L, K
        own = self.cu_seqlens_k is not None
        cu_k, K = (self.cu_seqlens_k, self.max_seqlen_k) if own else (self.cu_seqlens, self.max_seqlen)
        return self.cu_seqlens.int(), cu_k.int(), self.max_seqlen, K


def _bounds(x: Tensor) -> tuple[Tensor, int]:
    B, L = x.shape[:2]
    return torch.arange(0, (B + 1) * L, L, dtype=torch.int32, device=x.device), L


def sdpa(backend, q, k, v, **options):
    """torch's attention, forced to use one of its kernels. A causal case has as many keys as queries."""
    options = Options(**options)
    if options.cu_seqlens is not None:
        raise ImportError("has no packed batches, which `torch` pads")
    with sdpa_kernel(backend):
        heads = (x.transpose(1, 2) for x in (q, k, v))
        settings = {"dropout_p": options.dropout, "is_causal": options.causal}
        return F.scaled_dot_product_attention(*heads, **settings).transpose(1, 2)


def refuse_dropout(dropout: float) -> None:
    if dropout > 0:
        raise ImportError("has no dropout, so it runs only at sizes without dropout")


def varlen(backend, q, k, v, **options):
    """torch's attention for packed sequences, forced to use one of its kernels."""
    from torch.nn.attention.varlen import varlen_attn

    options = Options(**options)
    refuse_dropout(options.dropout)
    shape, bounds = q.shape, options.bounds(q, k)
    settings = {"window_size": (-1, 0)} if options.causal else {}
    q, k, v = (x.reshape(-1, *x.shape[-2:]) for x in (q, k, v))
    with sdpa_kernel(backend):
        return varlen_attn(q, k, v, *bounds, **settings).view(shape)


def varlen_selects_a_kernel() -> None:
    """Require a torch whose varlen_attn follows `sdpa_kernel`; before 2.15 it always runs flash."""
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 15):
        raise ImportError(f"varlen_attn of torch {torch.__version__} runs flash only")


@functools.cache
def compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


@functools.cache
def causal_blocks(L: int, K: int, device: torch.device):
    """Return FlexAttention's mask of the keys that are not later than the query."""
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(lambda b, h, query, key: key <= query + K - L, None, None, L, K, device=device)


def flex(backend, q, k, v, **options):
    """Compiled FlexAttention on one of its back ends."""
    options = Options(**options)
    refuse_dropout(options.dropout)
    if options.cu_seqlens is not None:
        raise ImportError("needs a block mask for each packed batch")
    mask = causal_blocks(q.shape[1], k.shape[1], q.device) if options.causal else None
    heads = (x.transpose(1, 2) for x in (q, k, v))
    return compiled_flex()(*heads, block_mask=mask, kernel_options={"BACKEND": backend}).transpose(1, 2)


def flash(module, q, k, v, **options):
    """One of the versions of FlashAttention, all of which have the same two functions."""
    library, options = importlib.import_module(module), Options(**options)
    settings = {"causal": True} if options.causal else {}
    if module == "flash_attn":
        settings["dropout_p"] = options.dropout
    else:
        refuse_dropout(options.dropout)
    if options.cu_seqlens is None:
        o = library.flash_attn_func(q, k, v, **settings)
    else:
        names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
        settings |= dict(zip(names, options.bounds(q, k), strict=True))
        o = library.flash_attn_varlen_func(q, k, v, **settings)
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
