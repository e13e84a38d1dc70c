"""A small pre-trained model with random weights, and what transformers says about one text at a time."""

import dataclasses

import torch

from electra_fast import data
from electra_fast.config import ElectraConfig
from electra_fast.model import Electra

CONFIG = ElectraConfig(
    vocab_size=128, max_positions=24, embedding=16, layers=2, hidden=32, heads=2, ffn=64, generator_layers=1,
    generator_hidden=16, generator_heads=1, generator_ffn=32, pad_id=0, cls_id=2, sep_id=3, mask_id=4,
)  # fmt: skip
TEXTS = ["the cat sat.", "who ran in the rain?", "a", "green, blue and red birds flew"]
# 41 tokens, almost twice as many as fit into the model.
LONG = "the red cat sat in the rain. the green dog ran. the blue bird flew in the rain, what is red? " * 2


def saved(folder, tokenizer, **change):
    """Write the folder of a run; its weights are so large that all results differ."""
    torch.manual_seed(0)
    model = Electra(dataclasses.replace(CONFIG, **change))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    for name in ("generator", "discriminator"):
        getattr(model, name).save_pretrained(folder / name)
        data.save_tokenizer(tokenizer, folder / name)
    data.save_tokenizer(tokenizer, folder / "tokenizer")
    return folder


def ids_of(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False).ids


def alone(model, ids):
    """Return the logits of transformers' model for one text without padding, without [CLS] and [SEP]."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([[CONFIG.cls_id, *ids, CONFIG.sep_id]])).logits[0, 1:-1]


def masked_alone(generator, ids, position):
    """Return the generator's log-probabilities at one masked position, ``[V]``, by transformers."""
    masked = [*ids[:position], CONFIG.mask_id, *ids[position + 1 :]]
    return alone(generator, masked)[position].log_softmax(-1)
