"""A patched model supports every argument of transformers' forward passes, with the same results."""

import copy
import inspect

import pytest
import torch
import transformers
from small_patched import B, L, batch, build, outcome
from torch._subclasses.fake_tensor import FakeTensorMode

from electra_fast import hf

P = 4  # keys in a cache before the first token
REAL = torch.arange(L) < torch.tensor([L, 7, 1])[:, None]  # [B, L]
ADDED = torch.where(REAL, 0.0, -1e9)[:, None, None]  # [B, 1, 1, L]


def pair(name, **change):
    theirs = build(name, **change).double()
    ours = copy.deepcopy(theirs)
    return ours, hf.patch(ours), theirs


def assert_same(ours, theirs, inputs, where=...):
    """Compare results and gradients; results per token only at `where`."""
    (a, da), (b, db) = outcome(ours, inputs), outcome(theirs, inputs)
    assert da.keys() == db.keys()
    for k in a.keys() & b.keys():
        x, y = (o[k][where] if o[k].shape[:2] == (B, L) else o[k] for o in (a, b))
        torch.testing.assert_close(x.double(), y.double(), rtol=1e-6, atol=1e-9, msg=k)
    for k in db:
        torch.testing.assert_close(da[k], db[k], rtol=1e-6, atol=1e-9, msg=k)


def reasons(patched):
    return {row.block.removeprefix("Electra").removeprefix("Bert"): row.why_not for row in patched.rows()}


class WithCache(torch.nn.Module):
    """A substitute for PEFT's prefix tuning: each layer has trained keys and values."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        n, h, d = (
            getattr(model.config, k) for k in ("num_hidden_layers", "num_attention_heads", "hidden_size")
        )
        torch.manual_seed(0)
        self.prefix = torch.nn.Parameter(torch.randn(n, 2, B, h, P, d // h, dtype=torch.double))
        parameters = inspect.signature(type(model.base_model).forward).parameters
        self.name = "cache" if "cache" in parameters else "past_key_values"

    def forward(self, **inputs):
        cache = transformers.DynamicCache()
        for i, (k, v) in enumerate(self.prefix):
            cache.update(k, v, i)
        return self.model(**inputs, **{self.name: cache})


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("family", ["Electra", "Bert"])
def test_a_cache(family, masked):
    name = f"{family}ForSequenceClassification"
    ours, patched, theirs = pair(name)
    inputs = batch(name) | {"attention_mask": torch.cat([torch.ones(B, P), REAL], 1).long()}
    if not masked:
        del inputs["attention_mask"]
    ours, theirs = WithCache(ours), WithCache(theirs)
    assert_same(ours, theirs, inputs)
    assert (theirs.prefix.grad.abs() > 0).any()
    assert not any(reasons(patched)[block] for block in ("SelfAttention", "Model", "Embeddings"))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("masked", [False, True])
def test_prefix_tuning(masked):
    peft = pytest.importorskip("peft")
    name = "ElectraForSequenceClassification"
    if "past_key_values" not in inspect.signature(transformers.ElectraModel.forward).parameters:
        pytest.skip("this PEFT does not know the cache of transformers 5.24 by its new name")
    config = peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=P)
    ours, _, theirs = pair(name)
    models = []
    for model in (ours, theirs):
        torch.manual_seed(0)
        models.append(peft.get_peft_model(model, config).double())
    inputs = batch(name)
    if not masked:
        del inputs["attention_mask"]
    assert_same(*models, inputs)
    assert any("prompt" in k and p.grad.any() for k, p in models[0].named_parameters() if p.grad is not None)


MASKS = {
    "keys": (REAL[:, None, None], True),
    "keys, every sequence": (REAL[:1, None, None], True),
    "as 0.0 and 1.0": (REAL.double(), True),
    "one axis": (REAL[0], True),
    "longer": (torch.ones(B, L + 3).long(), False),
    "one row": (REAL[:1].long(), False),
    "pairs": (REAL[:, None, None].expand(B, 1, L, L), False),
    "pairs by head": (torch.ones(B, 2, L, L, dtype=torch.bool).tril(), False),
    "added to keys": (ADDED.double(), False),
    "added to pairs": (ADDED.double().expand(B, 1, L, L), False),
    "ALiBi": (-torch.arange(L, dtype=torch.double).expand(1, 2, L, L), False),
}


@pytest.mark.parametrize("name", MASKS)
def test_a_mask(name):
    mask, fused = MASKS[name]
    ours, patched, theirs = pair("ElectraForMaskedLM")
    inputs = batch("ElectraForMaskedLM") | {"attention_mask": mask}
    inputs["labels"] = torch.where(REAL, inputs["labels"], -100)
    assert_same(ours, theirs, inputs, REAL)
    why = reasons(patched)
    assert (not why["SelfAttention"] and not why["Model"]) == fused, why
    assert fused or "attention_mask is " in why["SelfAttention"] + why["Model"]


def test_a_mask_that_transformers_refuses_too():
    ours, _, theirs = pair("ElectraModel")
    inputs = batch("ElectraModel") | {"attention_mask": REAL[:, None, None].long()}
    for model in (ours, theirs):
        with pytest.raises(RuntimeError, match="Expected attn_mask dtype to be bool or float"):
            model(**inputs)


def test_labels_with_a_mask_with_four_axes():
    ours, _, theirs = pair("ElectraForPreTraining")
    assert_same(ours, theirs, batch() | {"attention_mask": REAL[:, None, None]}, REAL)


OPTIONS = {
    "output_attentions": True,
    "output_hidden_states": True,
    "position_ids": torch.arange(L - 1, -1, -1)[None],
    "use_cache": True,
    "is_causal": True,
    "num_items_in_batch": torch.tensor(3),
    "encoder_hidden_states": torch.ones(B, 5, 64, dtype=torch.double),
    "encoder_attention_mask": torch.ones(B, 5),
    "softcap": None,
    "a_word_of_the_users": 3,
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("family", ["Electra", "Bert"])
def test_an_option(family, name):
    ours, patched, theirs = pair(f"{family}ForMaskedLM")
    inputs = batch(f"{family}ForMaskedLM") | {name: OPTIONS[name]}
    inputs["labels"] = torch.where(REAL, inputs["labels"], -100)
    del inputs["attention_mask"]
    assert_same(ours, theirs, inputs)
    declines = name in ("output_attentions", "is_causal", "a_word_of_the_users")
    said = f"the last call ran unfused: {name} is given" if declines else ""
    assert reasons(patched)["SelfAttention"] == reasons(patched)["Model"] == said


@pytest.mark.parametrize("name", ["ElectraForMaskedLM", "BertForMaskedLM", "ElectraForPreTraining"])
def test_positional_arguments(name):
    ours, _, theirs = pair(name)
    inputs = batch(name)
    order = [k for k in inspect.signature(type(theirs).forward).parameters if k not in ("self", "kwargs")]
    positional = [inputs.get(k) for k in order]
    torch.testing.assert_close(ours(*positional).loss, ours(**inputs).loss, rtol=0, atol=0)
    losses = [model(*positional).loss.double() for model in (ours, theirs)]
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)


@pytest.mark.parametrize("mask", [REAL.long(), REAL[:, None, None], ADDED, None])
def test_no_value_of_a_mask_is_read(mask):
    """On a GPU the host would wait for the value. A fake tensor has no values."""
    model = build("ElectraModel").eval()
    hf.patch(model)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        mask = mask if mask is None else fake.from_tensor(mask)
        assert model(torch.ones(B, L, dtype=torch.long), mask).last_hidden_state.shape == (B, L, 64)
