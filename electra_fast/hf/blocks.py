"""The blocks of ELECTRA's and BERT's towers, fused, except attention."""

import torch
from torch import Tensor, nn
from transformers.activations import GELUActivation

from electra_fast import inference, ops
from electra_fast.errors import must
from electra_fast.hf.attention import key_mask_of
from electra_fast.hf.attention_blocks import SelfAttention, cache_of
from electra_fast.hf.dense import dense, dense_gelu
from electra_fast.hf.fused import Fused
from electra_fast.modules import draw_rng


def _dropout(dropout: nn.Dropout, x: Tensor) -> dict:
    """Return the arguments for an op that drops elements like this module."""
    p = dropout.p if dropout.training else 0.0
    return {"dropout": p, "rng": draw_rng(x) if p > 0 else None}


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
        return None

    def fused(
        self,
        input_ids: Tensor | None = None,  # [B, L]
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,  # [B, L] or [1, L]
        inputs_embeds: None = None,
        *n,
        **length,
    ) -> Tensor:  # [B, L, E]
        for before in (*n, *length.values()):  # the number of tokens in a cache
            if position_ids is None and (isinstance(before, Tensor) or before):
                position_ids = self.positions_after(before, input_ids)
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

    def positions_after(self, before: int | Tensor, ids: Tensor) -> Tensor:
        """Return the positions of ids that follow `before` other tokens, ``[1, L]``."""
        after, most = before + ids.shape[1], len(self.position_embeddings.weight)
        # The length of a static cache is a tensor, and is not read: `ops.embed` checks the positions.
        if isinstance(after, int) and after > most:
            subject = "electra_fast.hf: the tokens of a sequence"
            remedy = "generate fewer (max_length), or use a model with more positions"
            raise ValueError(
                must(subject, f"be at most {most}, one per position of the model", after, remedy)
            )
        return before + torch.arange(ids.shape[1], device=ids.device)[None]


class Layer(Fused):
    """A whole layer of an encoder in inference on a CPU, in float32, bfloat16 or int8.

    In other calls, and in a decoder, its blocks run.
    """

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
        if own.__dict__.get("is_causal") or "crossattention" in self._modules:
            return "it is a decoder's, whose blocks run fused"
        return own.obstacle() or parts.why_not()

    def runs_unfused(self, why):
        inference.check_int8(self, self.int8, why)

    def unsupported(self, hidden_states, attention_mask=None, *rest, **options):
        if why := inference.why_not(self, hidden_states):
            return why
        own = self._modules["attention"]._modules["self"]
        if cache_of(rest[2:3], options) is not None:
            return "a cache is given"
        return own.unsupported(hidden_states, attention_mask, **options)

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
