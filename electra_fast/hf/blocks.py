"""The blocks of ELECTRA's and BERT's encoders, fused.

A linear layer is called as the module that it is, unless an op adds its bias: a LoRA adapter or a quantised
layer in its place goes on working.
"""

import torch
from torch import Tensor, nn
from transformers.activations import GELUActivation

from electra_fast import ops
from electra_fast.hf.attention import attention
from electra_fast.hf.fused import Fused
from electra_fast.modules import draw_rng


def _dropout(dropout: nn.Dropout, x: Tensor) -> dict:
    """Return the arguments of an op that drops elements as this module does."""
    p = dropout.p if dropout.training else 0.0
    return {"dropout": p, "rng": draw_rng(x) if p > 0 else None}


def _norm(norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    return norm.weight, norm.bias


class Embeddings(Fused):
    """Word, position and type tables, LayerNorm and dropout, of ids; vectors in their place are as before."""

    option, runs = "embeddings", "embed"
    parts = (
        ("word_embeddings", nn.Embedding),
        ("position_embeddings", nn.Embedding),
        ("token_type_embeddings", nn.Embedding),
        ("LayerNorm", nn.LayerNorm),
        ("dropout", nn.Dropout),
    )

    def hindrance(self):
        word = self.word_embeddings
        if isinstance(word, nn.Embedding) and (word.max_norm or word.sparse or word.scale_grad_by_freq):
            return "word_embeddings has max_norm, sparse or scale_grad_by_freq"
        return super().hindrance()

    def fused(
        self,
        input_ids: Tensor | None = None,  # [B, L]
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,  # [B, L] or [1, L]
        inputs_embeds: Tensor | None = None,
        **cache,  # cache_length, before transformers 5.24 past_key_values_length
    ) -> Tensor:  # [B, L, E]
        if input_ids is None:
            return self.unfused.forward(self, None, token_type_ids, position_ids, inputs_embeds, **cache)
        tables = (self.word_embeddings, self.position_embeddings, self.token_type_embeddings)
        with torch.autocast(
            input_ids.device.type, enabled=False
        ):  # the tables' dtype, as LayerNorm's would be
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


class Attention(Fused):
    """Attention of all heads, unless the config asks for the eager form, which alone returns the weights."""

    option, runs = "attention", "attention"

    def hindrance(self):
        eager = self.config._attn_implementation == "eager"
        return 'the config asks for "eager", which returns the weights' if eager else None


class SelfAttention(Attention):
    def fused(
        self,
        hidden_states: Tensor,  # [B, L, W]
        attention_mask: Tensor | None = None,  # [B, 1, 1, L], True = real
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        if kwargs.get("output_attentions") or self.config.output_attentions:
            return self.unfused.forward(self, hidden_states, attention_mask, **kwargs)
        heads = (self.num_attention_heads, self.attention_head_size)
        layers = (self.query, self.key, self.value)
        q, k, v = (layer(hidden_states).unflatten(-1, heads).transpose(1, 2) for layer in layers)
        if attention_mask is not None:
            if attention_mask.shape[1:3] != (1, 1):
                raise NotImplementedError(
                    f"electra_fast.hf: attention_mask must be [B, L], got {list(attention_mask.shape)}; "
                    "patch(model, attention=False) leaves it to transformers"
                )
            attention_mask = attention_mask[:, 0, 0]
        p = self.dropout.p if self.training else 0.0
        context, _ = attention(self, q, k, v, attention_mask, self.scaling, p, **kwargs)
        return context.flatten(-2), None


class Encoder(Attention):
    """Hands the mask on as it is; transformers asks the device whether it hides anything, and expands it.

    A mask with four axes goes to every layer unchanged.
    """

    def fused(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,  # [B, L]
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs,
    ):
        if attention_mask is not None and attention_mask.dim() == 2:
            attention_mask = attention_mask.bool()[:, None, None]
        tokens = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        return self.unfused.forward(self, *tokens, **kwargs)


class AddNorm(Fused):
    """The end of both halves of a layer: LayerNorm(residual + dropout(dense(x)))."""

    option, runs = "norm", "add_norm"
    parts = (("LayerNorm", nn.LayerNorm), ("dropout", nn.Dropout))

    def fused(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:  # [B, L, W] each
        x = self.dense(hidden_states)
        dtype = torch.promote_types(x.dtype, input_tensor.dtype)
        if x.is_cuda and torch.is_autocast_enabled("cuda"):  # whose LayerNorm is in float32, its result too
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

    option, runs = "feed_forward", "linear, bias_gelu"
    parts = (("dense", nn.Linear), ("intermediate_act_fn", GELUActivation))

    def fused(self, hidden_states: Tensor) -> Tensor:  # [B, L, W] -> [B, L, F]
        return dense_gelu(hidden_states, self.dense)


def dense_gelu(x: Tensor, dense: nn.Linear) -> Tensor:
    return ops.bias_gelu(ops.linear(x, dense.weight), dense.bias)
