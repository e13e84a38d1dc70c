"""A patched model can be exported, traced and converted, with the same results."""

import copy

import pytest
import torch
from small_patched import batch, build

from electra_fast import hf

MODELS = ("ElectraForSequenceClassification", "ElectraForMaskedLM", "BertForMaskedLM")
LENGTHS = (23, 3, 9, 20, 23)
# Warnings of torch about itself while it exports and traces.
KINDS = ("DeprecationWarning", "FutureWarning", "UserWarning", "torch.jit.TracerWarning")
quiet = pytest.mark.filterwarnings(*(f"ignore::{kind}" for kind in KINDS))


def pair(name):
    theirs = build(name).eval()
    ours = copy.deepcopy(theirs)
    hf.patch(ours)
    return ours, theirs


def other_batch():
    real = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    return torch.randint(104, 300, real.shape), real.long()


def assert_same(a, b, real):
    if a.shape[:2] == real.shape:
        a, b = a[real.bool()], b[real.bool()]
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def ops_in(program):
    """Return the operators of this package in a program, including its subgraphs."""
    graphs = [m.graph for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    targets = [str(node.target) for graph in graphs for node in graph.nodes]
    return {target.split(".")[1] for target in targets if target.startswith("electra_fast.")}


@quiet
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_export(name, masked, dynamic):
    ours, theirs = pair(name)
    inputs = {k: x for k, x in batch(name).items() if k in ("input_ids", "attention_mask")}
    if not masked:
        del inputs["attention_mask"]
    sizes = {k: {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC} for k in inputs}
    program = torch.export.export(ours, (), inputs, dynamic_shapes=sizes if dynamic else None)
    assert {"embed_fwd", "attention_fwd", "add_norm_fwd", "bias_gelu_fwd"} <= ops_in(program)
    if dynamic:
        inputs = dict(zip(inputs, other_batch(), strict=False))
    real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
    assert_same(program.module()(**inputs).logits, theirs(**inputs).logits, real)


@quiet
def test_trace():
    ours, theirs = pair("ElectraForSequenceClassification")
    inputs = (batch()["input_ids"], batch()["attention_mask"])
    traced = torch.jit.trace(ours, inputs, strict=False)
    assert_same(traced(*inputs)["logits"], theirs(*inputs).logits, inputs[1])


def test_onnx_export_runs_the_unfused_forward_passes(monkeypatch):
    """No ONNX runtime has the operators of this package."""
    ours, theirs = pair("ElectraForPreTraining")
    inputs = {k: x for k, x in batch().items() if k != "labels"}
    with torch.autograd.profiler.profile() as profile:
        monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
        logits = ours(**inputs).logits
    assert torch.equal(logits, theirs(**inputs).logits)
    assert not any("electra_fast" in event.key for event in profile.key_averages())


@quiet
def test_onnx(tmp_path):
    pytest.importorskip("onnxscript")
    ours, theirs = pair("ElectraForPreTraining")
    inputs = (batch()["input_ids"], batch()["attention_mask"])
    program = torch.onnx.export(ours, inputs, dynamo=True, verbose=False)
    assert not any("electra_fast" in str(node.domain) for node in program.model.graph)
    runtime = pytest.importorskip("onnxruntime")
    program.save(tmp_path / "model.onnx")
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    given = {i.name: x.numpy() for i, x in zip(session.get_inputs(), inputs, strict=True)}
    assert_same(torch.tensor(session.run(None, given)[0]), theirs(*inputs).logits, inputs[1])
