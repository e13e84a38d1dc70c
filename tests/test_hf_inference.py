"""A patched model of transformers in inference on a CPU: one operator per layer, also in int8."""

import copy
import pickle
import warnings

import pytest
import torch
import transformers
from small_patched import B, L, batch, build
from torch import nn

from electra_fast import hf, inference
from electra_fast.ops import encoder_layer as ops
from electra_fast.testing.budget import assert_within_budget

MODELS = ("ElectraModel", "ElectraForSequenceClassification", "BertForTokenClassification")


@pytest.fixture(autouse=True)
def _seed(seed):
    torch.manual_seed(seed)


def ready(name="ElectraModel", **options):
    """Return a model in eval mode, the same patched, and inputs without labels."""
    theirs, inputs = build(name).eval(), batch(name)
    inputs.pop("labels", None)
    ours = copy.deepcopy(theirs)
    hf.patch(ours, **options)
    return theirs, ours, inputs


def output(model, inputs):
    with torch.inference_mode():
        return model(**inputs)[0]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("way", ["float32", "bfloat16", "autocast"])
def test_results_are_within_the_error_budget(name, way, layer_calls):
    theirs, ours, inputs = ready(name)
    if way == "bfloat16":
        theirs, ours = theirs.bfloat16(), ours.bfloat16()
    exact = output(copy.deepcopy(theirs).double(), inputs)
    with torch.autocast("cpu", enabled=way == "autocast"):
        y, low = output(ours, inputs), output(theirs, inputs)
    assert len(layer_calls) == 2 and y.dtype == low.dtype
    real = inputs["attention_mask"].bool()
    y, low, exact = (x[real] if x.shape[:2] == (B, L) else x for x in (y, low, exact))
    assert_within_budget(name, y, exact, low)


def test_packed_sequences(layer_calls):
    theirs, ours, _ = ready()
    lengths = (7, 1, 12)
    ids = torch.randint(104, 300, (1, sum(lengths)))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    bounds = torch.tensor([0, 7, 8, 20], dtype=torch.int32)
    packed = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 12, "max_length_k": 12}
    y = output(ours, {"input_ids": ids, "position_ids": positions, **packed})
    alone = [output(theirs, {"input_ids": part}) for part in ids.split(lengths, dim=1)]
    torch.testing.assert_close(y, torch.cat(alone, dim=1), rtol=1e-4, atol=1e-5)
    assert len(layer_calls) == 2


def test_int8_keeps_the_predictions(layer_calls):
    """Errors of ONNX Runtime's dynamic quantisation of the same kind of model are 0.7 to 2.5 %."""
    theirs, ours, inputs = ready("ElectraForSequenceClassification", int8=True)
    exact, y = output(theirs, inputs), output(ours, inputs)
    assert layer_calls == [ops.pack([torch.ones(1, 1)], [torch.ones(1)], torch.int8)[0].dtype] * 2
    assert 0 < (y - exact).norm() < 0.02 * exact.norm()


def test_int8_is_for_inference(layer_calls):
    _, ours, inputs = ready(int8=True)
    with pytest.warns(inference.Int8Warning, match="int8 was requested, .*: gradients are enabled"):
        ours(**inputs)
    assert not layer_calls
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours.train()(**inputs)[0].sum().backward()
        output(ours.eval(), inputs)
    assert len(layer_calls) == 2


def test_int8_without_the_layer_is_refused():
    with pytest.raises(ValueError, match=r"hf\.patch: int8 must be False without the options attention"):
        hf.patch(build(), int8=True, norm=False)
    model = build()
    hf.patch(model)
    with pytest.raises(ValueError, match="with other options, got int8=False; undo"):
        hf.patch(model, int8=True)


def test_undo_and_the_table():
    theirs, ours, inputs = ready(int8=True)
    patched = hf.Patched(ours)
    assert {row.option: row.fused for row in patched.rows()}["layer"] == 2
    patched.undo()
    assert torch.equal(output(ours, inputs), output(theirs, inputs))
    assert all("int8" not in vars(m) for m in ours.modules())


def test_the_table_says_why_a_call_did_not_use_it(layer_calls):
    _, ours, inputs = ready()
    ours(**inputs)
    assert "gradients are enabled; call the model under torch.inference_mode()" in str(hf.Patched(ours))
    output(ours, inputs)
    assert "gradients" not in str(hf.Patched(ours)) and len(layer_calls) == 2


def test_hidden_states_are_recorded(layer_calls):
    theirs, ours, inputs = ready()
    with torch.inference_mode():
        states = [m(**inputs, output_hidden_states=True).hidden_states for m in (ours, theirs)]
    real = inputs["attention_mask"].bool()
    for x, y in zip(*states, strict=True):
        torch.testing.assert_close(x[real], y[real], rtol=1e-4, atol=1e-5)
    output(ours, inputs)
    assert len(layer_calls) == 4


def test_attention_weights_are_returned_by_the_eager_implementation(layer_calls):
    _, ours, inputs = ready()
    ours.set_attn_implementation("eager")
    with torch.inference_mode():
        assert len(ours(**inputs, output_attentions=True).attentions) == 2
    assert not layer_calls


@pytest.mark.parametrize("activation", ["relu", "gelu_new", "gelu_pytorch_tanh"])
def test_another_activation_runs_in_blocks(activation, layer_calls):
    theirs = build("ElectraModel", hidden_act=activation).eval()
    ours, inputs = copy.deepcopy(theirs), batch("ElectraModel")
    hf.patch(ours)
    real = inputs["attention_mask"].bool()
    y, expected = (output(m, inputs)[real] for m in (ours, theirs))
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    assert not layer_calls


def test_hooks_inside_a_layer_are_called(layer_calls):
    _, ours, inputs = ready()
    seen = []
    ours.encoder.layer[0].attention.self.key.register_forward_hook(lambda *_: seen.append(1))
    output(ours, inputs)
    assert seen == [1] and len(layer_calls) == 1


def test_copies_pickles_and_files_do_not_contain_packed_weights(tmp_path):
    _, ours, inputs = ready("ElectraForSequenceClassification", int8=True)
    size, state = len(pickle.dumps(ours)), set(ours.state_dict())
    y = output(ours, inputs)
    assert len(pickle.dumps(ours)) == size and set(ours.state_dict()) == state
    for again in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(output(again, inputs), y)
    ours.save_pretrained(tmp_path)
    again = transformers.ElectraForSequenceClassification.from_pretrained(tmp_path).eval()
    hf.patch(again, int8=True)
    assert torch.equal(output(again, inputs), y)


# --- weights that change ---


def lora(model):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["query", "value", "dense"], r=4, init_lora_weights=False)
    return peft.get_peft_model(model, config)


def is_fresh(model, inputs):
    """Return whether a model gives the result of a copy, which has no packed weights."""
    return torch.equal(output(model, inputs), output(copy.deepcopy(model), inputs))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("int8", [False, True])
def test_a_merged_lora_is_used(int8, layer_calls):
    _, ours, inputs = ready(int8=int8)
    before = output(ours, inputs)
    adapted = lora(ours)
    layer_calls.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", inference.Int8Warning)
        with_adapter = output(adapted, inputs)
        adapted.merge_adapter()
        merged = output(adapted, inputs)
    assert not layer_calls
    torch.testing.assert_close(merged, with_adapter, rtol=1e-3, atol=1e-4)
    adapted.unmerge_adapter()
    ours = adapted.merge_and_unload()
    after = output(ours, inputs)
    assert len(layer_calls) == 2 and not torch.equal(after, before)
    torch.testing.assert_close(
        after, with_adapter, **({"rtol": 0, "atol": 0.3} if int8 else {"rtol": 1e-3, "atol": 1e-4})
    )
    assert is_fresh(ours, inputs)


def step(model, inputs):
    model.train()(**inputs)[0].square().mean().backward()
    torch.optim.AdamW(model.parameters(), lr=0.1).step()
    model.eval()


def data(model, inputs):
    model.encoder.layer[1].attention.self.query.weight.data *= 3


def data_assigned(model, inputs):
    linear = model.encoder.layer[1].intermediate.dense
    linear.weight.data = torch.randn_like(linear.weight)


def load(model, inputs):
    model.load_state_dict(build("ElectraModel").state_dict())


def replaced(model, inputs):
    model.encoder.layer[0].output.dense = nn.Linear(96, 64)


@pytest.mark.parametrize("change", [step, data, data_assigned, load, replaced], ids=lambda f: f.__name__)
@pytest.mark.parametrize("int8", [False, True])
def test_changed_weights_are_used(change, int8, layer_calls):
    _, ours, inputs = ready(int8=int8)
    before = output(ours, inputs)
    change(ours, inputs)
    assert not torch.equal(output(ours, inputs), before) and is_fresh(ours, inputs)
    assert len(layer_calls) == 2 * 4  # `is_fresh` runs the model and a copy
