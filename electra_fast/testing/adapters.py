"""Adapters: functions with a well-known signature of their own, called as an op.

An adapter maps a function to one with the op's signature, and says what cannot be expressed that way. Your
own adapter is any function of a function: `lambda f: lambda q, k, v, scale: f(q, k, v, scale)`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from electra_fast import baseline
from electra_fast.errors import must
from electra_fast.reference import MaskedTokens, MLMHead, RTDLoss, rate, slot_count


class Adapter(NamedTuple):
    signature: str  # of the functions that it accepts
    wrap: Callable[[Callable], Callable]
    supports: dict[str, Any]  # what such a function cannot do


def _sdpa(function: Callable) -> Callable:
    def attention(q, k, v, *, key_mask=None, causal=False, scale=None, dropout=0.0):
        B, L, K = *q.shape[:2], k.shape[1]
        mask = None if key_mask is None else key_mask[:, None, None, :].expand(B, 1, L, K)
        # PyTorch accepts only one of the two, and aligns the first query with the first key.
        if causal and (mask is not None or L != K):
            earlier = torch.ones(L, K, dtype=torch.bool, device=q.device).tril(K - L)
            mask, causal = earlier if mask is None else mask & earlier, False
        heads = (x.transpose(1, 2) for x in (q, k, v))
        options = {"attn_mask": mask, "dropout_p": dropout, "is_causal": causal, "scale": scale}
        return function(*heads, **options).transpose(1, 2)

    return attention


def _flash_attn(function: Callable) -> Callable:
    def attention(q, k, v, *, causal=False, scale=None, dropout=0.0):
        return function(q, k, v, dropout_p=dropout, softmax_scale=scale, causal=causal)

    return attention


def _norm(call: Callable) -> Callable[[Callable], Callable]:
    def wrap(function: Callable) -> Callable:
        def add_norm(x, residual, weight, bias, *, eps):
            return call(function, x if residual is None else x + residual, weight, bias, eps)

        return add_norm

    return wrap


def _dropout(function: Callable) -> Callable:
    def add_norm(x, residual, weight, bias, *, eps, dropout=0.0):
        options = {"eps": eps, "dropout": dropout, "drop": lambda x, p, rng, stream: function(x, p)}
        return baseline.add_norm(x, residual, weight, bias, **options)

    return add_norm


def _labels(function: Callable) -> Callable:
    def mask_tokens(ids, candidates, *, mask_id, key_mask=None):
        candidates = candidates if key_mask is None else candidates & key_mask
        masked, labels = function(ids.clone(), candidates)  # such functions often overwrite their argument
        B, L = ids.shape
        used = labels != -100
        # The op has a fixed number of slots per row; a function may mask more positions than that.
        N = max(slot_count(ids[:1], rate(0.15), None), int(used.sum(1).max()))
        positions = (~used).to(torch.uint8).argsort(dim=1, stable=True)[:, :N]
        weights = used.gather(1, positions)
        targets = labels.gather(1, positions).masked_fill(~weights, 0)
        flat = (positions + L * torch.arange(B, device=ids.device)[:, None]).masked_fill(~weights, 0)
        return MaskedTokens(masked, flat.flatten(), targets.flatten(), weights.flatten().float())

    return mask_tokens


def _logits(x: Tensor, table: Tensor, bias: Tensor, weights: Tensor) -> Tensor:
    return F.linear(x.masked_fill(weights[:, None] == 0, 0), table, bias.to(x.dtype))


def _sampler(function: Callable) -> Callable:
    def mlm_head(x, table, bias, targets, weights, *, temperature=1.0):
        samples = function(_logits(x, table, bias, weights), temperature)
        return MLMHead(None, samples.to(targets.dtype), None, None)

    return mlm_head


def _cross_entropy(function: Callable) -> Callable:
    def mlm_head(x, table, bias, targets, weights, rng, *, temperature=1.0, disallow_correct=False):
        logits, target = _logits(x, table, bias, weights).float(), targets.long().masked_fill(weights == 0, 0)
        rows = function(logits, target, reduction="none")
        return MLMHead((weights / weights.sum() * rows).sum(), None, None, None)

    return mlm_head


def _rtd(function: Callable) -> Callable:
    def rtd_loss(logits, replaced):
        return RTDLoss(function(logits.float(), replaced.float()), None)  # in float32, as under autocast

    return rtd_loss


ADAPTERS: dict[str, dict[str, Adapter]] = {
    "attention": {
        "sdpa": Adapter(
            "(query, key, value, attn_mask, dropout_p, is_causal, scale) [B, H, L, D]",
            _sdpa,
            {"packed": False, "random": "own"},
        ),
        "flash_attn": Adapter(
            "(q, k, v, dropout_p, softmax_scale, causal) [B, L, H, D]", _flash_attn, {"random": "own"}
        ),
    },
    "add_norm": {
        "layer_norm": Adapter(
            "(input, normalized_shape, weight, bias, eps), as torch.nn.functional.layer_norm",
            _norm(lambda f, x, weight, bias, eps: f(x, x.shape[-1:], weight, bias, eps)),
            {},
        ),
        "norm": Adapter("(x, weight, bias, eps)", _norm(lambda f, *args: f(*args)), {}),
        "dropout": Adapter("(input, p), as torch.nn.functional.dropout", _dropout, {"random": "own"}),
    },
    "mask_tokens": {
        "labels": Adapter(
            "(ids, candidates) [B, L] -> (masked ids, labels), which are -100 where a token is not masked; "
            "with [MASK] = 103, mask_prob 0.15 and keep_prob 0.15",
            _labels,
            {"random": "own"},
        ),
    },
    "mlm_head": {
        "sampler": Adapter(
            "(logits, temperature) [M, V] -> ids [M]", _sampler, {"random": "own", "results": ("samples",)}
        ),
        "cross_entropy": Adapter(
            "(logits, targets, reduction='none') -> losses [M], as torch.nn.functional.cross_entropy",
            _cross_entropy,
            {"results": ("loss",)},
        ),
    },
    "rtd_loss": {
        "bce": Adapter(
            "(logits, labels), both float32, -> mean loss, as binary_cross_entropy_with_logits",
            _rtd,
            # PyTorch's mean of nothing is NaN, and its float32 sum overflows before the definition's.
            {"results": ("loss",), "empty": False, "extremes": False},
        ),
    },
}


def adapter_of(call: str, op: str, adapter: str | Callable) -> tuple[Callable, dict[str, Any]]:
    """Return the function of an adapter, given by name or itself, and what it does not support."""
    if callable(adapter):
        return adapter, {}
    found = ADAPTERS.get(op, {})
    if adapter not in found:
        rule = f"be {', '.join(found)} or a function" if found else "be a function"
        raise ValueError(must(f"{call}: adapter of {op}", rule, repr(adapter)))
    return found[adapter].wrap, found[adapter].supports
