"""A block of an unknown class is not patched, and the table names the reason."""

import copy
import subprocess
import sys

import pytest
import torch
import transformers
from small_patched import batch, build, encoder_decoder, outcome
from transformers.models.electra import modeling_electra as electra

from electra_fast import hf
from electra_fast.hf.patching import BLOCKS


def argument_renamed(forward):
    return lambda self, states: forward(self, states)


def argument_added(forward):
    return lambda self, hidden_states, input_tensor, scale=0.5: (
        scale * forward(self, hidden_states, input_tensor)
    )


def arguments_removed(forward):
    return lambda self, input_ids=None, **others: forward(self, input_ids, **others)


def arguments_reordered(forward):
    def new(self, hidden_states, cache=None, attention_mask=None, **others):
        return forward(self, hidden_states, attention_mask, **others)

    return new


def arguments_by_name(forward):
    return lambda self, input_ids=None, *, attention_mask=None, **others: forward(
        self, input_ids, attention_mask, **others
    )


def labels_first(forward):
    def new(self, input_ids=None, labels=None, attention_mask=None, **others):
        return forward(self, input_ids, attention_mask=attention_mask, labels=labels, **others)

    return new


CHANGES = {
    "ElectraIntermediate": (argument_renamed, "forward(states) must be forward(hidden_states)"),
    "ElectraOutput": (argument_added, "forward(hidden_states, input_tensor, scale) must be forward(hidden"),
    "ElectraEmbeddings": (arguments_removed, "forward(input_ids, **others) must be forward(input_ids, token"),
    "ElectraSelfAttention": (arguments_reordered, "forward(hidden_states, cache, attention_mask, **others)"),
    "ElectraModel": (arguments_by_name, "forward(input_ids, *, attention_mask, **others) must be"),
    "ElectraForMaskedLM": (labels_first, "forward(input_ids, labels, attention_mask, **others) must"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_forward_pass_is_kept_and_named(name, monkeypatch):
    cls, (change, message) = getattr(electra, name), CHANGES[name]
    monkeypatch.setattr(cls, "forward", change(cls.forward))
    theirs, inputs = build("ElectraForMaskedLM").double(), batch("ElectraForMaskedLM")
    ours = copy.deepcopy(theirs)
    patched = hf.patch(ours)
    (a, da), (b, db) = outcome(ours, inputs), outcome(theirs, inputs)
    torch.testing.assert_close(a["loss"], b["loss"], rtol=1e-6, atol=0)
    for k in db:
        torch.testing.assert_close(da[k], db[k], rtol=1e-6, atol=1e-9, msg=k)
    rows = {row.block: row for row in patched.rows()}
    assert rows[name].fused == 0
    assert rows[name].why_not.startswith(f"transformers {transformers.__version__}: {message}")
    # Only a fused attention can read the mask that a fused encoder passes on. A whole layer needs its blocks.
    plain = {name} | ({"ElectraModel"} if name == "ElectraSelfAttention" else set())
    plain |= (
        {"ElectraLayer"}
        if name in ("ElectraSelfAttention", "ElectraIntermediate", "ElectraOutput")
        else set()
    )
    assert {row.block for row in patched.rows() if row.of and row.fused < row.of} == plain
    patched.undo()


def test_every_class_of_the_installed_transformers_is_known():
    names = ("ElectraForPreTraining", "ElectraForMaskedLM", "BertForMaskedLM")
    models = [*map(build, names), encoder_decoder("Electra"), encoder_decoder("Bert")]
    modules = [module for model in models for module in model.modules() if type(module) in BLOCKS]
    assert {type(module) for module in modules} == set(BLOCKS) and len(BLOCKS) == 27
    assert all(BLOCKS[type(module)].mismatch(module) is None for module in modules)


def test_a_missing_attribute_is_named():
    attention = build().electra.encoder.layer[0].attention.self
    del attention.scaling
    assert BLOCKS[type(attention)].mismatch(attention) == "it has no scaling"


MISSING = """
from transformers.models.electra import modeling_electra as electra
cls = electra.ElectraIntermediate
del electra.ElectraIntermediate
from electra_fast import hf
electra.ElectraIntermediate = cls
model = electra.ElectraModel(electra.ElectraConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
del electra.ElectraIntermediate
print(hf.patch(model))
"""


def test_a_missing_class_is_named():
    done = subprocess.run([sys.executable, "-c", MISSING], capture_output=True, text=True, check=True)
    (row,) = (line for line in done.stdout.splitlines() if line.startswith("feed_forward"))
    assert row.endswith(f"transformers {transformers.__version__} has no ElectraIntermediate")
