"""Language models of ELECTRA's and BERT's decoders, fused: their training stores no logits."""

import inspect

from torch import Tensor, nn
from transformers.modeling_outputs import (
    BaseModelOutput,
    CausalLMOutputWithCrossAttentions,
    Seq2SeqLMOutput,
)
from transformers.models.encoder_decoder.modeling_encoder_decoder import shift_tokens_right
from transformers.utils.generic import can_return_tuple

from electra_fast.errors import must
from electra_fast.hf.attention_blocks import CACHES
from electra_fast.hf.fused import Fused
from electra_fast.hf.heads import IGNORED, INPUTS, LanguageModel

CALL = "electra_fast.hf: "


def check_labels(labels: Tensor, tokens: Tensor) -> None:
    if labels.shape != tokens.shape[:2]:
        rule = f"have one label per token, shape {list(tokens.shape[:2])}"
        raise ValueError(must(f"{CALL}labels", rule, list(labels.shape)))


def arguments(model: Fused, args: tuple, kwargs: dict) -> dict:
    """Return all arguments of a call by name."""
    call = inspect.signature(model.unfused.forward).bind(model, *args, **kwargs).arguments
    named = {name: x for name, x in call.items() if name not in ("self", "kwargs")}
    return named | call.get("kwargs", {})


class CausalLM(LanguageModel):
    """A decoder whose training computes only logits that predict labels, and stores none.

    Logits are None in training unless `output_logits` is true. With it, and in evaluation, the forward pass
    of transformers runs. Each token is trained with the label of the next token. `targets` in place of
    `labels` are those of the same token, and give a loss without logits in evaluation too. If no token has a
    label, the loss is 0, and NaN in transformers.
    """

    forwards = tuple(
        f"{INPUTS}, encoder_hidden_states, encoder_attention_mask, labels, {cache}, logits_to_keep, **kwargs"
        for cache in (
            "past_key_values, use_cache, cache_position",
            "past_key_values, use_cache",
            "cache, use_cache",
        )
    )

    @can_return_tuple
    def fused(
        self, *args, output_logits: bool = False, targets: Tensor | None = None, **kwargs
    ) -> CausalLMOutputWithCrossAttentions:
        call = arguments(self, args, kwargs)
        labels = call.get("labels")
        if targets is None and (labels is None or output_logits or not self.training):
            return self.unfused.forward(self, **call)
        for name in ("labels", "logits_to_keep", *CACHES):
            call.pop(name, None)
        items, shifted = (call.pop(name, None) for name in ("num_items_in_batch", "shift_labels"))
        out = self.base_model(**call | {"use_cache": False, "return_dict": True})
        x = out.last_hidden_state
        if targets is None:
            check_labels(labels, x)
            next_one = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
            targets = next_one if shifted is None else shifted
        loss = self.loss_of(x, targets)
        if items is not None:  # of all micro-batches of a step
            loss = loss * (targets != IGNORED).sum() / items
        return CausalLMOutputWithCrossAttentions(
            loss=loss,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
            cross_attentions=out.cross_attentions,
        )


class ElectraCausalLM(CausalLM):
    transform, decoder = "generator_predictions", "generator_lm_head"
    parts, attributes = ((decoder, nn.Linear),), (transform, "base_model")


class BertCausalLM(CausalLM):
    transform, decoder = "cls.predictions.transform", "cls.predictions.decoder"
    parts, attributes = ((decoder, nn.Linear),), (transform, "base_model")


class EncoderDecoder(Fused):
    """An encoder and a decoder that attends to its states; the loss is that of a `CausalLM`."""

    option, uses = "mlm_head", ""
    forwards = tuple(
        "input_ids, attention_mask, decoder_input_ids, decoder_attention_mask, encoder_outputs, "
        f"{first}, inputs_embeds, decoder_inputs_embeds, labels, {last}, **kwargs"
        for first, last in (
            ("past_key_values", "use_cache, cache_position"),
            ("past_key_values", "use_cache"),
            ("cache", "use_cache"),
        )
    )
    attributes = ("encoder", "decoder", "config")

    def obstacle(self):
        if not isinstance(self.decoder, CausalLM):
            return "its decoder's loss is not fused"
        why = self.decoder.obstacle()
        return f"its decoder's {why}" if why else None

    @can_return_tuple
    def fused(self, *args, output_logits: bool = False, **kwargs) -> Seq2SeqLMOutput:
        call = arguments(self, args, kwargs)
        labels = call.get("labels")
        if labels is None or output_logits or not (self.training and self.decoder.training):
            return self.unfused.forward(self, **call)

        ids, embeds = call.get("decoder_input_ids"), call.get("decoder_inputs_embeds")
        mask = call.get("decoder_attention_mask")
        if ids is None and embeds is None:
            ids = shift_tokens_right(labels, self.config.pad_token_id, self.config.decoder_start_token_id)
            mask = (ids != self.config.pad_token_id).long() if mask is None else mask
        check_labels(labels, ids if embeds is None else embeds)
        common = {k: call[k] for k in ("output_attentions", "output_hidden_states") if k in call}
        named = (*inspect.signature(self.unfused.forward).parameters, "num_items_in_batch")
        options = {k: x for k, x in call.items() if k not in named}
        of_decoder = {k.removeprefix("decoder_"): x for k, x in options.items() if k.startswith("decoder_")}
        of_encoder = {k: x for k, x in options.items() if not k.startswith("decoder_")}

        encoded = call.get("encoder_outputs")
        if encoded is None:
            encoded = self.encoder(
                input_ids=call.get("input_ids"),
                attention_mask=call.get("attention_mask"),
                inputs_embeds=call.get("inputs_embeds"),
                return_dict=True,
                **of_encoder,
            )
        encoded = BaseModelOutput(*encoded) if isinstance(encoded, tuple) else encoded
        states = encoded[0]
        if hasattr(self, "enc_to_dec_proj"):
            states = self.enc_to_dec_proj(states)
        decoded = self.decoder(
            input_ids=ids,
            attention_mask=mask,
            encoder_hidden_states=states,
            encoder_attention_mask=call.get("attention_mask"),
            inputs_embeds=embeds,
            targets=labels,
            return_dict=True,
            **of_decoder | common,
        )
        return Seq2SeqLMOutput(
            loss=decoded.loss,
            decoder_hidden_states=decoded.hidden_states,
            decoder_attentions=decoded.attentions,
            cross_attentions=decoded.cross_attentions,
            encoder_last_hidden_state=encoded.last_hidden_state,
            encoder_hidden_states=encoded.hidden_states,
            encoder_attentions=encoded.attentions,
        )
