"""The blocks of ELECTRA's and BERT's encoders, fused.

A linear layer that is not a plain `nn.Linear` is called as a module, so a LoRA adapter or a quantised layer
in its place still works.
"""

import torch
from torch import Tensor, nn
from transformers.activations import GELUActivation

from electra_fast import inference, ops
from electra_fast.hf.attention import attend, key_mask_of
from electra_fast.hf.fused import Fused, has_hooks
from electra_fast.modules import draw_rng

PLAIN = {Tensor, nn.Parameter, type(None)}  # types of the parameters of a linear layer that an op can read


def _dropout(dropout: nn.Dropout, x: Tensor) -> dict:
    """Return the arguments for an op that drops elements like this module."""
    p = dropout.p if dropout.training else 0.0
    return {"dropout": p, "rng": draw_rng(x) if p > 0 else None}


def dense(layer: nn.Module, x: Tensor) -> Tensor:
    """Return layer(x); a plain `nn.Linear` needs one operator per direction instead of a dozen.

    torch.compile gets the module, whose product it may fuse with what follows.
    """
    plain = type(layer) is nn.Linear and not has_hooks(layer) and not torch.compiler.is_compiling()
    if not plain or not PLAIN.issuperset(map(type, layer._parameters.values())):
        return layer(x)
    return ops.linear(x, **layer._parameters)


def _norm(norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    return norm.weight, norm.bias


class Embeddings(Fused):
    """Word, position and type tables, LayerNorm and dropout, for ids; inputs_embeds run unfused."""

    option, uses = "embeddings", "embed"
    forwards = tuple(
        f"input_ids, token_type_ids, position_ids, inputs_embeds, {length}"
        for length in ("past_key_values_length", "cache_length")  # the latter from transformers 5.24 on
    )
    parts = (
        ("word_embeddings", nn.Embedding),
        ("position_embeddings", nn.Embedding),
        ("token_type_embeddings", nn.Embedding),
        ("LayerNorm", nn.LayerNorm),
        ("dropout", nn.Dropout),
    )

    def obstacle(self):
        word = self.word_embeddings
        if isinstance(word, nn.Embedding) and (word.max_norm or word.sparse or word.scale_grad_by_freq):
            return "word_embeddings has max_norm, sparse or scale_grad_by_freq"
        return super().obstacle()

    def unsupported(
        self, input_ids=None, token_type_ids=None, position_ids=None, inputs_embeds=None, *n, **length
    ):
        if input_ids is None or inputs_embeds is not None:
            return "inputs_embeds are given"
        lengths = (*n, *length.values())
        cached = position_ids is None and any(not isinstance(x, int) or x != 0 for x in lengths)
        return "positions begin after a cache" if cached else None

    def fused(
        self,
        input_ids: Tensor | None = None,  # [B, L]
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,  # [B, L] or [1, L]
        *_,
        **__,
    ) -> Tensor:  # [B, L, E]
        tables = (self.word_embeddings, self.position_embeddings, self.token_type_embeddings)
        # The result has the dtype of the tables, as that of LayerNorm would.
        with torch.autocast(input_ids.device.type, enabled=False):
            return ops.embed(
                input_ids,
                None if token_type_ids is None else token_type_ids.expand_as(input_ids),
                None if position_ids is None else position_ids.expand_as(input_ids),
                *(table.weight for table in tables),
                *_norm(self.LayerNorm),
                eps=self.LayerNorm.eps,
                padding_idx=self.word_embeddings.padding_idx,
                **_dropout(self.dropout, input_ids),
            )


# Arguments without effect on an encoder's attention, and those of packed sequences, which are supported. With
# any other argument that is neither None nor False, the class's own forward pass runs.
SUPPORTED = ("position_ids", "encoder_hidden_states", "encoder_attention_mask", "output_hidden_states")
SUPPORTED += ("cache_position", "use_cache", "return_dict", "num_items_in_batch")
SUPPORTED += ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


class Attention(Fused):
    """Attention of all heads. The eager implementation runs unfused, as only it returns the weights."""

    option, uses = "attention", "linear, attention"

    def obstacle(self):
        eager = self.config._attn_implementation == "eager"
        return 'the config asks for "eager", which returns the weights' if eager else None

    def unsupported_options(self, cache, options: dict) -> str | None:
        if cache is not None:
            return "cache is given"
        if self.config.output_attentions:
            return "the config asks for output_attentions"
        given = (k for k, x in options.items() if k not in SUPPORTED and x is not None and x is not False)
        return next((f"{name} is given" for name in given), None)


class SelfAttention(Attention):
    forwards = (
        "hidden_states, attention_mask, past_key_values, cache_position, **kwargs",  # transformers 5.0
        "hidden_states, attention_mask, past_key_values, **kwargs",
        "hidden_states, attention_mask, cache, **kwargs",  # from 5.24 on
    )
    attributes = ("config", "num_attention_heads", "attention_head_size", "query", "key", "value")
    attributes += ("dropout", "scaling")

    def unsupported(self, hidden_states, attention_mask=None, cache=None, *_, **options):
        if why := self.unsupported_options(cache, options):
            return why
        if attention_mask is None or key_mask_of(attention_mask, *hidden_states.shape[:2]) is not None:
            return None
        return f"attention_mask is {_kind(attention_mask)}"

    def fused(
        self,
        hidden_states: Tensor,  # [B, L, W]
        attention_mask: Tensor | None = None,  # [B, 1, 1, L], True = real
        *_,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        shape = (*hidden_states.shape[:2], self.num_attention_heads, self.attention_head_size)
        layers = (self.query, self.key, self.value)
        q, k, v = (dense(layer, hidden_states).reshape(shape) for layer in layers)
        p = self.dropout.p if self.training else 0.0
        causal = bool(getattr(self, "is_causal", False))
        return attend(self, q, k, v, attention_mask, self.scaling, p, causal, **kwargs).flatten(-2), None


class Layer(Fused):
    """A whole layer in inference on a CPU, in float32, bfloat16 or int8. In other calls its blocks run."""

    option, uses = "layer", "encoder_layer"
    forwards = tuple(
        f"hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask, {rest}, **kwargs"
        for rest in ("past_key_values, cache_position", "past_key_values", "cache")
    )
    attributes = ("attention.self", "attention.output", "intermediate", "output")
    int8 = False

    def layer_parts(self) -> inference.Parts:
        layer = self._modules
        attention, up, down = layer["attention"], layer["intermediate"], layer["output"]
        own, out = attention._modules["self"], attention._modules["output"]
        q, k, v = (own._modules[name] for name in ("query", "key", "value"))
        return inference.Parts(
            (attention, own, out, up, down, up._modules["intermediate_act_fn"]),
            ((q, k, v), *((block._modules["dense"],) for block in (out, up, down))),
            (out._modules["LayerNorm"], down._modules["LayerNorm"]),
        )

    def obstacle(self):
        parts = self.layer_parts()
        _, own, out, up, down, activation = parts.inner
        for block, mixin in ((own, SelfAttention), (out, AddNorm), (up, BiasGELU), (down, AddNorm)):
            if not isinstance(block, mixin):
                return f"{mixin.option} is not fused"
        if type(activation) is not GELUActivation:
            return f"its activation is {type(activation).__name__}"
        return own.obstacle() or parts.why_not()

    def runs_unfused(self, why):
        inference.check_int8(self, self.int8, why)

    def unsupported(self, hidden_states, attention_mask=None, *rest, **options):
        if why := inference.why_not(self, hidden_states):
            return why
        own = self._modules["attention"]._modules["self"]
        return own.unsupported(hidden_states, attention_mask, *rest[2:3], **options)  # rest[2]: a cache

    def fused(
        self,
        hidden_states: Tensor,  # [B, L, W]
        attention_mask: Tensor | None = None,  # [B, 1, 1, L], True = real
        *_,
        cu_seq_lens_q: Tensor | None = None,
        max_length_q: int | None = None,
        **__,
    ) -> Tensor:
        parts, (B, L, _) = self.layer_parts(), hidden_states.shape
        own = parts.inner[1].__dict__
        settings = (own["num_attention_heads"], own["scaling"], self.int8)
        if cu_seq_lens_q is None:
            mask = None if attention_mask is None else key_mask_of(attention_mask, B, L).contiguous()
            return inference.run(self, parts, hidden_states, mask, None, L, *settings)
        longest = B * L if max_length_q is None else min(int(max_length_q), B * L)
        packed = hidden_states.flatten(0, 1)
        y = inference.run(self, parts, packed, None, cu_seq_lens_q, longest, *settings)
        return y.unflatten(0, (B, L))


class Encoder(Attention):
    """Gives the mask of keys four axes, ``[B, 1, 1, L]``, with which transformers passes it on unchanged.

    With two axes transformers would read from the device whether the mask hides a token, and expand it.
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
        """Only `SelfAttention` is known to read a mask of this form."""
        fused = all(isinstance(layer.attention.self, SelfAttention) for layer in self.encoder.layer)
        return super().obstacle() if fused else "a layer's attention is not fused"

    def unsupported(
        self,
        input_ids=None,
        attention_mask=None,
        token_type_ids=None,
        position_ids=None,
        inputs_embeds=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        cache=None,
        *_,
        **options,
    ):
        if why := self.unsupported_options(cache, options):
            return why
        ids = inputs_embeds if input_ids is None else input_ids
        if ids is None or not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
            return None
        if attention_mask.shape != ids.shape[:2]:
            return f"attention_mask is {_kind(attention_mask)} for {list(ids.shape[:2])} tokens"
        return None

    def fused(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,  # [B, L]
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        *rest,
        **kwargs,
    ):
        ids = inputs_embeds if input_ids is None else input_ids
        if attention_mask is None:
            # transformers would make a mask [B, 1, L, L] if an exporter cannot see that no token is hidden.
            if torch.compiler.is_exporting() and kwargs.get("cu_seq_lens_q") is None:
                attention_mask = ids.new_ones((ids.shape[0], 1, 1, ids.shape[1]), dtype=torch.bool)
        elif isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
            attention_mask = attention_mask.bool()[:, None, None]
        tokens = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        return self.unfused.forward(self, *tokens, *rest, **kwargs)


def _kind(mask: object) -> str:
    if not isinstance(mask, Tensor):
        return type(mask).__name__
    return f"{str(mask.dtype).removeprefix('torch.')} {list(mask.shape)}"


class AddNorm(Fused):
    """The end of both halves of a layer: LayerNorm(residual + dropout(dense(x)))."""

    option, uses = "norm", "linear, add_norm"
    forwards = ("hidden_states, input_tensor",)
    parts = (("LayerNorm", nn.LayerNorm), ("dropout", nn.Dropout))
    attributes = ("dense",)

    def fused(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:  # [B, L, W] each
        x, dtype = dense(self.dense, hidden_states), input_tensor.dtype
        if x.dtype != dtype:
            dtype = torch.promote_types(x.dtype, dtype)
        if x.is_cuda and torch.is_autocast_enabled("cuda"):  # Autocast runs LayerNorm in float32.
            dtype = torch.promote_types(dtype, torch.float32)
        return ops.add_norm(
            x.to(dtype),
            input_tensor.to(dtype),
            *_norm(self.LayerNorm),
            eps=self.LayerNorm.eps,
            **_dropout(self.dropout, x),
        )


class BiasGELU(Fused):
    """The first half of the feed-forward network: gelu(dense(x))."""

    option, uses = "feed_forward", "linear, bias_gelu"
    forwards = ("hidden_states",)
    parts = (("dense", nn.Linear), ("intermediate_act_fn", GELUActivation))

    def fused(self, hidden_states: Tensor) -> Tensor:  # [B, L, W] -> [B, L, F]
        return dense_gelu(hidden_states, self.dense)


def dense_gelu(x: Tensor, dense: nn.Linear) -> Tensor:
    return ops.bias_gelu(ops.linear(x, dense.weight), dense.bias)
