"""What makes two models of transformers an ELECTRA: the checks, the shared embedding, the special ids."""

from collections.abc import Collection
from typing import NamedTuple

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from electra_fast.config import ElectraConfig
from electra_fast.hf.inputs import refuse


def check_halves(generator: PreTrainedModel, discriminator: PreTrainedModel) -> None:
    """Refuse what is no encoder, a generator without a vocabulary, and two vocabularies."""
    for name, half in (("generator", generator), ("discriminator", discriminator)):
        if not isinstance(half, PreTrainedModel):
            remedy = "of a PEFT model pass get_base_model(), and compile the pretrainer, not its halves"
            refuse(name, "be a PreTrainedModel", type(half).__name__, remedy, TypeError)
        for flag in ("is_decoder", "is_encoder_decoder"):
            if getattr(half.config, flag, False):
                refuse(f"{name}.config.{flag}", "be False", True, "both halves see the whole text")
    if generator.get_output_embeddings() is None or generator.can_generate():
        remedy = "take ElectraForMaskedLM or another …ForMaskedLM"
        refuse("generator", "be a masked language model", type(generator).__name__, remedy, TypeError)
    V, other = (len(half.get_input_embeddings().weight) for half in (generator, discriminator))
    if V != other:
        remedy = "build both for one tokenizer, or call resize_token_embeddings of both"
        refuse("discriminator", f"have the generator's vocabulary of {V} tokens", other, remedy)


def share_embeddings(generator: PreTrainedModel, discriminator: PreTrainedModel) -> None:
    """Give the discriminator the generator's embedding; the other way round the head would lose its table."""
    ours, theirs = (_embeddings(half) for half in (generator, discriminator))
    # As printed: kinds, shapes, padding_idx, eps and dropout.
    lines = zip(str(ours).split("\n"), str(theirs).split("\n"), strict=False)
    for a, b in lines:
        if a != b:
            remedy = "build both alike, or leave each its own with share_embeddings=False"
            refuse("discriminator", f"have the generator's embeddings, {a.strip()}", b.strip(), remedy)
    discriminator.base_model.embeddings = ours


def _embeddings(half: PreTrainedModel) -> nn.Module:
    embeddings = getattr(half.base_model, "embeddings", None)
    if not isinstance(embeddings, nn.Module):
        kind = type(half.base_model).__name__
        refuse("base_model", "hold its embeddings as .embeddings", kind, "pass share_embeddings=False")
    return embeddings


def check_sharing(generator: PreTrainedModel, discriminator: PreTrainedModel, shared: bool) -> None:
    """Refuse halves in which something was exchanged since: they would train something else."""
    if shared and discriminator.base_model.embeddings is not generator.base_model.embeddings:
        got = "an embedding of its own"
        refuse("discriminator", "have the generator's embeddings", got, "exchange it in both")
    table, head = generator.get_input_embeddings(), generator.get_output_embeddings()
    if getattr(generator.config, "tie_word_embeddings", True) and head.weight is not table.weight:
        remedy = "generator.tie_weights() ties them; config.tie_word_embeddings=False says that it need not"
        refuse("generator", "multiply by the word table that it looks up", "a head of its own", remedy)
    for name, half in (("generator", generator), ("discriminator", discriminator)):
        V, rows = half.config.vocab_size, len(half.get_input_embeddings().weight)
        if V != rows:
            remedy = "call resize_token_embeddings of both halves"
            refuse(f"{name}.config.vocab_size", f"be the {rows} rows of its table", V, remedy)


class SpecialIds(NamedTuple):
    mask: int
    unmasked: tuple[int, ...]  # never masked; [UNK] is not one of them
    first: int | None = None  # what must begin a sequence, where these ids are a guess


def special_ids_of(
    generator: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    mask_id: int | None,
    special_ids: Collection[int] | None,
) -> SpecialIds:
    """Return the tokenizer's, the given ones, or for a vocabulary of BERT's uncased size BERT's."""
    V, first = len(generator.get_input_embeddings().weight), None
    given = [x is not None for x in (mask_id, special_ids)]
    if tokenizer is not None:
        if any(given):
            got = (mask_id, special_ids)
            refuse("mask_id and special_ids", "be left out", got, "the tokenizer says both")
        if tokenizer.mask_token_id is None:
            remedy = 'add_special_tokens({"mask_token": "[MASK]"})'
            refuse("tokenizer", "have a mask token", None, remedy)
        mask_id = tokenizer.mask_token_id
        special_ids = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    elif not any(given):
        bert = ElectraConfig()
        if (V, generator.config.pad_token_id) != (bert.vocab_size, bert.pad_id):
            got = f"none for a vocabulary of {V} tokens"
            refuse("tokenizer", "be given", got, "or pass mask_id= and special_ids=")
        mask_id, special_ids, first = bert.mask_id, bert.special_ids, bert.cls_id
    elif not all(given):
        got = (mask_id, special_ids)
        refuse("mask_id and special_ids", "be given together", got, "or pass the tokenizer instead")
    unmasked = tuple(sorted({*special_ids, mask_id}))
    if not 0 <= unmasked[0] <= unmasked[-1] < V:
        remedy = "take the models' own tokenizer, or resize_token_embeddings of both halves before"
        refuse("special ids", f"be in [0, {V}), the vocabulary", list(unmasked), remedy)
    return SpecialIds(mask_id, unmasked, first)
