"""Two small models of transformers that form an ELECTRA, and a batch for them."""

import copy

import torch
from tokenizers import Tokenizer, models
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForTokenClassification,
    DataCollatorWithFlattening,
    ElectraConfig,
    ElectraForMaskedLM,
    ElectraForPreTraining,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForTokenClassification,
)

from electra_fast.hf import ElectraPretrainer

V, L = 300, 24
SIZES = {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 48, "max_position_embeddings": 40}
SPECIAL = {"mask_id": 103, "special_ids": (0, 101, 102)}
RNG = torch.tensor([-7, 3])


def electra(hidden=32, **change):
    return ElectraConfig(**SIZES | {"hidden_size": hidden, "embedding_size": 24} | change)


def halves(name="electra", **change):
    if name == "electra":
        return ElectraForMaskedLM(electra(16, **change)), ElectraForPreTraining(electra(**change))
    masked, tagger, config = {
        "bert": (BertForMaskedLM, BertForTokenClassification, BertConfig),
        "roberta": (RobertaForMaskedLM, RobertaForTokenClassification, RobertaConfig),
    }[name]
    config = config(**SIZES | change, num_labels=1, pad_token_id=0)
    return masked(config), tagger(copy.deepcopy(config))


def pretrainer(name="electra", attention="eager", options=SPECIAL, **change):
    generator, discriminator = halves(name, **change)
    for half in (generator, discriminator):
        half.set_attn_implementation(attention)
    return ElectraPretrainer(generator, discriminator, **options)


def batch(*lengths):
    """Sentences [CLS] tokens [SEP], padded to L."""
    n, position = torch.tensor(lengths)[:, None], torch.arange(L)
    ids = torch.randint(104, V, (len(lengths), L))
    ids = ids.masked_fill(position == 0, 101).masked_fill(position == n - 1, 102)
    return {"input_ids": ids.masked_fill(position >= n, 0), "attention_mask": (position < n).long()}


def assert_tied(model):
    generator, discriminator = model.generator, model.discriminator
    assert discriminator.base_model.embeddings is generator.base_model.embeddings
    assert generator.get_output_embeddings().weight is generator.get_input_embeddings().weight


def packed(*documents):
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_tensors="pt")
    return collator([{"input_ids": ids.tolist()} for ids in documents])


def tokenizer(**special):
    words = {f"w{i}": i for i in range(V)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, "w9")), **special)
