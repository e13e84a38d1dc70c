"""A patched model works with other tools: hooks, adapters, quantisation, compilers, autocast, sharding."""

import copy

import pytest
import torch
from small_patched import B, L, batch, build, outcome
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import prune

from electra_fast import hf

# Dynamo instantiates each class that it traces, and after a graph break reads .grad of every tensor.
compiles = pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning",
    "ignore:The .grad attribute of a Tensor that is not",
)


def test_hooks_and_recorded_states_work():
    theirs, inputs = build("ElectraModel").eval(), batch("ElectraModel")
    ours = copy.deepcopy(theirs)
    hf.patch(ours)
    seen = []
    for model in (ours, theirs):
        model.encoder.layer[0].output.register_forward_hook(lambda m, args, y: seen.append(y))
    real = inputs["attention_mask"].bool()
    states = [m(**inputs, output_hidden_states=True).hidden_states for m in (ours, theirs)]
    assert len(states[0]) == len(states[1]) == 3
    for x, y in (*zip(*states, strict=True), seen):
        torch.testing.assert_close(x[real], y[real], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("way", ["hook", "pre-hook", "forward"])
def test_hooks_of_a_layer_whose_parameters_an_op_reads_are_called(way):
    model, inputs, seen = build(), batch(), []
    patched = hf.patch(model)
    dense = model.electra.encoder.layer[0].intermediate.dense
    if way == "hook":
        dense.register_forward_hook(lambda *_: seen.append(1))
    elif way == "pre-hook":
        dense.register_forward_pre_hook(lambda *_: seen.append(1))
    else:
        own = dense.forward
        dense.forward = lambda x: seen.append(1) or own(x)
    model(**inputs)
    rows = {row.block: (row.fused, row.of, row.why_not) for row in patched.rows()}
    assert seen == [1] and rows["ElectraIntermediate"] == (1, 2, "dense has hooks")


def test_attention_weights_are_returned_by_the_eager_implementation():
    model = build().eval()
    hf.patch(model)
    assert model(**batch(), output_attentions=True).logits.shape == (B, L)
    model.set_attn_implementation("eager")
    assert model(**batch(), output_attentions=True).attentions[0].shape == (B, 2, L, L)
    assert 'the config asks for "eager"' in str(hf.Patched(model))


def test_gradient_checkpointing_replays_dropout():
    model, inputs = build("ElectraForMaskedLM", dropout=0.2), batch("ElectraForMaskedLM")
    # transformers adds a hook to the word embeddings, so these would run unfused, with other random numbers.
    hf.patch(model, embeddings=False)
    runs = []
    for enable in (False, True):
        if enable:
            for layer in model.electra.encoder.layer:
                layer.gradient_checkpointing = True
                layer._gradient_checkpointing_func = _checkpoint
        torch.manual_seed(3)
        runs.append(outcome(model, inputs))
    for a, b in zip(*runs, strict=True):
        assert a and all(torch.equal(a[k], b[k]) for k in a)


def _checkpoint(function, *args):
    return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False)


def test_dropout_drops_and_obeys_manual_seed():
    model, inputs = build(dropout=0.5), batch()
    hf.patch(model)
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(model(**inputs).loss)
    assert losses[0] == losses[1] != losses[2]
    model.electra.encoder.layer[0].output.dropout.eval()  # a single dropout layer
    torch.manual_seed(1)
    assert model(**inputs).loss != losses[0]


@pytest.mark.parametrize("part", ["embeddings", "attention.self", "attention.output", "layer.1.output"])
def test_dropout_of_each_part(part):
    model, inputs = build(dropout=0.5), batch()
    hf.patch(model)
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Dropout) and part not in name:
            layer.p = 0.0
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(model(**inputs).loss)
    assert losses[0] == losses[1] != losses[2]
    assert torch.equal(model.eval()(**inputs).loss, model(**inputs).loss)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # in PEFT
def test_lora():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["query", "value", "dense"], init_lora_weights=False)
    torch.manual_seed(0)
    theirs = peft.get_peft_model(build("ElectraForSequenceClassification"), config)
    ours = copy.deepcopy(theirs)
    patched = hf.patch(ours)
    inputs = batch("ElectraForSequenceClassification")
    (a, da), (b, db) = outcome(ours, inputs), outcome(theirs, inputs)
    torch.testing.assert_close(a["loss"], b["loss"], rtol=1e-5, atol=0)
    assert da.keys() == db.keys() and any("lora_A" in k for k in da)
    for k in da:
        torch.testing.assert_close(da[k], db[k], rtol=1e-3, atol=1e-6, msg=k)
    rows = {row.block: (row.fused, row.of, row.why_not) for row in patched.rows()}
    assert rows["ElectraIntermediate"] == (0, 2, "dense is peft.tuners.lora.layer.Linear")
    assert rows["ElectraSelfOutput"] == rows["ElectraSelfAttention"] == (2, 2, "")


class Quantised(torch.Tensor):
    """A substitute for torchao's tensors, which no operator of this package can read."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if "electra_fast" in str(function):
            raise NotImplementedError(f"Quantised dispatch: {function}")
        with torch._C.DisableTorchFunctionSubclass():
            y = function(*args, **kwargs or {})
        return y.as_subclass(cls) if function is torch.Tensor.detach else y  # required by `nn.Parameter`


def quantise(linear):
    linear.weight = nn.Parameter(linear.weight.detach().mul(8).round().div(8).as_subclass(Quantised), False)


class Quantiser(nn.Module):
    """A parametrisation."""

    def forward(self, weight):
        return weight.mul(8).round().div(8)


class OwnLinear(nn.Linear):
    """A substitute for bitsandbytes' linear layers, which replace the class."""

    def forward(self, x):
        return super().forward(x).mul(2)


WAYS = {
    "tensor": (quantise, "dense.weight is test_hf_patch_with_others.Quantised"),
    "class": (lambda m: setattr(m, "__class__", OwnLinear), "dense is test_hf_patch_with_others.OwnLinear"),
    "parametrisation": (
        lambda m: nn.utils.parametrize.register_parametrization(m, "weight", Quantiser()),
        "dense is torch.nn.utils.parametrize.ParametrizedLinear",
    ),
    "pruning": (lambda m: prune.l1_unstructured(m, "weight", 0.5), "dense has hooks"),
    "no bias": (lambda m: setattr(m, "bias", None), "dense has no bias"),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("patch_first", [True, False])
def test_weights_that_no_op_can_read(way, patch_first):
    change, message = WAYS[way]
    theirs, inputs = build("ElectraForMaskedLM", tie_word_embeddings=False), batch("ElectraForMaskedLM")
    ours = copy.deepcopy(theirs)
    patched = hf.patch(ours) if patch_first else None
    for model in (ours, theirs):
        change(model.electra.encoder.layer[0].intermediate.dense)
        change(model.generator_lm_head)
    patched = patched or hf.patch(ours)
    (a, da), (b, db) = outcome(ours, inputs), outcome(theirs, inputs)
    torch.testing.assert_close(a["loss"], b["loss"], rtol=1e-5, atol=0)
    assert da.keys() == db.keys() and a.keys() == b.keys()
    rows = {row.block: (row.fused, row.of, row.why_not) for row in patched.rows()}
    assert rows["ElectraIntermediate"] == (1, 2, message)
    assert rows["ElectraForMaskedLM"] == (0, 1, message.replace("dense", "generator_lm_head"))


def test_torchao():
    quantization = pytest.importorskip("torchao.quantization")
    theirs, inputs = build("ElectraForSequenceClassification"), batch("ElectraForSequenceClassification")
    ours = copy.deepcopy(theirs)
    patched = hf.patch(ours)
    for model in (ours, theirs):
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    torch.testing.assert_close(ours(**inputs).loss, theirs(**inputs).loss, rtol=1e-5, atol=0)
    rows = {row.block: row.why_not for row in patched.rows()}
    assert rows["ElectraIntermediate"].startswith("dense.weight is torchao.")


@compiles
@pytest.mark.parametrize(("name", "breaks"), [("ElectraForPreTraining", 2), ("ElectraForMaskedLM", 0)])
def test_no_graph_break(name, breaks):
    model, inputs = build(name, dropout=0.1), batch(name)
    torch._dynamo.reset()
    assert torch._dynamo.explain(model)(**inputs).graph_break_count == breaks
    patched = hf.patch(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(**inputs).loss.backward()
    patched.undo()  # The compiled code of the patched model must not run.
    model.eval(), torch._dynamo.reset()
    inputs.pop("labels")
    assert torch.equal(compiled(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("embeddings", [True, False])
def test_autocast(dtype, embeddings):
    for name in ("ElectraForPreTraining", "ElectraForMaskedLM"):
        theirs, inputs = build(name), batch(name)
        ours = copy.deepcopy(theirs)
        hf.patch(ours, embeddings=embeddings)
        with torch.autocast("cpu", dtype):
            (a, da), (b, db) = outcome(ours, inputs), outcome(theirs, inputs)
            states = [m.electra(inputs["input_ids"]).last_hidden_state.dtype for m in (ours, theirs)]
        assert states[0] == states[1]
        torch.testing.assert_close(a["loss"].float(), b["loss"].float(), rtol=0.02, atol=0)
        assert all(da[k].dtype == db[k].dtype == torch.float32 for k in db)


def test_weights_in_bfloat16():
    theirs, inputs = build("ElectraForMaskedLM").bfloat16(), batch("ElectraForMaskedLM")
    ours = copy.deepcopy(theirs)
    hf.patch(ours)
    (a, da), (b, db) = outcome(ours, inputs), outcome(theirs, inputs)
    torch.testing.assert_close(a["loss"].float(), b["loss"].float(), rtol=0.02, atol=0)
    assert all(da[k].dtype == torch.bfloat16 for k in db)


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_distributed_data_parallel(one_process):
    model, inputs = build(), batch()
    hf.patch(model)
    (a, da), (b, db) = outcome(DistributedDataParallel(model), inputs), outcome(model, inputs)
    assert torch.equal(a["loss"], b["loss"]) and all(torch.equal(da[f"module.{k}"], db[k]) for k in db)


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor")
@pytest.mark.parametrize("patch_first", [True, False])
def test_fully_shard(one_process, patch_first):
    theirs, inputs = build(), batch()
    ours = copy.deepcopy(theirs)
    patched = hf.patch(ours) if patch_first else None
    for part in (*ours.electra.encoder.layer, ours):
        fully_shard(part)
    patched = patched or hf.patch(ours)
    loss = ours(**inputs).loss
    loss.backward()
    torch.testing.assert_close(loss, theirs(**inputs).loss, rtol=1e-5, atol=0)
    if patch_first:
        with pytest.raises(
            ValueError, match="undo: FSDPElectraForPreTraining must be in the state after patch"
        ):
            patched.undo()
    else:
        patched.undo()
        assert type(ours).__name__ == "FSDPElectraForPreTraining" and "not requested" in str(patched)
