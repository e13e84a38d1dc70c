"""An attention implementation for the registry of transformers: "electra_fast".

    model.set_attn_implementation("electra_fast")          # or from_pretrained(..., attn_implementation=…)

It supports ELECTRA, BERT, RoBERTa and every other encoder that uses the registry of transformers (5.0 and
newer), with padding, dropout and packed sequences (`cu_seq_lens_q`, as `DataCollatorWithFlattening` makes
them). It patches nothing, and never makes the host wait for the device.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.masking_utils import (
    AttentionMaskInterface,
    bidirectional_mask_function,
    causal_mask_function,
)
from transformers.modeling_utils import AttentionInterface

from electra_fast import ops
from electra_fast.errors import must
from electra_fast.modules import draw_rng

NAME = "electra_fast"
# Options that transformers passes for other kinds of models; here they must be None.
UNSUPPORTED = ("position_bias", "sliding_window", "softcap", "s_aux", "head_mask", "cache")


def _unsupported(argument: str, rule: str, got: object) -> NotImplementedError:
    remedy = 'use model.set_attn_implementation("sdpa")'
    return NotImplementedError(must(f"electra_fast.hf: {argument}", rule, got, remedy))


def mask(
    *_,
    mask_function: Callable = bidirectional_mask_function,
    attention_mask: Tensor | None = None,
    batch_size: int = 1,
    q_length: int | None = None,
    kv_length: int | None = None,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    cache_position: Tensor | None = None,
    device: torch.device | str = "cpu",
    **__,
) -> Tensor | None:
    """Return which keys are visible, bool ``[B, n]``; transformers calls this once per forward pass.

    Keys after the n-th are the free places of a static cache, which no query sees.
    """
    if mask_function not in (bidirectional_mask_function, causal_mask_function):
        got = getattr(mask_function, "__name__", mask_function)
        raise _unsupported("mask_function", "be bidirectional or causal", got)
    if cache_position is not None:  # transformers 5.0
        q_length, q_offset, device = len(cache_position), cache_position[0], cache_position.device
    visible = None  # the places of a static cache that have a key, if there are others
    if mask_function is causal_mask_function and q_length != kv_length:
        if isinstance(q_offset, Tensor) and q_length == 1:  # a count on the device is not read
            visible = torch.arange(kv_length, device=q_offset.device) <= q_offset
        elif int(q_offset) + q_length != kv_length:
            kv_length = int(q_offset) + q_length
            visible = torch.ones(kv_length, dtype=torch.bool, device=device)
    if attention_mask is None:
        return None if visible is None else visible.expand(batch_size, -1)
    if kv_length is not None:  # The mask may be longer than the keys.
        attention_mask = attention_mask[:, kv_offset : kv_offset + kv_length]
    if visible is None:
        return attention_mask.bool()
    return visible & F.pad(attention_mask.bool(), (0, kv_length - attention_mask.shape[1]))


def two_axes(mask: Tensor) -> Tensor:
    """Return a bool mask ``[B, 1, 1, L]``, as transformers passes it to its layers, as ``[B, L]``."""
    of_keys = mask.dim() == 4 and mask.shape[1:3] == (1, 1) and mask.dtype == torch.bool
    return mask[:, 0, 0] if of_keys else mask


def key_mask_of(mask: object, B: int, keys: int | None) -> Tensor | None:
    """Return a mask of keys as bool ``[B, keys]``, None for another mask; only shape and dtype are read."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        return None
    mask = two_axes(mask)
    if mask.dim() != 2 or mask.shape[1] != (keys or mask.shape[1]) or mask.shape[0] not in (1, B):
        return None
    return mask.expand(B, -1)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **options,
) -> tuple[Tensor, None]:
    """Return `ops.attention` of query ``[B, H, L, D]``, key and value ``[B, H, K, D]`` as ``[B, L, H, D]``.

    The second result is None, instead of weights.

    Raises:
        NotImplementedError: names an argument that no kernel here supports: fewer key heads, a 4-D mask,
            attention weights as a result.
    """
    if key.shape[:2] != query.shape[:2] or key.shape[3] != query.shape[3]:
        raise _unsupported(
            "key", f"have the sequences and heads of the query {list(query.shape)}", list(key.shape)
        )
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if attention_mask is not None and attention_mask.dim() == 2:
        k, v = (x[:, : attention_mask.shape[1]] for x in (k, v))
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    # Our mask of keys has two axes. transformers uses a given one with four as it is.
    causal = causal and (attention_mask is None or attention_mask.dim() == 2)
    return attend(module, q, k, v, attention_mask, scaling, dropout, causal, **options), None


def attend(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attention_mask: Tensor | None,
    scale: float | None,
    dropout: float,
    causal: bool = False,
    **options,
) -> Tensor:
    """Do the same for ``[B, L, H, D]``, the order of the op."""
    (B, L), K = q.shape[:2], k.shape[1]
    bounds = options.get("cu_seq_lens_q")
    key_mask = None
    if attention_mask is not None:
        if bounds is not None:
            raise _unsupported("attention_mask", "be None with cu_seq_lens_q", list(attention_mask.shape))
        key_mask = key_mask_of(attention_mask, B, K)
        if key_mask is None:
            got = f"{list(attention_mask.shape)}, {str(attention_mask.dtype).removeprefix('torch.')}"
            raise _unsupported("attention_mask", f"be [B, {K}] or bool [B, 1, 1, {K}]", got)
    if options.get("output_attentions") or getattr(module.config, "output_attentions", False):
        raise _unsupported("output_attentions", "be False, the weights are never stored", True)
    for name in UNSUPPORTED:
        if options.get(name) is not None:
            raise _unsupported(name, "be None", type(options[name]).__name__)

    settings = {"causal": causal, "scale": scale, "dropout": dropout}
    if dropout > 0:
        settings["rng"] = draw_rng(q)
    if bounds is None:
        return ops.attention(q, k, v, key_mask=key_mask, **settings)
    settings |= {"cu_seqlens": bounds, "max_seqlen": min(int(options.get("max_length_q", B * L)), B * L)}
    if not causal and (keys := options.get("cu_seq_lens_k")) is not None and keys is not bounds:
        longest = min(int(options.get("max_length_k", B * K)), B * K)
        settings |= {"cu_seqlens_k": keys, "max_seqlen_k": longest}  # in cross-attention: of the encoder
    packed = (x.flatten(0, 1) for x in (q, k, v))
    return ops.attention(*packed, **settings).unflatten(0, (B, L))


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, mask)
