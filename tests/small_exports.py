"""Folders of small models with a tokenizer, for the tests of `electra_fast.export`."""

import dataclasses
import random

import torch
from small_heads import small
from small_vocabulary import PIECES, WORDS
from torch import nn
from towers import CONFIG

from electra_fast import data
from electra_fast.heads import SequenceClassifier

SIZES = dataclasses.replace(
    CONFIG, vocab_size=len(PIECES), max_positions=48, pad_id=0, cls_id=2, sep_id=3, mask_id=4
)


def folder(path, tokenizer, kind=SequenceClassifier, make=small, change=lambda head: None, **sizes):
    """Write a model with random weights, after `change`, and its tokenizer; return the folder."""
    head = make(kind, config=dataclasses.replace(SIZES, **sizes))
    change(head)
    head.save_pretrained(path)
    data.save_tokenizer(tokenizer, path)
    return path


def scorer(kind, config):
    """Return a model with one output."""
    return random_weights(kind(config, ("score",)))


def detector(kind, config):
    return random_weights(kind(config))


def random_weights(head):
    torch.manual_seed(0)
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.1)
    return head


def sentences(count, seed=0):
    """Return texts of 1 to 12 words."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(1, 12))) for _ in range(count)]


def table(path, texts, labels=None):
    """Write texts as a CSV file, with labels or without; return the file."""
    columns = [["text", *texts], *([] if labels is None else [["label", *labels]])]
    path.write_text("".join(f"{','.join(row)}\n" for row in zip(*columns, strict=True)))
    return path
