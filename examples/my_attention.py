"""Your own attention, checked and timed: replace the body of `attention` by a call of your kernel.

    python -m electra_fast check examples.my_attention:attention --op attention
    python -m benchmarks --only attention --provider mine=examples.my_attention:attention

The first command compares results and gradients with the definition in float64: every dtype, masks, odd and
empty sizes, other memory layouts. The second one checks the arguments that are timed, and times them in the
same rounds as the kernels of electra_fast and plain PyTorch. Cases with arguments that your function lacks,
here `dropout` and `cu_seqlens`, are left out by name, and so are those for which it raises
NotImplementedError. If you write the backward pass yourself, call your kernels from a
torch.autograd.Function.

This body is an online softmax in plain PyTorch: it reads the keys in blocks and keeps, for each query, the
largest score, the sum of the exponentials and the weighted sum of the values. So no [L, L] matrix exists in
the forward pass, as in FlashAttention. Autograd makes the backward pass and keeps the scores for it.
"""

import torch
from torch import Tensor

BLOCK = 64  # keys per block
LOWEST = torch.finfo(torch.float32).min  # the score of a hidden key; -inf - -inf would be NaN


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Return softmax(scale * q k^T) v, ``[B, L, H, D]``; 0 for a query without a visible key.

    Args:
        q: ``[B, L, H, D]``, any float dtype; the sums are float32.
        k, v: ``[B, K, H, D]``.
        key_mask: bool ``[B, K]``, True where a key is visible.
        causal: a query sees no later key; the last query is aligned with the last key.
        scale: defaults to 1 / sqrt(D).
    """
    (B, L, H, D), K = q.shape, k.shape[1]
    if L == 0 or K == 0:
        return q * 0 + (k.sum() + v.sum()) * 0  # a gradient for each
    queries = q.float().transpose(1, 2) * (D**-0.5 if scale is None else scale)
    keys, values = (x.float().transpose(1, 2) for x in (k, v))  # [B, H, K, D]
    position = torch.arange(K, device=q.device)
    last = position[K - L :, None] if causal else K  # the last key that a query sees
    largest = queries.new_full((B, H, L, 1), LOWEST)
    total, o = torch.zeros_like(largest), torch.zeros_like(queries)
    for start in range(0, K, BLOCK):
        block = slice(start, start + BLOCK)
        visible = position[block] <= last
        visible = visible if key_mask is None else visible & key_mask[:, None, None, block]
        s = (queries @ keys[:, :, block].transpose(2, 3)).masked_fill(~visible, LOWEST)
        larger = torch.maximum(largest, s.detach().amax(-1, keepdim=True))
        p = (s - larger).exp().masked_fill(~visible, 0)
        shrink = (largest - larger).exp()
        total = total * shrink + p.sum(-1, keepdim=True)
        o, largest = o * shrink + p @ values[:, :, block], larger
    return (o / total.masked_fill(total == 0, 1)).transpose(1, 2).to(q.dtype)
