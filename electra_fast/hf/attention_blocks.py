"""Attention in ELECTRA's and BERT's towers, fused: of an encoder, of a decoder with its cache, and across.

A model passes its masks of keys on as bool ``[B, 1, 1, n]``. Keys after the n-th are not visible: they are
the free places of a static cache. Causal attention aligns the last query with the last of the n keys.
"""

import torch
from torch import Tensor, nn

from electra_fast.errors import must
from electra_fast.hf.attention import attend, key_mask_of
from electra_fast.hf.dense import dense
from electra_fast.hf.fused import Fused

# Arguments without effect on attention, and those of packed sequences, which are supported. With any other
# argument that is neither None nor False, the class's own forward pass runs.
SUPPORTED = ("position_ids", "encoder_hidden_states", "encoder_attention_mask", "output_hidden_states")
SUPPORTED += ("cache_position", "use_cache", "return_dict", "num_items_in_batch")
SUPPORTED += ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
CACHES = ("past_key_values", "cache")  # the name of the argument, before and from transformers 5.24 on


def cache_of(positional: tuple, options: dict):
    """Return the cache among the arguments of a call: the first positional one, or one by name."""
    return positional[0] if positional else next((options[n] for n in CACHES if n in options), None)


class Attention(Fused):
    """Attention of all heads. The eager implementation runs unfused, as only it returns the weights."""

    option, uses = "attention", "linear, attention"

    def obstacle(self):
        eager = self.config._attn_implementation == "eager"
        return 'the config asks for "eager", which returns the weights' if eager else None

    def unsupported_options(self, options: dict) -> str | None:
        if self.config.output_attentions:
            return "the config asks for output_attentions"
        known = (*SUPPORTED, *CACHES)
        given = (k for k, x in options.items() if k not in known and x is not None and x is not False)
        return next((f"{name} is given" for name in given), None)

    def heads(self, layer: nn.Module, x: Tensor) -> Tensor:  # [B, L, W] -> [B, L, H, D]
        return dense(layer, x).unflatten(-1, (self.num_attention_heads, self.attention_head_size))

    def attend(self, q, k, v, mask, **options) -> tuple[Tensor, None]:
        p = self.dropout.p if self.training else 0.0
        causal = bool(getattr(self, "is_causal", False))
        return attend(self, q, k, v, mask, self.scaling, p, causal, **options).flatten(-2), None


class SelfAttention(Attention):
    forwards = (
        "hidden_states, attention_mask, past_key_values, cache_position, **kwargs",  # transformers 5.0
        "hidden_states, attention_mask, past_key_values, **kwargs",
        "hidden_states, attention_mask, cache, **kwargs",  # from 5.24 on
    )
    attributes = ("config", "num_attention_heads", "attention_head_size", "query", "key", "value")
    attributes += ("dropout", "scaling")

    def unsupported(self, hidden_states, attention_mask=None, *positional, **options):
        if why := self.unsupported_options(options):
            return why
        B, L = hidden_states.shape[:2]
        cached = cache_of(positional, options) is not None
        keys = attention_mask.shape[-1] if cached and isinstance(attention_mask, Tensor) else L
        if attention_mask is None or key_mask_of(attention_mask, B, keys) is not None:
            return None
        return f"attention_mask is {kind(attention_mask)}"

    def fused(
        self,
        hidden_states: Tensor,  # [B, L, W]
        attention_mask: Tensor | None = None,  # [B, 1, 1, n], True = visible
        *positional,
        **options,
    ) -> tuple[Tensor, None]:
        q, k, v = (self.heads(layer, hidden_states) for layer in (self.query, self.key, self.value))
        cache = cache_of(positional, options)
        if cache is not None:
            options |= dict(zip(("cache_position",), positional[1:], strict=False))
            k, v = self.cached(getattr(cache, "self_attention_cache", cache), k, v, options)
        L, K = q.shape[1], k.shape[1]
        # Without a mask, transformers gives several queries and more keys only for an empty static cache.
        n = attention_mask.shape[-1] if attention_mask is not None else L if 1 < L < K else K
        for name in CACHES:
            options.pop(name, None)
        if n < K:
            k, v = k[:, :n], v[:, :n]
        return self.attend(q, k, v, attention_mask, **options)

    def cached(self, cache, k: Tensor, v: Tensor, options: dict) -> tuple[Tensor, Tensor]:
        """Append keys and values ``[B, L, H, D]`` to a cache; return all of them, ``[B, K, H, D]``."""
        position = options.get("cache_position")  # where a static cache of transformers 5.0 writes
        more = () if position is None else ({"cache_position": position},)
        keys, values = cache.update(k.transpose(1, 2), v.transpose(1, 2), self.layer_idx, *more)
        return keys.transpose(1, 2), values.transpose(1, 2)


class CrossAttention(Attention):
    """Attention of a decoder's tokens to the states of an encoder.

    In a packed batch ``cu_seq_lens_q`` and ``max_length_q`` are the bounds of the decoder's sequences,
    ``cu_seq_lens_k`` and ``max_length_k`` those of the encoder's.
    """

    forwards = tuple(
        f"hidden_states, encoder_hidden_states, attention_mask, {cache}, **kwargs" for cache in CACHES
    )
    attributes = (*SelfAttention.attributes, "layer_idx")

    def unsupported(
        self, hidden_states, encoder_hidden_states=None, attention_mask=None, *positional, **options
    ):
        if why := self.unsupported_options(options):
            return why
        keys = None if encoder_hidden_states is None else encoder_hidden_states.shape[1]
        if attention_mask is None or key_mask_of(attention_mask, len(hidden_states), keys) is not None:
            return None
        return f"encoder_attention_mask is {kind(attention_mask)}"

    def fused(
        self,
        hidden_states: Tensor,  # [B, L, W]
        encoder_hidden_states: Tensor | None = None,  # [B, S, W], not needed if the cache has its keys
        attention_mask: Tensor | None = None,  # [B, 1, 1, S], True = visible
        *positional,
        **options,
    ) -> tuple[Tensor, None]:
        q, cache = self.heads(self.query, hidden_states), cache_of(positional, options)
        if cache is not None and cache.is_updated.get(self.layer_idx):
            layer = cache.cross_attention_cache.layers[self.layer_idx]
            k, v = layer.keys.transpose(1, 2), layer.values.transpose(1, 2)
        else:
            if encoder_hidden_states is None:
                rule = "be given to cross-attention"
                raise ValueError(must("electra_fast.hf: encoder_hidden_states", rule, None))
            k, v = (self.heads(layer, encoder_hidden_states) for layer in (self.key, self.value))
            if cache is not None:
                k, v = (
                    x.transpose(1, 2)
                    for x in cache.cross_attention_cache.update(
                        k.transpose(1, 2), v.transpose(1, 2), self.layer_idx
                    )
                )
                cache.is_updated[self.layer_idx] = True
        for name in CACHES:
            options.pop(name, None)
        return self.attend(q, k, v, attention_mask, **options)


class Model(Attention):
    """Gives masks of keys four axes, ``[B, 1, 1, n]``, with which transformers passes them on unchanged.

    With two axes transformers would read from the device whether a mask hides a token, and expand it.
    """

    forwards = tuple(
        "input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, encoder_hidden_states, "
        f"encoder_attention_mask, {rest}, **kwargs"
        for rest in (
            "past_key_values, use_cache, cache_position",
            "past_key_values, use_cache",
            "cache, use_cache",
        )
    )
    attributes = ("config", "encoder.layer")

    def obstacle(self):
        """Only `SelfAttention` and `CrossAttention` are known to read masks of this form."""
        for layer in self.encoder.layer:
            cross = getattr(layer, "crossattention", None)
            if not isinstance(layer.attention.self, SelfAttention) or not (
                cross is None or isinstance(cross.self, CrossAttention)
            ):
                return "a layer's attention is not fused"
        return super().obstacle()

    def unsupported(
        self,
        input_ids=None,
        attention_mask=None,
        token_type_ids=None,
        position_ids=None,
        inputs_embeds=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        *positional,
        **options,
    ):
        if why := self.unsupported_options(options):
            return why
        ids = inputs_embeds if input_ids is None else input_ids
        if ids is None or not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
            return None
        B, L = ids.shape[:2]
        before, cache = 0, cache_of(positional, options)
        if cache is not None:
            before = cache.get_seq_length()
            if isinstance(before, Tensor) and torch.compiler.is_compiling() and L > 1:
                return "several tokens follow those of a static cache"
        if cache is None and attention_mask.shape != (B, L):
            return f"attention_mask is {kind(attention_mask)} for {[B, L]} tokens"
        return None

    def fused(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,  # [B, n], the tokens of the cache first
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,  # [B, S]
        *positional,
        **options,
    ):
        ids = inputs_embeds if input_ids is None else input_ids
        cache = cache_of(positional, options)
        if cache is not None:
            attention_mask = mask_with_cache(attention_mask, ids, cache)
        elif attention_mask is None:
            # transformers would make a mask [B, 1, L, L] if an exporter cannot see that no token is hidden.
            if torch.compiler.is_exporting() and options.get("cu_seq_lens_q") is None:
                attention_mask = ids.new_ones((ids.shape[0], 1, 1, ids.shape[1]), dtype=torch.bool)
        if self.config.is_decoder and isinstance(attention_mask, Tensor) and attention_mask.dim() == 4:
            if attention_mask.shape[2] == 1:
                # transformers uses a given mask as it is: each token sees later ones. For several tokens this
                # is no mask of keys with four axes, so the layers run unfused.
                attention_mask = attention_mask.expand(-1, -1, ids.shape[1], -1)
        attention_mask, encoder_attention_mask = map(four_axes, (attention_mask, encoder_attention_mask))
        tokens = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        states = (encoder_hidden_states, encoder_attention_mask)
        return self.unfused.forward(self, *tokens, *states, *positional, **options)


def four_axes(mask: Tensor | None) -> Tensor | None:
    """Return a mask ``[B, n]`` as bool ``[B, 1, 1, n]``, another mask as it is."""
    return mask.bool()[:, None, None] if isinstance(mask, Tensor) and mask.dim() == 2 else mask


def mask_with_cache(mask: Tensor | None, ids: Tensor, cache) -> Tensor | None:
    """Return which keys are visible, bool ``[B, n]``; n is the number of tokens in the cache and in ids.

    A static cache counts its tokens on the device. A single token is masked without reading the count: n is
    then all places of the cache.
    """
    (B, L), before = ids.shape[:2], cache.get_seq_length()
    static = cache.is_compileable
    if mask is not None and mask.dim() != 2:
        return mask
    if isinstance(before, Tensor) and (torch.compiler.is_compiling() or before.is_cuda) and L == 1:
        length = getattr(cache, "get_max_length", None) or cache.get_max_cache_shape  # before 5.16
        places = torch.arange(length(), device=ids.device)
        visible = (places <= before).expand(B, -1)
        if mask is None:
            return visible
        return visible & nn.functional.pad(mask.bool(), (0, len(places) - mask.shape[1]))
    n = int(before) + L
    if mask is None:
        return ids.new_ones((B, n), dtype=torch.bool) if static or (L > 1 and n > L) else None
    if mask.shape[0] not in (1, B) or mask.shape[1] < n:
        rule = f"have shape [{B}, {n}], the tokens of the cache first"
        raise ValueError(must("electra_fast.hf: attention_mask", rule, list(mask.shape)))
    return mask[:, :n].bool()


def kind(mask: object) -> str:
    if not isinstance(mask, Tensor):
        return type(mask).__name__
    return f"{str(mask.dtype).removeprefix('torch.')} {list(mask.shape)}"
