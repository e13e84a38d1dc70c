"""The ops as a PyTorch user writes them today: the baseline of benchmarks and the scale of the error budget.

The signatures are those of `electra_fast.ops`, the arithmetic is in the tensors' own dtype. Dropout and
sampling draw from torch's default generator, which is faster than computing Philox in PyTorch. Functions with
dropout have an argument `drop`; `philox.drop` makes the mask that the kernels make, so that results can be
compared with dropout on.
"""

import torch
import torch.nn.functional as F

from electra_fast.dtypes import autocast
from electra_fast.packing import attention_padding, token_positions
from electra_fast.reference import (
    Embedded,
    MaskedTokens,
    MLMHead,
    NCELoss,
    ReplacedTokens,
    RTDLoss,
    attention_rows,
)


def _torch_dropout(x, p, rng, stream, rows=None):
    return F.dropout(x, p)


def mask_tokens(
    ids,
    candidates,
    rng,
    *,
    mask_id,
    mask_prob=0.15,
    keep_prob=0.15,
    key_mask=None,
    cu_seqlens=None,
    max_seqlen=None,
):
    """Mask the k candidates with the largest of one uniform each, by top-k over the padded batch."""
    if cu_seqlens is not None:
        raise NotImplementedError(
            "baseline.mask_tokens: a packed batch has no plain implementation without a loop"
        )
    B, L = ids.shape
    N = max(1, round(L * mask_prob))
    candidates = candidates if key_mask is None else candidates & key_mask
    n = torch.full((B,), L, device=ids.device) if key_mask is None else key_mask.sum(1)
    k = (n * mask_prob).round().clamp(min=1).minimum(candidates.sum(1))
    score = torch.rand(B, L, device=ids.device).masked_fill(~candidates, -1)
    position = score.topk(N).indices
    used = torch.arange(N, device=ids.device) < k[:, None]
    position, order = position.masked_fill(~used, L).sort()
    used = used.gather(1, order)
    position = position.masked_fill(~used, 0)
    hidden = used & (torch.rand(B, N, device=ids.device) >= keep_prob)
    flat = (position + torch.arange(B, device=ids.device)[:, None] * L).masked_fill(~used, 0).flatten()
    masked = torch.cat([ids.flatten(), ids.new_zeros(1)])
    masked = masked.scatter(0, flat.masked_fill(~hidden.flatten(), B * L), mask_id)[:-1].view(B, L)
    targets = ids.gather(1, position).masked_fill(~used, 0).flatten()
    return MaskedTokens(masked, flat.to(ids.dtype), targets, used.flatten().float())


def embed(
    ids, type_ids, position_ids, word, position, type, norm_weight, norm_bias,
    *, eps, dropout=0.0, rng=None, stream=0, cu_seqlens=None, padding_idx=None, return_word=False,
    drop=_torch_dropout,
):  # fmt: skip
    type_ids = torch.zeros_like(ids) if type_ids is None else type_ids
    position_ids = token_positions(ids, cu_seqlens) if position_ids is None else position_ids
    words = F.embedding(ids, word, padding_idx)
    x = words + F.embedding(position_ids, position) + F.embedding(type_ids, type)
    y = F.layer_norm(x, x.shape[-1:], norm_weight.to(x.dtype), norm_bias.to(x.dtype), eps)
    y = drop(y, dropout, rng, stream) if dropout else y
    y = y.to(autocast(word[:0])[0].dtype)
    return Embedded(y, word) if return_word else y


def linear(x, weight, bias=None, *, low_weight=None, low_bias=None):
    """Cast in each call, as autocast does; low-precision copies only give their dtype."""
    dtype = x.dtype if low_weight is None else low_weight.dtype
    bias = bias if bias is None or low_weight is None else bias.to(dtype)
    return F.linear(x.to(dtype), weight if low_weight is None else weight.to(dtype), bias)


class _SoftmaxThenSum(torch.autograd.Function):
    """(softmax(s) * keep) v with the gradient of attention kernels: rowsum(dO O) instead of rowsum(P dP).

    The two are equal in exact arithmetic and round differently if almost all of a row is on one key.
    """

    @staticmethod
    def forward(ctx, s, v, visible, keep):
        p = s.masked_fill(~visible, torch.finfo(s.dtype).min).softmax(-1).masked_fill(~visible, 0)
        o = (p * keep) @ v
        ctx.save_for_backward(p, v, keep, o)
        return o

    @staticmethod
    def backward(ctx, do):
        p, v, keep, o = ctx.saved_tensors
        dp = (do @ v.mT) * keep
        return p * (dp - (do * o).sum(-1, keepdim=True)), (p * keep).mT @ do, None, None


def _padded_attention(q, k, v, key_mask, ahead, scale, dropout, rng, stream, t, drop):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    mask = None if key_mask is None else key_mask[:, None, None, :]
    if drop is _torch_dropout:
        # SDPA aligns the first query with the first key if it is causal.
        causal = mask is None and isinstance(ahead, int) and ahead == 0
        if ahead is not None and not causal:
            earlier = _earlier(q, k, ahead)
            mask = earlier if mask is None else mask & earlier
        o = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal, scale=scale)
    else:
        s = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
        visible = torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device)
        visible = (visible if ahead is None else _earlier(q, k, ahead)) & (True if mask is None else mask)
        keep = drop(torch.ones_like(s), dropout, rng, stream, attention_rows(q.transpose(1, 2), t))
        o = _SoftmaxThenSum.apply(s, v, visible, keep)
    return o.transpose(1, 2)


def _earlier(q, k, ahead):
    """Return the pairs whose key is not later than its query, bool ``[L, K]`` or ``[B, 1, L, K]``."""
    query, key = (torch.arange(x.shape[2], device=x.device) for x in (q, k))
    ahead = ahead if isinstance(ahead, int) else ahead[:, None, None, None]
    return key <= query[:, None] + ahead


def attention(
    q, k, v, *, key_mask=None, cu_seqlens=None, max_seqlen=None, causal=False, scale=None,
    dropout=0.0, rng=None, stream=0, cu_seqlens_k=None, max_seqlen_k=None, drop=_torch_dropout,
):  # fmt: skip
    q, k, v = autocast(q, k, v)
    options = (scale, dropout, rng, stream)
    if cu_seqlens is None:
        ahead = k.shape[1] - q.shape[1] if causal else None
        return _padded_attention(q, k, v, key_mask, ahead, *options, None, drop)
    bounds = (cu_seqlens, max_seqlen, cu_seqlens_k, max_seqlen_k)
    pad = attention_padding(len(q), len(k), *bounds, causal)
    q, k, v = q[pad.queries.t], k[pad.keys.t], v[pad.keys.t]
    o = _padded_attention(q, k, v, pad.keys.mask, pad.ahead, *options, pad.queries.t, drop)
    return o[pad.queries.b, pad.queries.l]


def attention_qkv(qkv, **options):
    return attention(*qkv.unbind(-3), **options)


def add_norm(x, residual, weight, bias, *, eps, dropout=0.0, rng=None, stream=0, drop=_torch_dropout):
    z = drop(x, dropout, rng, stream) if dropout else x
    z = z if residual is None else z + residual
    return F.layer_norm(z, z.shape[-1:], weight.to(z.dtype), bias.to(z.dtype), eps)


def bias_gelu(x, bias):
    return F.gelu(x + bias.to(x.dtype))


def mlm_head(
    x, table, bias, targets, weights, rng, *, temperature=1.0, disallow_correct=False, return_table=False
):
    """Compute all logits, F.cross_entropy, and a draw by the Gumbel arg-max (google-research/electra)."""
    original_table = table if return_table else None
    x, table = autocast(x, table)
    unused = weights == 0
    logits = F.linear(x.masked_fill(unused[:, None], 0), table, bias.to(x.dtype)).float()
    target = targets.long().masked_fill(unused, 0)
    nll = F.cross_entropy(logits, target, reduction="none")
    loss = (weights / weights.sum() * nll).sum()
    with torch.no_grad():
        noisy = logits / temperature - torch.empty_like(logits).exponential_().log()
        if disallow_correct:
            noisy = noisy.scatter(1, target[:, None], -torch.inf)
        samples = noisy.argmax(-1).to(targets.dtype)
        correct = (weights * (logits.argmax(-1) == target)).sum()
        lse = logits.logsumexp(-1).masked_fill(unused, 0)
    return MLMHead(loss, samples, correct, lse, original_table)


def replace_tokens(ids, positions, samples, weights):
    index = positions.long().masked_fill(weights == 0, ids.numel())
    x = torch.cat([ids.flatten(), ids.new_zeros(1)]).scatter(0, index, samples)[:-1].view_as(ids)
    return ReplacedTokens(x, x != ids)


def rtd_loss(logits, replaced, weights=None):
    weights = torch.ones_like(logits, dtype=torch.float32) if weights is None else weights
    y = replaced.to(logits.dtype)
    nll = F.binary_cross_entropy_with_logits(logits, y, reduction="none")
    loss = (weights / weights.sum() * nll).sum()
    with torch.no_grad():
        guess = logits > 0
        cells = (guess & replaced, guess & ~replaced, ~guess & replaced, ~guess & ~replaced)
        counts = torch.stack([(weights * cell).sum() for cell in cells])
    return RTDLoss(loss, counts)


def nce_loss(energies, log_q, noise, weights=None, *, log_odds=0.0):
    return NCELoss(*rtd_loss(energies + log_q.detach() + log_odds, noise, weights))
