"""The heads and losses of ELECTRA's and BERT's pre-training models, fused."""

from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers.activations import GELUActivation
from transformers.modeling_outputs import MaskedLMOutput
from transformers.utils.generic import can_return_tuple

from electra_fast import ops
from electra_fast.errors import must
from electra_fast.hf.attention import two_axes
from electra_fast.hf.dense import dense_gelu
from electra_fast.hf.fused import Fused

# The first parameters of the forward pass of every model.
INPUTS = "input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds"
IGNORED = -100  # the label of a token without part in the loss, as in `F.cross_entropy`


def _named(ids, attention_mask, token_type_ids, position_ids, embeds) -> dict[str, object]:
    inputs = {"input_ids": ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
    return inputs | {"position_ids": position_ids, "inputs_embeds": embeds, "return_dict": True}


def _check_labels(labels: Tensor, inputs: dict[str, Tensor | None]) -> None:
    ids = inputs["input_ids"]
    tokens = list((inputs["inputs_embeds"] if ids is None else ids).shape[:2])
    if list(labels.shape) != tokens:
        rule, remedy = f"have one label per token, shape {tokens}", "pad them as the ids are padded"
        raise ValueError(must("electra_fast.hf: labels", rule, list(labels.shape), remedy))


class Transform(Fused):
    """LayerNorm(gelu(dense(x))), before the product with the word table."""

    option, uses = "mlm_head", "linear, bias_gelu, add_norm"

    def fused(self, hidden_states: Tensor) -> Tensor:  # [B, L, W] -> [B, L, E]
        norm = self.LayerNorm
        x = dense_gelu(hidden_states, self.dense)
        return ops.add_norm(x, None, norm.weight, norm.bias, eps=norm.eps)


class ElectraTransform(Transform):
    forwards = ("generator_hidden_states",)
    parts = (("dense", nn.Linear), ("activation", GELUActivation), ("LayerNorm", nn.LayerNorm))


class BertTransform(Transform):
    forwards = ("hidden_states",)
    parts = (("dense", nn.Linear), ("transform_act_fn", GELUActivation), ("LayerNorm", nn.LayerNorm))


class LanguageModel(Fused):
    """A model with a softmax over the vocabulary, whose logits need not be stored for a loss."""

    option, uses = "mlm_head", "mlm_head"
    transform: ClassVar[str]
    decoder: ClassVar[str]

    def loss_of(self, x: Tensor, labels: Tensor) -> Tensor:
        """Return the mean of -log p(label) over labels ``[B, L]`` that are not -100; x is ``[B, L, W]``."""
        x = self.get_submodule(self.transform)(x)  # [B, L, E]
        decoder = self.get_submodule(self.decoder)
        return ops.mlm_head(
            x.flatten(0, 1),
            decoder.weight,
            decoder.bias,
            labels.flatten(),
            (labels != IGNORED).flatten().float(),
            # The sample is discarded, so any seed works.
            torch.zeros(2, dtype=torch.long, device=labels.device),
        ).loss


class MaskedLM(LanguageModel):
    """A masked language model whose training computes only logits of labelled tokens, and stores none.

    Logits are None in training unless `output_logits` is true. With it, and in evaluation, the forward pass
    of transformers runs. If no token has a label, the loss is 0, and NaN in transformers.
    """

    @can_return_tuple
    def fused(
        self,
        input_ids: Tensor | None = None,  # [B, L]
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,  # [B, L] ids, -100: ignored
        output_logits: bool = False,
        **kwargs,
    ) -> MaskedLMOutput:
        inputs = _named(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        if labels is not None:
            _check_labels(labels, inputs)
        if labels is None or output_logits or not self.training:
            return self.unfused.forward(self, **inputs, labels=labels, **kwargs)

        out = self.base_model(**inputs, **kwargs)
        loss = self.loss_of(out.last_hidden_state, labels)
        return MaskedLMOutput(loss=loss, hidden_states=out.hidden_states, attentions=out.attentions)


class ElectraMaskedLM(MaskedLM):
    forwards = (f"{INPUTS}, labels, **kwargs",)
    transform, decoder = "generator_predictions", "generator_lm_head"
    parts, attributes = ((decoder, nn.Linear),), (transform, "base_model")


class BertMaskedLM(MaskedLM):
    forwards = (f"{INPUTS}, encoder_hidden_states, encoder_attention_mask, labels, **kwargs",)
    transform, decoder = "cls.predictions.transform", "cls.predictions.decoder"
    parts, attributes = ((decoder, nn.Linear),), (transform, "base_model")

    def fused(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,  # without effect in an encoder
        encoder_attention_mask: Tensor | None = None,  # without effect in an encoder
        labels: Tensor | None = None,
        **kwargs,
    ) -> MaskedLMOutput:
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        return super().fused(*inputs, labels, **kwargs)


class Scores(Fused):
    """The discriminator's head: dense_prediction(gelu(dense(x)))."""

    option, uses = "rtd_loss", "linear, bias_gelu"
    forwards = ("discriminator_hidden_states",)
    parts = (("dense", nn.Linear), ("activation", GELUActivation))
    attributes = ("dense_prediction",)

    def fused(self, discriminator_hidden_states: Tensor) -> Tensor:  # [B, L, W] -> [B, L]
        return self.dense_prediction(dense_gelu(discriminator_hidden_states, self.dense)).squeeze(-1)


class RTDLoss(Fused):
    """A discriminator whose loss gives padding the weight 0.

    transformers selects the real tokens with a mask instead. Only the device knows how many these are, so the
    host waits for it, and torch.compile breaks the graph twice. Labels of a float dtype can have any value
    from 0 to 1; transformers computes their loss. Integer labels other than 0 and 1 raise an error on a CPU.
    On another device reading them would make the host wait, so there they make the loss NaN.
    """

    option, uses = "rtd_loss", "rtd_loss"
    forwards = (f"{INPUTS}, labels, **kwargs",)

    @can_return_tuple
    def fused(
        self,
        input_ids: Tensor | None = None,  # [B, L]
        attention_mask: Tensor | None = None,  # [B, L], 1 = real
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,  # [B, L] 1 = replaced
        **kwargs,
    ):
        inputs = _named(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        if labels is None:
            return self.unfused.forward(self, **inputs, **kwargs)
        _check_labels(labels, inputs)
        real = None if attention_mask is None else two_axes(attention_mask)
        if real is not None and real.shape != labels.shape:
            remedy = "leave the labels out, and compute a loss of the logits"
            rule = "be [B, L] if labels are given"
            raise ValueError(must("electra_fast.hf: attention_mask", rule, list(real.shape), remedy))
        if labels.is_floating_point():
            return self.unfused.forward(self, **inputs, labels=labels, **kwargs)

        counted = torch.ones_like(labels, dtype=torch.bool) if real is None else real == 1
        unknown = counted & (labels != labels.bool())
        if labels.device.type == "cpu" and not torch.compiler.is_compiling() and unknown.any():
            rule = "be 0 (original) or 1 (replaced) where attention_mask is 1"
            remedy = "mask padding with attention_mask"
            raise ValueError(must("electra_fast.hf: labels", rule, labels[unknown][0], remedy))
        out = self.unfused.forward(self, **inputs, **kwargs)
        weights = counted.float().masked_fill(unknown, torch.nan)
        loss = ops.rtd_loss(out.logits, labels.bool(), weights).loss
        return type(out)(**{**out, "loss": loss})
