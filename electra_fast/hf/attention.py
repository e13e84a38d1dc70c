"""The attention of transformers' encoders: "electra_fast" in its registry.

    model.set_attn_implementation("electra_fast")          # or from_pretrained(..., attn_implementation=…)

serves ELECTRA, BERT, RoBERTa and every other encoder that asks transformers' registry (5.0 and newer), with
padding, dropout and packed sequences (`cu_seq_lens_q`, as `DataCollatorWithFlattening` makes them). Nothing
is patched, and the host waits for nothing.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.masking_utils import (
    AttentionMaskInterface,
    bidirectional_mask_function,
    causal_mask_function,
)
from transformers.modeling_utils import AttentionInterface

from electra_fast import ops
from electra_fast.modules import draw_rng

NAME = "electra_fast"
# What transformers passes for models of another kind, where it is not None.
UNSERVED = ("position_bias", "sliding_window", "softcap", "s_aux", "head_mask", "cache")


def _refuse(argument: str, rule: str, got: object) -> None:
    remedy = 'model.set_attn_implementation("sdpa") serves it'
    raise NotImplementedError(f"electra_fast.hf: {argument} must {rule}, got {got}; {remedy}")


def mask(
    *_,
    mask_function: Callable = bidirectional_mask_function,
    attention_mask: Tensor | None = None,
    kv_length: int | None = None,
    kv_offset: int = 0,
    **__,
) -> Tensor | None:
    """Return which keys are real, bool ``[B, L]``; transformers calls this once a forward pass."""
    if mask_function not in (bidirectional_mask_function, causal_mask_function):
        _refuse(
            "mask_function", "be bidirectional or causal", getattr(mask_function, "__name__", mask_function)
        )
    if attention_mask is None:
        return None
    if kv_length is not None:  # a longer mask is read as far as there are keys
        attention_mask = attention_mask[:, kv_offset : kv_offset + kv_length]
    return attention_mask.bool()


def key_mask_of(mask: object, B: int, L: int) -> Tensor | None:
    """Return a mask as bool ``[B, L]``, None if it is not one of keys; shape and dtype alone decide."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        return None
    if mask.dim() == 4 and mask.shape[1:3] == (1, 1):  # as transformers hands one on to its layers
        mask = mask[:, 0, 0]
    if mask.dim() != 2 or mask.shape[1] != L or mask.shape[0] not in (1, B):
        return None
    return mask.expand(B, L)


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
    """Attend as `ops.attention` does; query, key and value are ``[B, H, L, D]``, the result ``[B, L, H, D]``.

    Raises:
        NotImplementedError: what no kernel here serves, by name: keys of another length (cross-attention, a
            cache), fewer key heads, a 4-D mask, attention weights as a result.
    """
    if key.shape != query.shape:
        _refuse("key", f"have the query's shape {list(query.shape)}", list(key.shape))
    bounds = options.get("cu_seq_lens_q")
    key_mask = None
    if attention_mask is not None:
        if bounds is not None:
            _refuse("attention_mask", "be None beside cu_seq_lens_q", list(attention_mask.shape))
        key_mask = key_mask_of(attention_mask, query.shape[0], query.shape[2])
        if key_mask is None:
            got = f"{list(attention_mask.shape)}, {str(attention_mask.dtype).removeprefix('torch.')}"
            _refuse("attention_mask", "be [B, L] or bool [B, 1, 1, L]", got)
    if options.get("output_attentions") or getattr(module.config, "output_attentions", False):
        _refuse("output_attentions", "be False, the weights are never stored", True)
    for name in UNSERVED:
        if options.get(name) is not None:
            _refuse(name, "be None", type(options[name]).__name__)

    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    site = {"causal": causal, "scale": scaling, "dropout": dropout}
    if dropout > 0:
        site["rng"] = draw_rng(query)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if bounds is None:
        return ops.attention(q, k, v, key_mask=key_mask, **site), None
    B, T = q.shape[:2]
    longest = options.get("max_length_q", B * T)
    packed = (x.flatten(0, 1) for x in (q, k, v))
    o = ops.attention(*packed, cu_seqlens=bounds, max_seqlen=min(int(longest), B * T), **site)
    return o.unflatten(0, (B, T)), None


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, mask)
