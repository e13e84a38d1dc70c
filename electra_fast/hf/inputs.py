"""A batch as transformers' collators make it, in this package's terms."""

from typing import NamedTuple, NoReturn

import torch
from torch import Tensor
from transformers import PreTrainedModel

from electra_fast.data import check_batch

PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


class Batch(NamedTuple):
    ids: Tensor  # [B, L] or, packed, [T]
    layout: dict[str, object]  # for the ops: key_mask, or cu_seqlens and max_seqlen
    encoder: dict[str, object]  # for both encoders, beside the ids


def refuse(argument: str, rule: str, got: object, remedy: str, error: type = ValueError) -> NoReturn:
    raise error(f"ElectraPretrainer: {argument} must {rule}, got {got}; {remedy}")


def read_batch(
    halves: tuple[PreTrainedModel, PreTrainedModel],
    ids: Tensor | None,
    attention_mask: Tensor | None,
    token_type_ids: Tensor | None,
    position_ids: Tensor | None,
    options: dict[str, object],
) -> Batch:
    """Refuse a batch that would train something else than it seems to; what is None is not handed on."""
    if ids is None or ids.dim() != 2:
        got = "none" if ids is None else f"shape {list(ids.shape)}"
        refuse("input_ids", "be given, [B, L]", got, "masks and samples are made of ids")
    bounds = options.get("cu_seq_lens_q")
    if "labels" in options and bounds is None:
        remedy = "masking is done here: take DataCollatorWithPadding, and drop a column of labels"
        refuse("labels", "be left out", "a batch that has them", remedy)
    packing = {name: options[name] for name in PACKING if name in options}
    for name in options.keys() - {*packing, "labels"}:
        refuse(name, "be left out", type(options[name]).__name__, "neither half is given it", TypeError)
    if attention_mask is not None and attention_mask.shape != ids.shape:
        remedy = "1 is a token, 0 padding"
        refuse("attention_mask", f"be {list(ids.shape)}, the ids' shape", list(attention_mask.shape), remedy)
    if bounds is not None:
        for half in halves:
            name = half.config._attn_implementation
            if name != "electra_fast" and "flash" not in name:
                remedy = 'call set_attn_implementation("electra_fast") of both halves'
                refuse("attention", "keep packed sequences apart", name, remedy)
        if attention_mask is not None or position_ids is None:
            remedy = "as DataCollatorWithFlattening makes them"
            refuse("a packed batch", "have position_ids and no attention_mask", sorted(options), remedy)
    if not torch.compiler.is_compiling() and ids.device.type == "cpu":
        check_batch(ids, len(halves[0].get_input_embeddings().weight))

    embeddings = getattr(halves[0].base_model, "embeddings", None)
    if position_ids is None and hasattr(embeddings, "create_position_ids_from_input_ids"):
        # RoBERTa counts what is not padding, and a generator may draw the id of padding.
        position_ids = embeddings.create_position_ids_from_input_ids(ids, embeddings.padding_idx)
    given = {"attention_mask": attention_mask, "token_type_ids": token_type_ids, "position_ids": position_ids}
    encoder = {name: x for name, x in given.items() if x is not None} | packing
    if bounds is None:
        return Batch(ids, {"key_mask": None if attention_mask is None else attention_mask.bool()}, encoder)
    longest = packing.get("max_length_q", ids.numel())
    return Batch(ids.flatten(), {"cu_seqlens": bounds, "max_seqlen": int(longest)}, encoder)
