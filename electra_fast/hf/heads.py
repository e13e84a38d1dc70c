"""What comes after the encoder in ELECTRA's and BERT's pre-training models, fused: heads and losses."""

import torch
from torch import Tensor, nn
from transformers.activations import GELUActivation
from transformers.modeling_outputs import MaskedLMOutput
from transformers.utils.generic import can_return_tuple

from electra_fast import ops
from electra_fast.hf.blocks import dense_gelu
from electra_fast.hf.fused import Fused

# How the forward pass of every model begins.
INPUTS = "input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds"
IGNORED = -100  # the label of a token that counts in no loss, as in `F.cross_entropy`


def _check_labels(labels: Tensor, inputs: dict[str, Tensor | None]) -> None:
    ids = inputs["input_ids"]
    tokens = list((inputs["inputs_embeds"] if ids is None else ids).shape[:2])
    if list(labels.shape) != tokens:
        raise ValueError(
            f"electra_fast.hf: labels must have a label a token, shape {tokens}, got {list(labels.shape)}; "
            "pad them as the ids are padded"
        )


class Transform(Fused):
    """LayerNorm(gelu(dense(x))), before the product with the word table."""

    option, runs = "mlm_head", "linear, bias_gelu, add_norm"

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


class MaskedLM(Fused):
    """A masked language model whose training computes the logits of labelled tokens, and keeps none.

    Logits are None in training unless `output_logits` is true. With it, and in evaluation, everything is
    transformers' own. Without any label the loss is 0 where transformers' is NaN.
    """

    option, runs = "mlm_head", "mlm_head"
    transform: str
    decoder: str

    @can_return_tuple
    def fused(
        self,
        input_ids: Tensor | None = None,  # [B, L]
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,  # [B, L] ids, -100: not counted
        output_logits: bool = False,
        **kwargs,
    ) -> MaskedLMOutput:
        inputs = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "attention_mask": attention_mask}
        inputs |= {"token_type_ids": token_type_ids, "position_ids": position_ids, "return_dict": True}
        if labels is not None:
            _check_labels(labels, inputs)
        if labels is None or output_logits or not self.training:
            return self.unfused.forward(self, **inputs, labels=labels, **kwargs)

        out = self.base_model(**inputs, **kwargs)
        x = self.get_submodule(self.transform)(out.last_hidden_state)  # [B, L, E]
        decoder = self.get_submodule(self.decoder)
        loss = ops.mlm_head(
            x.flatten(0, 1),
            decoder.weight,
            decoder.bias,
            labels.flatten(),
            (labels != IGNORED).flatten().float(),
            torch.zeros(2, dtype=torch.long, device=labels.device),  # of a sample that nobody takes
        ).loss
        return MaskedLMOutput(loss=loss, hidden_states=out.hidden_states, attentions=out.attentions)


class ElectraMaskedLM(MaskedLM):
    forwards = (f"{INPUTS}, labels, **kwargs",)
    transform, decoder = "generator_predictions", "generator_lm_head"
    parts, reads = ((decoder, nn.Linear),), (transform, "base_model")


class BertMaskedLM(MaskedLM):
    forwards = (f"{INPUTS}, encoder_hidden_states, encoder_attention_mask, labels, **kwargs",)
    transform, decoder = "cls.predictions.transform", "cls.predictions.decoder"
    parts, reads = ((decoder, nn.Linear),), (transform, "base_model")

    def fused(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,  # an encoder reads neither
        encoder_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs,
    ) -> MaskedLMOutput:
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        return super().fused(*inputs, labels, **kwargs)


class Scores(Fused):
    """The discriminator's head: dense_prediction(gelu(dense(x)))."""

    option, runs = "rtd_loss", "linear, bias_gelu"
    forwards = ("discriminator_hidden_states",)
    parts, reads = (("dense", nn.Linear), ("activation", GELUActivation)), ("dense_prediction",)

    def fused(self, discriminator_hidden_states: Tensor) -> Tensor:  # [B, L, W] -> [B, L]
        return self.dense_prediction(dense_gelu(discriminator_hidden_states, self.dense)).squeeze(-1)


class RTDLoss(Fused):
    """A discriminator whose loss weighs padding with 0, where transformers picks the rest by a mask.

    What a mask picks has a length that only the device knows: the host waits, and torch.compile breaks the
    graph, twice. Labels of a float dtype may be anything between 0 and 1; their loss is transformers' own.
    Integer labels other than 0 and 1 are refused on a CPU. Elsewhere, where looking at them would wait for
    the device, they make the loss NaN.
    """

    option, runs = "rtd_loss", "rtd_loss"
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
        inputs = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "attention_mask": attention_mask}
        inputs |= {"token_type_ids": token_type_ids, "position_ids": position_ids, "return_dict": True}
        if labels is None:
            return self.unfused.forward(self, **inputs, **kwargs)
        _check_labels(labels, inputs)
        real = attention_mask
        if real is not None and real.dim() == 4 and real.shape[1:3] == (1, 1) and real.dtype == torch.bool:
            real = real[:, 0, 0]
        if real is not None and real.shape != labels.shape:
            raise ValueError(
                "electra_fast.hf: attention_mask must be [B, L] where labels are given, got "
                f"{list(real.shape)}; leave the labels out, and take a loss of the logits"
            )
        if labels.is_floating_point():
            return self.unfused.forward(self, **inputs, labels=labels, **kwargs)

        counted = torch.ones_like(labels, dtype=torch.bool) if real is None else real == 1
        unknown = counted & (labels != labels.bool())
        if labels.device.type == "cpu" and not torch.compiler.is_compiling() and unknown.any():
            raise ValueError(
                "electra_fast.hf: labels must be 0 (original) or 1 (replaced) where attention_mask is 1, got "
                f"{labels[unknown][0]}; mask padding with attention_mask"
            )
        out = self.unfused.forward(self, **inputs, **kwargs)
        weights = counted.float().masked_fill(unknown, torch.nan)
        loss = ops.rtd_loss(out.logits, labels.bool(), weights).loss
        return type(out)(**{**out, "loss": loss})
