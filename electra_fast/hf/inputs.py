"""A batch of transformers' collators, converted to the arguments of the ops."""

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from electra_fast.data import check_batch
from electra_fast.errors import must
from electra_fast.modules import Layout

CALL = "ElectraPretrainer: "  # the beginning of every error
PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


class Batch(NamedTuple):
    ids: Tensor  # [B, L] or, packed, [T]
    layout: Layout
    encoder: dict[str, object]  # for both encoders, in addition to the ids


def read_batch(
    halves: tuple[PreTrainedModel, PreTrainedModel],
    ids: Tensor | None,
    attention_mask: Tensor | None,
    token_type_ids: Tensor | None,
    position_ids: Tensor | None,
    options: dict[str, object],
) -> Batch:
    """Check a batch and convert it; arguments that are None are not passed to the encoders.

    Raises:
        TypeError, ValueError: the batch would not train what its arguments suggest.
        IndexError: an id is outside the vocabulary, on the CPU.
    """
    if ids is None or ids.dim() != 2:
        got = "none" if ids is None else f"shape {list(ids.shape)}"
        remedy = "masks and samples are computed from ids"
        raise ValueError(must(f"{CALL}input_ids", "be given, [B, L]", got, remedy))
    bounds = options.get("cu_seq_lens_q")
    if "labels" in options and bounds is None:
        remedy = "masking is done here: use DataCollatorWithPadding, and drop a column of labels"
        raise ValueError(must(f"{CALL}labels", "be left out", "a batch that has them", remedy))
    packing = {name: options[name] for name in PACKING if name in options}
    for name in options.keys() - {*packing, "labels"}:
        got, remedy = type(options[name]).__name__, "neither half would get it"
        raise TypeError(must(f"{CALL}{name}", "be left out", got, remedy))
    if attention_mask is not None and attention_mask.shape != ids.shape:
        rule, remedy = f"be {list(ids.shape)}, the shape of the ids", "1 is a token, 0 is padding"
        raise ValueError(must(f"{CALL}attention_mask", rule, list(attention_mask.shape), remedy))
    if bounds is not None:
        for half in halves:
            name = half.config._attn_implementation
            if name != "electra_fast" and "flash" not in name:
                remedy = 'call set_attn_implementation("electra_fast") of both halves'
                raise ValueError(must(f"{CALL}attention", "keep packed sequences apart", name, remedy))
        if attention_mask is not None or position_ids is None:
            rule, remedy = "have position_ids and no attention_mask", "use DataCollatorWithFlattening"
            raise ValueError(must(f"{CALL}a packed batch", rule, sorted(options), remedy))
    if not torch.compiler.is_compiling() and ids.device.type == "cpu":
        check_batch(ids, len(halves[0].get_input_embeddings().weight))

    embeddings = getattr(halves[0].base_model, "embeddings", None)
    if position_ids is None and hasattr(embeddings, "create_position_ids_from_input_ids"):
        # RoBERTa derives positions from the tokens that are not padding, but the generator may sample
        # padding.
        position_ids = embeddings.create_position_ids_from_input_ids(ids, embeddings.padding_idx)
    given = {"attention_mask": attention_mask, "token_type_ids": token_type_ids, "position_ids": position_ids}
    encoder = {name: x for name, x in given.items() if x is not None} | packing
    if bounds is None:
        return Batch(ids, Layout(key_mask=None if attention_mask is None else attention_mask.bool()), encoder)
    max_seqlen = int(packing.get("max_length_q", ids.numel()))
    return Batch(ids.flatten(), Layout(cu_seqlens=bounds, max_seqlen=max_seqlen), encoder)
