"""The two models of an ELECTRA: checks, the shared embedding and the special ids."""

from collections.abc import Collection
from typing import NamedTuple

from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from electra_fast.config import ElectraConfig
from electra_fast.errors import must
from electra_fast.hf.inputs import CALL


def check_halves(generator: PreTrainedModel, discriminator: PreTrainedModel) -> None:
    """Check that both are encoders with the same vocabulary, and that the generator predicts tokens."""
    for name, half in (("generator", generator), ("discriminator", discriminator)):
        if not isinstance(half, PreTrainedModel):
            remedy = "pass get_base_model() of a PEFT model; compile the pretrainer, not its halves"
            raise TypeError(must(f"{CALL}{name}", "be a PreTrainedModel", type(half).__name__, remedy))
        for flag in ("is_decoder", "is_encoder_decoder"):
            if getattr(half.config, flag, False):
                remedy = "both halves attend to the whole text"
                raise ValueError(must(f"{CALL}{name}.config.{flag}", "be False", True, remedy))
    if generator.get_output_embeddings() is None or generator.can_generate():
        rule, remedy = "be a masked language model", "use ElectraForMaskedLM or another …ForMaskedLM"
        raise TypeError(must(f"{CALL}generator", rule, type(generator).__name__, remedy))
    V, other = (len(half.get_input_embeddings().weight) for half in (generator, discriminator))
    if V != other:
        rule = f"have the generator's vocabulary of {V} tokens"
        remedy = "build both for one tokenizer, or call resize_token_embeddings of both"
        raise ValueError(must(f"{CALL}discriminator", rule, other, remedy))


def share_embeddings(generator: PreTrainedModel, discriminator: PreTrainedModel) -> None:
    """Give the discriminator the generator's embedding, to whose table the generator's head is tied."""
    ours, theirs = (_embeddings(half) for half in (generator, discriminator))
    # The printed forms contain classes, shapes, padding_idx, eps and dropout.
    lines = zip(str(ours).split("\n"), str(theirs).split("\n"), strict=False)
    for a, b in lines:
        if a != b:
            rule = f"have the generator's embeddings, {a.strip()}"
            remedy = "build both with the same sizes, or use share_embeddings=False"
            raise ValueError(must(f"{CALL}discriminator", rule, b.strip(), remedy))
    discriminator.base_model.embeddings = ours


def _embeddings(half: PreTrainedModel) -> nn.Module:
    embeddings = getattr(half.base_model, "embeddings", None)
    if not isinstance(embeddings, nn.Module):
        rule, remedy = "have an attribute .embeddings", "pass share_embeddings=False"
        raise ValueError(must(f"{CALL}base_model", rule, type(half.base_model).__name__, remedy))
    return embeddings


def check_sharing(generator: PreTrainedModel, discriminator: PreTrainedModel, shared: bool) -> None:
    """Check that the halves still share what they must, as modules may have been replaced after the start."""
    if shared and discriminator.base_model.embeddings is not generator.base_model.embeddings:
        rule, got = "have the generator's embeddings", "an embedding of its own"
        raise ValueError(must(f"{CALL}discriminator", rule, got, "replace it in both"))
    table, head = generator.get_input_embeddings(), generator.get_output_embeddings()
    if getattr(generator.config, "tie_word_embeddings", True) and head.weight is not table.weight:
        rule = "use its word table in its head too"
        remedy = "generator.tie_weights() ties them; config.tie_word_embeddings=False allows two tables"
        raise ValueError(must(f"{CALL}generator", rule, "a head of its own", remedy))
    for name, half in (("generator", generator), ("discriminator", discriminator)):
        V, rows = half.config.vocab_size, len(half.get_input_embeddings().weight)
        if V != rows:
            rule, remedy = f"be the {rows} rows of its table", "call resize_token_embeddings of both halves"
            raise ValueError(must(f"{CALL}{name}.config.vocab_size", rule, V, remedy))


def check_units(generator: PreTrainedModel, discriminator: PreTrainedModel) -> None:
    """Check that FSDP2 has each half's head and embedding at hand during the pretrainer's forward pass.

    It gathers the parameters of a sharded module only for that module's own forward pass, but one half reads
    parameters of the other, and the pretrainer those of the generator's head.
    """
    for name, half in (("generator", generator), ("discriminator", discriminator)):
        for subject, part in ((name, half), (f"{name}.base_model", half.base_model)):
            if isinstance(part, FSDPModule):
                remedy = "call fully_shard on the layers, then on the pretrainer"
                rule, got = "not be sharded as a whole", type(part).__name__
                raise ValueError(must(f"{CALL}{subject}", rule, got, remedy))


class SpecialIds(NamedTuple):
    mask: int
    unmasked: tuple[int, ...]  # never masked; [UNK] is not one of them
    first: int | None = None  # the id that must begin each sequence, if these ids are a guess


def special_ids_of(
    generator: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    mask_id: int | None,
    special_ids: Collection[int] | None,
) -> SpecialIds:
    """Return the special ids of the tokenizer, or the given ones, or BERT's if V is that of BERT."""
    V, first = len(generator.get_input_embeddings().weight), None
    given = [x is not None for x in (mask_id, special_ids)]
    if tokenizer is not None:
        if any(given):
            subject, remedy = f"{CALL}mask_id and special_ids", "the tokenizer determines both"
            raise ValueError(must(subject, "be left out", (mask_id, special_ids), remedy))
        if tokenizer.mask_token_id is None:
            remedy = 'add_special_tokens({"mask_token": "[MASK]"})'
            raise ValueError(must(f"{CALL}tokenizer", "have a mask token", None, remedy))
        mask_id = tokenizer.mask_token_id
        special_ids = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    elif not any(given):
        bert = ElectraConfig()
        if (V, generator.config.pad_token_id) != (bert.vocab_size, bert.pad_id):
            got, remedy = f"none for a vocabulary of {V} tokens", "or pass mask_id= and special_ids="
            raise ValueError(must(f"{CALL}tokenizer", "be given", got, remedy))
        mask_id, special_ids, first = bert.mask_id, bert.special_ids, bert.cls_id
    elif not all(given):
        subject, remedy = f"{CALL}mask_id and special_ids", "or pass the tokenizer instead"
        raise ValueError(must(subject, "be given together", (mask_id, special_ids), remedy))
    unmasked = tuple(sorted({*special_ids, mask_id}))
    if not 0 <= unmasked[0] <= unmasked[-1] < V:
        rule = f"be in [0, {V}), the vocabulary"
        remedy = "use the models' own tokenizer, or first resize_token_embeddings of both halves"
        raise ValueError(must(f"{CALL}special ids", rule, list(unmasked), remedy))
    return SpecialIds(mask_id, unmasked, first)
