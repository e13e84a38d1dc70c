"""The errors of `ElectraPretrainer` about wrong models, ids and batches name the remedy."""

import copy

import pytest
import torch
from small_halves import (
    SIZES,
    SPECIAL,
    L,
    V,
    assert_tied,
    batch,
    electra,
    halves,
    packed,
    pretrainer,
    tokenizer,
)
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForTokenClassification,
    BertLMHeadModel,
    BertModel,
    ElectraForPreTraining,
)

from electra_fast.hf import ElectraPretrainer


def wrong_halves():
    masked, tagger = halves()
    decoder = {"is_decoder": True, "use_cache": False}
    bert, bert_tagger = halves("bert", **decoder)
    language_model = BertLMHeadModel(BertConfig(**SIZES))
    yield "no vocabulary", (tagger, tagger), "generator must be a masked language model, got ElectraForPre"
    yield "causal", (language_model, tagger), "generator must be a masked language model, got BertLMHeadModel"
    yield "decoder", (bert, tagger), "generator.config.is_decoder must be False"
    yield "decoding tagger", (masked, bert_tagger), "discriminator.config.is_decoder must be False"
    yield "no model", (masked, torch.nn.Linear(1, 1)), "discriminator must be a PreTrainedModel, got Linear"
    yield "vocabularies", (halves(vocab_size=200)[0], tagger), "vocabulary of 200 tokens, got 300"
    shapes = r"Embedding\(300, 24, padding_idx=0\), got .*Embedding\(300, 20, .*share_embeddings=False"
    yield "shapes", (masked, ElectraForPreTraining(electra(embedding_size=20))), shapes
    dropout = r"Dropout\(p=0.1, .*, got .*Dropout\(p=0.2, "
    yield "dropout", (masked, halves(hidden_dropout_prob=0.2)[1]), dropout
    yield "kinds", (masked, halves("bert")[1]), r"ElectraEmbeddings\(, got BertEmbeddings\("


@pytest.mark.parametrize("pair, message", [x[1:] for x in wrong_halves()], ids=[x[0] for x in wrong_halves()])
def test_unsuitable_models_are_refused(pair, message):
    before = pair[1].state_dict().keys()
    with pytest.raises((TypeError, ValueError), match=f"^ElectraPretrainer: .*{message}"):
        ElectraPretrainer(*pair, **SPECIAL)
    assert pair[1].state_dict().keys() == before
    if "share_embeddings" in message:
        ElectraPretrainer(*pair, **SPECIAL, share_embeddings=False)(**batch(24, 11))


WRONG_IDS = {
    "nothing": ({}, "tokenizer must be given, got none for a vocabulary of 300 tokens; or pass mask_id= and"),
    "half": ({"mask_id": 103}, r"must be given together, got \(103, None\)"),
    "outside": (SPECIAL | {"mask_id": V}, r"must be in \[0, 300\), the vocabulary, got \[0, 101, 102, 300\]"),
    "negative": (SPECIAL | {"special_ids": (-1,)}, r"must be in \[0, 300\)"),
    "no mask": ({"tokenizer": tokenizer()}, "tokenizer must have a mask token, got None; add_special_tokens"),
    "twice": ({"tokenizer": tokenizer(mask_token="w4"), "mask_id": 4}, r"be left out, got \(4, None\)"),
}


@pytest.mark.parametrize("options, message", WRONG_IDS.values(), ids=WRONG_IDS)
def test_unknown_special_ids_are_refused(options, message):
    with pytest.raises(ValueError, match=f"^ElectraPretrainer: .*{message}"):
        ElectraPretrainer(*halves(), **options)


WRONG_BATCHES = {
    "no ids": ({"input_ids": None}, "input_ids must be given, .* got none"),
    "embedded": ({"input_ids": None, "inputs_embeds": torch.zeros(2, L, 24)}, "input_ids must be given"),
    "one axis": (
        {"input_ids": torch.full((L,), 150)},
        r"input_ids must be given, \[B, L\], got shape \[24\]",
    ),
    "labels": ({"labels": torch.zeros(2, L)}, "labels must be left out, .*; masking is done here"),
    "outputs": ({"output_attentions": True}, "output_attentions must be left out, got bool"),
    "4-D": (
        {"attention_mask": torch.ones(2, 1, L, L)},
        r"attention_mask must be \[2, 24\], .* got \[2, 1, 24",
    ),
    "outside": (
        {"input_ids": torch.full((2, L), V)},
        r"ids must be in \[0, 300\), got 300 at row 0, column 0",
    ),
    "packed": (
        {"cu_seq_lens_q": torch.tensor([0, L])},
        "must keep packed sequences apart, got eager; call set_",
    ),
}


@pytest.mark.parametrize("change, message", WRONG_BATCHES.values(), ids=WRONG_BATCHES)
def test_wrong_batches_are_refused(change, message):
    with pytest.raises((TypeError, ValueError, IndexError), match=message):
        pretrainer()(**batch(24, 11) | change)


@pytest.mark.parametrize("order", [("generator", "discriminator"), ("discriminator", "generator")])
def test_a_vocabulary_is_resized_in_both_halves(order, tmp_path):
    model = pretrainer()
    first, second = (getattr(model, half) for half in order)
    first.resize_token_embeddings(V + 8)
    with pytest.raises(
        ValueError, match=f"{order[1]}.config.vocab_size must be the 308 rows of .*, got 300;"
    ):
        model(**batch(24, 11))
    second.resize_token_embeddings(V + 8)
    assert_tied(model)
    model(**batch(24, 11)).loss.backward()
    for half in (first, second):
        half.save_pretrained(tmp_path)
        type(half).from_pretrained(tmp_path)


def test_a_packed_batch_needs_positions():
    inputs = packed(*batch(24, 24)["input_ids"])
    del inputs["position_ids"]
    with pytest.raises(ValueError, match="a packed batch must have position_ids and no attention_mask, got"):
        pretrainer(attention="electra_fast")(**inputs)


def test_a_discriminator_without_one_logit_per_token_is_refused():
    generator, _ = halves("bert")
    for wrong, got in (
        (BertForTokenClassification(BertConfig(**SIZES, num_labels=2)), r"logits of shape \[2, 24, 2\]"),
        (BertForMaskedLM(BertConfig(**SIZES)), r"logits of shape \[2, 24, 300\]"),
        (BertModel(BertConfig(**SIZES)), "none"),
    ):
        model = ElectraPretrainer(generator, wrong, **SPECIAL)
        with pytest.raises(
            ValueError, match=rf"return one logit per token, \[2, 24\], got {got}; use Electra"
        ):
            model(**batch(24, 11))


def test_replaced_embeddings_and_heads_are_refused():
    model = pretrainer()
    model.discriminator.electra.embeddings = copy.deepcopy(model.generator.electra.embeddings)
    with pytest.raises(
        ValueError, match="discriminator must have the generator's embeddings, got an embedding"
    ):
        model(**batch(24, 11))
    generator, discriminator = halves()
    generator.electra.embeddings = discriminator.electra.embeddings  # the wrong direction
    with pytest.raises(ValueError, match=r"a head of its own; generator.tie_weights\(\) ties them"):
        ElectraPretrainer(generator, discriminator, **SPECIAL)(**batch(24, 11))
    generator.tie_weights()
    ElectraPretrainer(generator, discriminator, **SPECIAL)(**batch(24, 11))
