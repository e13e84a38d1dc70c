"""Adapters: functions with a well-known signature of their own, called as an op.

An adapter maps a function to one with the op's signature, and says what cannot be expressed that way. Your
own adapter is any function of a function: `lambda f: lambda q, k, v, scale: f(q, k, v, scale)`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from electra_fast.errors import must
from electra_fast.reference import RTDLoss


class Adapter(NamedTuple):
    signature: str  # of the functions that it accepts
    wrap: Callable[[Callable], Callable]
    supports: dict[str, Any]  # what such a function cannot do


def _sdpa(function: Callable) -> Callable:
    def attention(q, k, v, *, key_mask=None, causal=False, scale=None, dropout=0.0):
        B, L = q.shape[:2]
        mask = None if key_mask is None else key_mask[:, None, None, :].expand(B, 1, L, L)
        if causal and mask is not None:  # PyTorch accepts only one of the two
            mask, causal = mask & torch.ones(L, L, dtype=torch.bool, device=q.device).tril(), False
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


def _rtd(function: Callable) -> Callable:
    def rtd_loss(logits, replaced, weights=None):
        return RTDLoss(function(logits, replaced, weights), None)

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
