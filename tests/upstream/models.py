"""ELECTRA and BERT for transformers' own model tests, which are in its source distribution.

`tests/test_hf_versions.py` runs this file with ELECTRA_FAST_PATCH=1, which patches each model at the end of
its `__init__`, and without it.
"""

import os
import unittest

import torch
import transformers
from tests.test_modeling_common import ModelTesterMixin, ids_tensor, random_attention_mask
from transformers import BertConfig, ElectraConfig

SIZES = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"intermediate_size": 37, "type_vocab_size": 16}
B, L = 13, 7


class Tester:
    """A small config and a batch for the mixin."""

    batch_size, seq_length, num_choices, num_hidden_layers, hidden_size = B, L, 4, 2, 32
    is_training, num_attention_heads = True, 4

    def __init__(self, parent, config_class):
        self.parent, self.config_class = parent, config_class

    def get_config(self):
        return self.config_class(**SIZES)

    def prepare_config_and_inputs_for_common(self):
        inputs = {"input_ids": ids_tensor([B, L], 99), "token_type_ids": ids_tensor([B, L], 16)}
        return self.get_config(), inputs | {"attention_mask": random_attention_mask([B, L])}


class Common(ModelTesterMixin):
    config_class: type

    def setUp(self):
        self.model_tester = Tester(self, self.config_class)

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels=return_labels)
        if return_labels and model_class.__name__.endswith("ForPreTraining"):
            inputs["labels"] = torch.zeros(B, L, dtype=torch.long)
            if model_class.__name__.startswith("Bert"):
                inputs["next_sentence_label"] = torch.zeros(B, dtype=torch.long)
        return inputs


HEADS = ("Model", "ForPreTraining", "ForMaskedLM", "ForMultipleChoice", "ForQuestionAnswering")
HEADS += ("ForSequenceClassification", "ForTokenClassification")


def _classes(family: str) -> tuple[type, ...]:
    causal = "ForCausalLM" if family == "Electra" else "LMHeadModel"
    classes = tuple(getattr(transformers, family + head) for head in (*HEADS, causal))
    for cls in classes if os.environ.get("ELECTRA_FAST_PATCH") else ():
        _patch_after_init(cls)
    return classes


def _patch_after_init(cls: type) -> None:
    import electra_fast.hf

    init = cls.__init__

    def patched_init(self, config, *args, **kwargs):
        init(self, config, *args, **kwargs)
        electra_fast.hf.patch(self)

    cls.__init__ = patched_init


class ElectraTest(Common, unittest.TestCase):
    config_class = ElectraConfig
    all_model_classes = _classes("Electra")


class BertTest(Common, unittest.TestCase):
    config_class = BertConfig
    all_model_classes = _classes("Bert")
