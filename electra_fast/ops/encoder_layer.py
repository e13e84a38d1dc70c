"""A whole layer of the encoder in one operator, for inference, from weights that were packed before.

    c = attention(x W_qkv + b)    h = LayerNorm(x + c W_out + b)
    f = gelu(h W_up + b)          y = LayerNorm(h + f W_down + b)

It is not one of the public ops: it has no gradient, and its weights are `pack`'s and not those of a module.
`electra_fast.inference` packs the weights of a module, keeps them and notices when they change.

In int8, weights have one scale per column, w = t p with p in -127 ... 127. Activations are quantised when
they are used, with one scale and one zero point per token, x = s (q - z) with q in 0 ... 255.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from electra_fast.dtypes import wide
from electra_fast.ops._operators import operator
from electra_fast.ops.attention import default_fwd as attention

DTYPES = (torch.float32, torch.bfloat16, torch.int8)  # of packed weights


def pack(weights: Sequence[Tensor], biases: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the weights of a linear layer, ``[N, K]`` in parts along N, in the layout of the kernel.

    Returns:
        panels: ``[P, K / p, C, p]``. A panel has C columns of weight^T; p rows, which are 4 bytes, are
            interleaved, as the instructions for products read them. Both axes are padded with 0. Without such
            instructions bfloat16 and int8 are stored as float32.
        columns: float32 ``[1, N]``, the bias; in int8 ``[3, N]``: the bias, t, and t times the sum of p.
    """
    weight = torch.cat([w.detach() for w in weights])
    columns = [torch.cat([b.detach().float() for b in biases])]
    if dtype == torch.int8:
        weight = weight.float()
        largest = weight.abs().amax(1)
        scale = torch.where(largest > 0, largest / 127, 1.0)
        weight = (weight / scale[:, None]).round_()
        columns += [scale, scale * weight.sum(1)]
    weight = weight.to(dtype if _has_products(dtype) else torch.float32)
    p = 4 // weight.element_size()
    C = 64 if p == 1 else 128  # measured: wider panels are slower in float32 and faster in the others
    N, K = weight.shape
    weight = F.pad(weight, (0, -K % (16 * p) if p > 1 else 0, 0, -N % C))
    return weight.unflatten(0, (-1, C)).unflatten(2, (-1, p)).transpose(1, 2).contiguous(), torch.stack(
        columns
    )


def _has_products(dtype: torch.dtype) -> bool:
    """Return whether oneDNN has instructions of this CPU for products of this dtype."""
    if dtype == torch.bfloat16:
        return torch.backends.mkldnn.is_available() and torch.cpu._is_avx512_bf16_supported()
    if dtype == torch.int8:
        return torch.backends.mkldnn.is_available() and torch.cpu._is_vnni_supported()
    return True


def _linear(x: Tensor, panels: Tensor, columns: Tensor) -> Tensor:
    """Return the product with packed weights in float32."""
    weight = panels.transpose(1, 2).flatten(2).flatten(0, 1)  # [N, K], padded
    weight = weight[: columns.shape[1], : x.shape[-1]].float()
    if len(columns) == 1:
        x = x.to(panels.dtype).float()
        return F.linear(x, weight, columns[0])
    bias, scale, shift = columns
    x = x.float()
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    s = (high - low) / 255
    inverse = torch.where(s > torch.finfo(torch.float32).tiny, 1 / s, 0)
    z = (-low * inverse).round()
    q = ((x * inverse).round() + z).clamp(0, 255)
    return s * (F.linear(q, weight) * scale - z * shift) + bias


def _default(x, weights, key_mask, cu_seqlens, max_seqlen, heads, scale, eps):
    qkv, qkv_columns, out, out_columns, *norm, up, up_columns, down, down_columns, w, b = weights
    width = x.shape[-1:]
    dtype = torch.bfloat16 if qkv.dtype == torch.bfloat16 else x.dtype  # of attention
    h = _linear(x, qkv, qkv_columns).to(dtype).unflatten(-1, (3, heads, -1))
    options = (key_mask, cu_seqlens, max_seqlen, False, scale, 0.0, None, 0)
    context, _ = attention(*h.unbind(-3), *options)
    h = F.layer_norm(wide(x) + _linear(context.flatten(-2), out, out_columns), width, *norm, eps)
    f = F.gelu(_linear(h, up, up_columns))
    return F.layer_norm(h + _linear(f, down, down_columns), width, w, b, eps).to(x.dtype)


def _default_fingerprint(weights):
    versions = ((x.data_ptr(), 0 if x.is_inference() else x._version) for x in weights)
    return hash((*versions, *(value for x in weights for value in _samples(x))))


def _samples(x: Tensor, count: int = 32) -> list[float]:
    """Return `count` values, evenly spaced along each axis."""
    if x.numel() == 0:
        return []
    i = torch.arange(count)
    return x[tuple(i * size // count for size in x.shape)].tolist()


encoder_layer = operator(
    "encoder_layer(Tensor x, Tensor[] weights, Tensor? key_mask, Tensor? cu_seqlens, SymInt max_seqlen, "
    "int heads, float scale, float eps) -> Tensor",
    default=_default,
    fake=lambda x, *_: torch.empty_like(x),
)
# A number that changes when weights are replaced (their address) or written in place (their version). A write
# through `.data` changes neither, so 32 values of each weight are read too. They see a change of a whole
# weight or of a large part of it; a change of a few elements through `.data` can stay unseen. One value of
# each row and column took 100 us per layer, a seventh of a layer's time with 16 tokens.
fingerprint = operator(
    "fingerprint(Tensor[] weights) -> int",
    default=_default_fingerprint,
    fake=lambda weights: 0,
)
