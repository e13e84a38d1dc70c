"""ELECTRA's mathematics in plain PyTorch: the definition that every kernel is tested against.

The functions are in the order of the paper (Clark et al. 2020, section 2) and have the signatures of
`electra_fast.ops`. Arithmetic is in float32, or in float64 for float64 inputs, for every storage dtype; a
result has the dtype of its first argument. Random decisions are integer functions of (seed, step, stream,
index), so other implementations must reproduce them exactly.

Axes: B sequences, L positions per sequence, T tokens in total, H heads, D head dim, W width, E embedding
dim, V vocabulary, M masked slots in total.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from electra_fast.dtypes import autocast, wide
from electra_fast.ids import legal_ids, rows_of
from electra_fast.packing import attention_padding, sequence_of, token_positions
from electra_fast.philox import MASKING, drop, philox, uniforms
from electra_fast.results import Embedded, MaskedTokens, MLMHead, NCELoss, ReplacedTokens, RTDLoss

# --- masking (section 2: m_i ~ unif{1, n}, x_masked = REPLACE(x, m, [MASK])) -------------------------------


def rate(probability: float) -> int:
    """Return ceil(probability * 2^32): counts are integers, the same on every backend."""
    return math.ceil(probability * 2**32)


def slot_count(ids: Tensor, mask_rate: int, cu_seqlens: Tensor | None) -> int:
    """Return M, the number of slots; it depends on shapes only, and is 0 without tokens."""
    if ids.numel() == 0:
        return 0
    if cu_seqlens is None:
        return ids.shape[0] * max(1, (ids.shape[1] * mask_rate + 2**31) >> 32)
    return ((mask_rate * ids.numel()) >> 32) + cu_seqlens.numel() - 1


def mask_tokens(
    ids: Tensor,
    candidates: Tensor,
    rng: Tensor,
    *,
    mask_id: int,
    mask_prob: float = 0.15,
    keep_prob: float = 0.15,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> MaskedTokens:
    """Mask k = min(c, max(1, round(n mask_prob))) of a sequence's c candidates, drawn without replacement."""
    P, T, device = rate(mask_prob), ids.numel(), ids.device
    M = slot_count(ids, P, cu_seqlens)
    candidates = candidates if key_mask is None else candidates & key_mask
    x, candidates, t = ids.flatten(), candidates.flatten(), torch.arange(T, device=device)

    # Sequence b begins at token start[b], has n[b] real tokens and uses the slots from base[b] on.
    if cu_seqlens is None:
        B, L = ids.shape
        sequence, start = t // max(L, 1), torch.arange(B, device=device) * L
        n = torch.full_like(start, L) if key_mask is None else key_mask.sum(dim=1)
        base = torch.arange(B, device=device) * (M // max(B, 1))
    else:
        start, n = cu_seqlens[:-1].long(), cu_seqlens.long().diff()
        sequence = sequence_of("mask_tokens", cu_seqlens, T, max_seqlen)
        base = (P * start >> 32) + torch.arange(start.shape[0], device=device)

    # Take the k candidates with the smallest words of their sequence; a stable sort orders ties by t.
    w0, w1, _, _ = philox(rng, torch.zeros_like(t), t, MASKING)
    order = ((sequence << 33) + w0.masked_fill(~candidates, 2**32)).argsort(stable=True)
    rank = torch.empty_like(t).scatter_(0, order, t) - start[sequence]
    c = torch.zeros_like(start).index_add_(0, sequence, candidates.long())
    k = torch.minimum(c, ((n * P + 2**31) >> 32).clamp(min=1))
    taken = rank < k[sequence]

    masked = x.masked_fill(taken & (w1 >= round(keep_prob * 2**32)), mask_id)
    before = F.pad(taken.cumsum(0), (1, 0))
    nth = before[:-1] - before[start][sequence]
    slot = (base[sequence] + nth).masked_fill(~taken, M)  # an extra slot M collects the other tokens
    fill = [torch.zeros(M + 1, dtype=d, device=device) for d in (ids.dtype, ids.dtype, torch.float32)]
    source = (t.to(ids.dtype), x, torch.ones_like(x, dtype=torch.float32))
    return MaskedTokens(
        masked.view_as(ids), *(f.scatter(0, slot, s)[:M] for f, s in zip(fill, source, strict=True))
    )


# --- the encoder (Devlin et al. 2019, post-LayerNorm) ------------------------------------------------------


def embedding_sum(ids, type_ids, position_ids, word, position, type, padding_idx=None) -> Tensor:
    """Return word[id] + position[position id] + type[type id], the input of the embedding's LayerNorm."""
    position_ids = token_positions(ids) if position_ids is None else position_ids
    type_ids = torch.zeros_like(ids) if type_ids is None else type_ids
    words = rows_of("embed", "ids", word, ids)
    if padding_idx is not None:
        words = torch.where((ids == padding_idx)[..., None], words.detach(), words)
    return (
        words
        + rows_of("embed", "position_ids", position, position_ids)
        + rows_of("embed", "type_ids", type, type_ids)
    )


def embed(
    ids: Tensor,
    type_ids: Tensor | None,
    position_ids: Tensor | None,
    word: Tensor,
    position: Tensor,
    type: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    *,
    eps: float,
    dropout: float = 0.0,
    rng: Tensor | None = None,
    stream: int = 0,
    cu_seqlens: Tensor | None = None,
    padding_idx: int | None = None,
    return_word: bool = False,
) -> Tensor | Embedded:
    """Return dropout(LayerNorm(embedding_sum)), and the word table with it if `return_word`."""
    (like,) = autocast(word[:0])
    position_ids = token_positions(ids, cu_seqlens) if position_ids is None else position_ids
    x = embedding_sum(ids, type_ids, position_ids, word, position, type, padding_idx)
    y = F.layer_norm(x, x.shape[-1:], norm_weight.to(x.dtype), norm_bias.to(x.dtype), eps)
    y = drop(y, dropout, rng, stream).to(like.dtype)
    return Embedded(y, word) if return_word else y


def default_scale(q: Tensor) -> float:
    """Return D ** -0.5, and 1 if D = 0, where all scores are 0."""
    return max(q.shape[-1], 1) ** -0.5


def attention_scores(
    q: Tensor, k: Tensor, key_mask: Tensor | None, ahead: int | Tensor | None, scale: float | None
):
    """Return (s, visible): scale * q k^T, ``[B, H, L, K]``, and the mask of the pairs that count.

    The other scores are the lowest finite number. With -inf a row without a visible key would become NaN, and
    its gradient too.

    Args:
        ahead: the number of keys minus that of queries, of the batch or of each sequence ``[B]``, if a query
            sees no later key; None: it sees them all.
    """
    visible = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device)
    if isinstance(ahead, Tensor):
        ahead = ahead[:, None, None, None]
    if ahead is not None:
        query, key = (torch.arange(x.shape[1], device=q.device) for x in (q, k))
        visible = key <= query[:, None] + ahead
    visible = visible if key_mask is None else visible & key_mask[:, None, None, :]
    s = torch.einsum("blhd,bmhd->bhlm", wide(q), wide(k)) * (default_scale(q) if scale is None else scale)
    return s.masked_fill(~visible, torch.finfo(s.dtype).min), visible


def attention_rows(q: Tensor, t: Tensor | None) -> Tensor:
    """Return dropout's row t*H + h of each query and head, ``[B, H, L]``."""
    B, L, H, _ = q.shape
    t = torch.arange(B * L, device=q.device).view(B, L) if t is None else t
    return t[:, None, :] * H + torch.arange(H, device=q.device)[:, None]


def padded_attention(q, k, v, key_mask, ahead, scale, dropout, rng, stream, t=None) -> Tensor:
    """Return `attention` of ``[B, L, H, D]``; t ``[B, L]`` is the index of each query in its packed batch."""
    with torch.autocast(q.device.type, enabled=False):
        s, visible = attention_scores(q, k, key_mask, ahead, scale)
        p = drop(s.softmax(-1).masked_fill(~visible, 0), dropout, rng, stream, attention_rows(q, t))
        return torch.einsum("bhlm,bmhd->blhd", p, wide(v)).to(q.dtype)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    causal: bool = False,
    scale: float | None = None,
    dropout: float = 0.0,
    rng: Tensor | None = None,
    stream: int = 0,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_k: int | None = None,
) -> Tensor:
    """Return dropout(softmax(scale * q k^T)) v over the visible keys; 0 for a query without visible keys."""
    q, k, v = autocast(q, k, v)
    options = (scale, dropout, rng, stream)
    if cu_seqlens is None:
        return padded_attention(q, k, v, key_mask, k.shape[1] - q.shape[1] if causal else None, *options)
    bounds = (cu_seqlens, max_seqlen, cu_seqlens_k, max_seqlen_k)
    pad = attention_padding(len(q), len(k), *bounds, causal)  # pad, attend, pack the result
    q, k, v = q[pad.queries.t], k[pad.keys.t], v[pad.keys.t]
    o = padded_attention(q, k, v, pad.keys.mask, pad.ahead, *options, pad.queries.t)
    return o[pad.queries.b, pad.queries.l]


def attention_qkv(
    qkv: Tensor,
    *,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    causal: bool = False,
    scale: float | None = None,
    dropout: float = 0.0,
    rng: Tensor | None = None,
    stream: int = 0,
) -> Tensor:
    """Return `attention` of the three slices of one tensor."""
    return attention(
        *qkv.unbind(-3),
        key_mask=key_mask,
        cu_seqlens=cu_seqlens,
        max_seqlen=max_seqlen,
        causal=causal,
        scale=scale,
        dropout=dropout,
        rng=rng,
        stream=stream,
    )


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    low_weight: Tensor | None = None,
    low_bias: Tensor | None = None,
) -> Tensor:
    """Return x weight^T + bias. Low-precision copies give the values; gradients go to weight and bias."""
    if low_weight is not None:
        x = x.to(low_weight.dtype)
        weight = weight + (low_weight - weight).detach()
        bias = None if bias is None else bias + (low_bias - bias).detach()
    else:
        x, weight = autocast(x, weight)
    with torch.autocast(x.device.type, enabled=False):
        y = wide(x) @ wide(weight).T
        return (y if bias is None else y + wide(bias)).to(x.dtype)


def add_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float,
    dropout: float = 0.0,
    rng: Tensor | None = None,
    stream: int = 0,
) -> Tensor:
    """Return LayerNorm(residual + dropout(x))."""
    z = drop(wide(x), dropout, rng, stream)
    z = z if residual is None else z + wide(residual)
    return F.layer_norm(z, z.shape[-1:], weight.to(z.dtype), bias.to(z.dtype), eps).to(x.dtype)


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """Return gelu(x + bias) = z Phi(z), the erf form (Hendrycks & Gimpel 2016)."""
    return F.gelu(wide(x) + wide(bias)).to(x.dtype)


# --- losses ------------------------------------------------------------------------------------------------


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted mean over all elements, summed in float64; 0/0 = 0."""
    total = weights.sum(dtype=torch.float64)
    mean = (weights.double() * values).sum() / total.masked_fill(total == 0, 1)
    return mean.to(values.dtype)


# --- generator (eq. 1: p_G(x_t | x) = softmax over e(x_t)^T h_G(x)_t; x_hat ~ p_G) --------------------------


def inverse_cdf(logits: Tensor, u: Tensor) -> Tensor:
    """Return min{v : p_0 + ... + p_v > u} for each row of float64 logits ``[M, V]``."""
    cdf = logits.softmax(-1).cumsum(-1)
    total = cdf[:, -1:].contiguous()  # 1 up to rounding; u is scaled by it, so that a token is always found
    sample = torch.searchsorted(cdf, u[:, None] * total, right=True)
    last = torch.searchsorted(cdf, total)  # the last token whose probability is not 0
    return torch.minimum(sample, last).clamp(max=logits.shape[-1] - 1)[:, 0]


def mlm_head(
    x: Tensor,
    table: Tensor,
    bias: Tensor,
    targets: Tensor,
    weights: Tensor,
    rng: Tensor,
    *,
    temperature: float = 1.0,
    disallow_correct: bool = False,
    return_table: bool = False,
) -> MLMHead:
    """Return `mlm_of_logits` of x table^T + bias."""
    original_table = table if return_table else None
    x, table = autocast(x, table)
    unused = weights == 0  # such a row may contain anything, NaN too
    with torch.autocast(x.device.type, enabled=False):
        logits = wide(x).masked_fill(unused[:, None], 0) @ wide(table).T + wide(bias)
    head = mlm_of_logits(
        logits, targets, weights, rng, temperature=temperature, disallow_correct=disallow_correct
    )
    return head._replace(table=original_table)


def mlm_of_logits(
    logits: Tensor,  # [M, V]
    targets: Tensor,
    weights: Tensor,
    rng: Tensor,
    *,
    temperature: float = 1.0,
    disallow_correct: bool = False,
) -> MLMHead:
    """Return the weighted mean of -log p(target), p = softmax(logits), and one draw at the temperature."""
    unused, logits = weights == 0, wide(logits)
    M, V = logits.shape
    target, bad = legal_ids("mlm_head", "targets", targets.masked_fill(unused, 0).long(), V)
    nll = F.cross_entropy(logits, target, reduction="none")
    lse = logits.detach().logsumexp(-1)
    nll = nll if bad is None else nll.masked_fill(bad, math.nan)
    loss = weighted_mean(nll.masked_fill(unused, 0), weights)

    with torch.no_grad():
        draws = []
        chunks = (x.split(256) for x in (logits, target, uniforms(rng, M)))
        for rows, at, u in zip(*chunks, strict=True):
            rows = rows.double() / temperature
            if disallow_correct:
                rows = rows.scatter(-1, at[:, None], -math.inf)
            draws.append(inverse_cdf(rows, u))
        samples = torch.cat(draws) if draws else target
        correct = (weights * (logits.argmax(-1) == target)).sum()
    samples = samples.masked_fill(unused, 0).to(targets.dtype)
    return MLMHead(loss, samples, correct, lse.masked_fill(unused, 0))


def replace_tokens(ids: Tensor, positions: Tensor, samples: Tensor, weights: Tensor) -> ReplacedTokens:
    """Return x_corrupt = REPLACE(x, m, x_hat). A sample that equals the original is not a replacement."""
    T = ids.numel()
    used = weights != 0
    index, bad = legal_ids("replace_tokens", "positions", positions.long().masked_fill(~used, 0), max(T, 1))
    used = used if bad is None else used & ~bad
    index = index.masked_fill(~used, T)  # an extra element T collects the unused slots
    x = torch.cat([ids.flatten(), ids.new_zeros(1)]).scatter(0, index, samples.to(ids.dtype))
    x = x[:T].view_as(ids)
    return ReplacedTokens(x, x != ids)


# --- discriminator (eq. 2: D(x, t) = sigmoid(w^T h_D(x)_t), and its loss L_Disc) ----------------------------


def rtd_loss(logits: Tensor, replaced: Tensor, weights: Tensor | None = None) -> RTDLoss:
    """Return counts, and the weighted mean of -log sigmoid(x) where replaced, else of -log sigmoid(-x)."""
    w = torch.ones_like(logits, dtype=torch.float32) if weights is None else weights
    x = wide(logits).masked_fill(w == 0, 0)  # padding may contain anything
    z = torch.where(replaced, -x, x)
    loss = weighted_mean(-F.logsigmoid(-z), w)  # no overflow at either end
    with torch.no_grad():
        guess = x > 0
        cells = (guess & replaced, guess & ~replaced, ~guess & replaced, ~guess & ~replaced)
        counts = torch.stack([(w * cell).sum(dtype=torch.float64) for cell in cells]).float()
    return RTDLoss(loss, counts)


# --- energy model (Clark et al. 2020b, section 2: Electric, by noise-contrastive estimation) ----------------


def nce_loss(
    energies: Tensor, log_q: Tensor, noise: Tensor, weights: Tensor | None = None, *, log_odds: float = 0.0
) -> NCELoss:
    """Return `rtd_loss` of the logits energy + log q + log_odds: binary NCE (Ma and Collins 2018)."""
    logits = wide(energies) + log_q.detach() + log_odds
    return NCELoss(*rtd_loss(logits, noise, weights))
