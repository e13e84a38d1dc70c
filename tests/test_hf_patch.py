"""A patched model of transformers has the same results, and `undo` restores it bit for bit."""

import copy
import inspect
import pickle

import pytest
import torch
import transformers
from small_patched import MODELS, B, L, batch, build, outcome
from torch import nn

from electra_fast import hf
from electra_fast.hf.patching import OPTIONS


@pytest.mark.parametrize("name", MODELS)
def test_results_in_double_precision_are_the_same(name):
    theirs, inputs = build(name).double(), batch(name)
    ours = copy.deepcopy(theirs)
    hf.patch(ours)
    (a, da), (b, db) = outcome(ours, inputs), outcome(theirs, inputs)
    if name.endswith("ForMaskedLM"):
        assert a.keys() == {"loss"} and b.keys() == {"loss", "logits"}
    else:
        assert a.keys() == b.keys()
    assert da.keys() == db.keys()
    real = inputs["attention_mask"].bool()
    for k in a:
        x, y = (o[k][real] if o[k].shape[:2] == real.shape else o[k] for o in (a, b))
        # transformers converts labels to float32 for its binary cross-entropy.
        rtol = 1e-6 if k == "loss" else 1e-9
        torch.testing.assert_close(x.double(), y.double(), rtol=rtol, atol=1e-9)
    for k in da:
        torch.testing.assert_close(da[k], db[k], rtol=1e-6, atol=1e-9, msg=k)


def test_the_padding_row_gets_only_the_gradient_of_the_softmax():
    theirs, inputs = build("ElectraForMaskedLM").double(), batch("ElectraForMaskedLM")
    inputs.pop("attention_mask")  # Padding then takes part in everything.
    ours = copy.deepcopy(theirs)
    hf.patch(ours)
    rows = [outcome(m, inputs)[1]["electra.embeddings.word_embeddings.weight"][0] for m in (ours, theirs)]
    torch.testing.assert_close(*rows, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", MODELS)
def test_undo_restores_the_same_bits(name):
    model, inputs = build(name, dropout=0.1), batch(name)

    def run():
        torch.manual_seed(0)
        return outcome(model, inputs)

    before, state, classes = run(), model.state_dict(), [type(m) for m in model.modules()]
    with hf.patch(model) as patched:
        assert list(model.state_dict()) == list(state)
        assert all(
            torch.equal(a, b) for a, b in zip(model.state_dict().values(), state.values(), strict=True)
        )
        assert type(model).__name__ == name and isinstance(model, classes[0])
        assert inspect.signature(type(model).forward) == inspect.signature(classes[0].forward)
        run()
    assert [type(m) for m in model.modules()] == classes and "not requested" in str(patched)
    for ours, theirs in zip(run(), before, strict=True):
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_another_model_of_the_same_config_does_not_change():
    config = build().config
    one, other = (transformers.ElectraForPreTraining(config) for _ in range(2))
    inputs = batch()
    before = other.eval()(**inputs)
    hf.patch(one)
    assert "not requested" in str(hf.Patched(other)) and config._attn_implementation == "sdpa"
    assert torch.equal(other(**inputs).logits, before.logits)


@pytest.mark.parametrize("option", OPTIONS)
def test_one_option_at_a_time(option):
    for name in ("ElectraForPreTraining", "BertForMaskedLM"):
        theirs, inputs = build(name).double(), batch(name)
        ours = copy.deepcopy(theirs)
        wanted = (option, "attention", "norm", "feed_forward") if option == "layer" else (option,)
        patched = hf.patch(ours, **{o: o in wanted for o in OPTIONS})
        for row in patched.rows():
            assert row.fused == (row.of if row.option in wanted else 0), row
        (a, da), (b, db) = outcome(ours, inputs), outcome(theirs, inputs)
        torch.testing.assert_close(a["loss"].double(), b["loss"].double(), rtol=1e-6, atol=0)
        for k in da:
            torch.testing.assert_close(da[k], db[k], rtol=1e-6, atol=1e-9, msg=k)


def test_a_second_patch_changes_nothing():
    model = build()
    first = str(hf.patch(model))
    assert first.endswith("unchanged: electra.embeddings_project")
    classes = [type(m) for m in model.modules()]
    assert str(hf.patch(model)) == first and [type(m) for m in model.modules()] == classes


def test_models_that_share_an_embedding_can_be_patched_separately():
    g, d = build("ElectraForMaskedLM"), build()
    d.electra.embeddings = g.electra.embeddings
    hf.patch(g)
    hf.patch(d)
    hf.patch(nn.ModuleList([g, d]))
    assert all("0 of" not in str(hf.Patched(m)) for m in (g, d))


def test_copies_and_pickles_are_patched():
    model, inputs = build(), batch()
    hf.patch(model).model.eval()
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert str(hf.Patched(again)) == str(hf.Patched(model))
        with torch.no_grad():
            assert torch.equal(again(**inputs).loss, model(**inputs).loss)
        hf.Patched(again).undo()
        assert type(again) is transformers.ElectraForPreTraining
    assert type(model) is not transformers.ElectraForPreTraining


def test_unpatched_transformers_loads_the_saved_model(tmp_path):
    model = build("ElectraForMaskedLM").eval()
    hf.patch(model)
    model.save_pretrained(tmp_path)
    again = transformers.ElectraForMaskedLM.from_pretrained(tmp_path)
    assert again.config.architectures == ["ElectraForMaskedLM"]
    assert type(again) is transformers.ElectraForMaskedLM
    for (name, a), b in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_logits_can_be_requested():
    model, inputs = build("ElectraForMaskedLM"), batch("ElectraForMaskedLM")
    hf.patch(model)
    assert model(**inputs).logits is None
    asked = model(**inputs, output_logits=True)
    assert asked.logits.shape == (B, L, 300)
    torch.testing.assert_close(asked.loss, model(**inputs).loss, rtol=1e-5, atol=0)
    as_tuple = model(**inputs, return_dict=False)
    assert len(as_tuple) == 1 and as_tuple[0] == model(**inputs).loss
    assert model.eval()(**inputs).logits.shape == (B, L, 300)


def test_the_loss_without_labels_is_zero():
    for name in ("ElectraForMaskedLM", "ElectraForPreTraining"):
        model, inputs = build(name), batch(name)
        hf.patch(model)
        inputs["labels"] = torch.full_like(inputs["labels"], -100)
        inputs["attention_mask"] = inputs["attention_mask"] * 0
        assert model(**inputs).loss == 0


def test_the_loss_of_float_labels_is_that_of_transformers():
    theirs, inputs = build(), batch()
    ours = copy.deepcopy(theirs)
    hf.patch(ours)
    inputs["labels"] = torch.rand(B, L)
    torch.testing.assert_close(ours(**inputs).loss, theirs(**inputs).loss, rtol=1e-5, atol=0)


def test_inputs_embeds():
    theirs, inputs = build(), batch()
    ours = copy.deepcopy(theirs)
    hf.patch(ours)
    inputs["inputs_embeds"] = theirs.get_input_embeddings()(inputs.pop("input_ids")).detach()
    torch.testing.assert_close(ours(**inputs).loss, theirs(**inputs).loss, rtol=1e-5, atol=0)


def test_packed_sequences():
    model, inputs = build().eval(), batch()
    hf.patch(model)
    real = inputs["attention_mask"].bool()
    positions = torch.cat([torch.arange(n) for n in real.sum(1)])[None]
    bounds = torch.tensor([0, 20, 27, 28], dtype=torch.int32)
    packed = {
        "input_ids": inputs["input_ids"][real][None],
        "position_ids": positions,
        "cu_seq_lens_q": bounds,
    }
    packed |= {"token_type_ids": inputs["token_type_ids"][real][None], "max_length_q": 20}
    logits = model(**packed, cu_seq_lens_k=bounds, max_length_k=20).logits
    torch.testing.assert_close(logits[0], model(**inputs).logits[real], rtol=1e-4, atol=1e-5)


class Narrower(transformers.ElectraForMaskedLM):
    """A user-defined class with a forward pass of its own."""

    def forward(self, input_ids, **kwargs):
        return super().forward(input_ids[:, :5], **kwargs)


def test_a_user_defined_class_keeps_its_forward_pass():
    model = Narrower(build("ElectraForMaskedLM").config).train()
    patched = hf.patch(model)
    assert model(torch.ones(2, 9, dtype=torch.long)).logits.shape == (2, 5, 300)
    fused = {row.block: row.fused for row in patched.rows()}
    assert fused["ElectraSelfAttention"] == 2 and "Narrower" not in fused
