"""The benchmarks of inference and of fine-tuning: their gates, their providers, their place in the tables."""

import copy
import sys
import time

import pytest
import torch
from fake_runs import RESULT, Benchmark, fake_benchmark
from torch import nn

pytest.importorskip("transformers")

from benchmarks import bench_fine_tune, bench_infer
from benchmarks.harness import models, providers, runner
from benchmarks.report import markdown, text
from electra_fast import hf

SIZE = next(iter(bench_infer.SIZES))


@pytest.fixture(scope="module")
def infer():
    return bench_infer.InferCase(SIZE)


def tanh(model):
    for layer in model.electra.encoder.layer:
        layer.intermediate.intermediate_act_fn = nn.GELU(approximate="tanh")


def fewer_layers(model):
    del model.electra.encoder.layer[-1]


def without_attention(model):
    for layer in model.electra.encoder.layer:
        layer.attention.self.value.weight.data.zero_()


@pytest.mark.parametrize(("change", "int8"), [(tanh, False), (fewer_layers, True), (without_attention, True)])
def test_the_gate_refuses_the_logits_of_another_model(infer, change, int8):
    model = bench_infer.classifier("huggingface")
    change(model)
    with pytest.raises(AssertionError, match=r"logits: .* from the reference, .* is allowed"):
        infer.check(bench_infer.of_module(model), int8)


def test_int8_has_a_wider_bound(infer):
    model = bench_infer.classifier("huggingface")
    for layer in model.modules():
        if isinstance(layer, nn.Linear):  # weights as int8 has them, with one scale per row
            scale = layer.weight.data.abs().amax(1, keepdim=True) / 127
            layer.weight.data.div_(scale).round_().mul_(scale)
    logits = bench_infer.of_module(model)
    error, allowed = infer.check(logits, int8=True)["logits"]
    assert error < allowed
    with pytest.raises(AssertionError, match="logits"):
        infer.check(logits)


def test_the_patched_model_passes_the_gate(infer):
    assert infer.check(bench_infer.of_module(bench_infer.classifier("fused")))


ABSENT = {
    "fused_int8": "electra_fast.hf.patch has no argument int8",
    "ort": "onnxruntime is not installed",
    "ort_int8": "onnxruntime is not installed",
    "openvino": "openvino is not installed",
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the reason is that they are for a CPU")
@pytest.mark.parametrize("provider", ABSENT)
def test_what_is_not_installed_is_dropped_by_name(provider, infer, monkeypatch):
    monkeypatch.setattr(hf, "patch", lambda model: None)
    for name in ("onnxruntime", "openvino"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(infer, "headline", (provider,), raising=False)
    line = f"dropped: infer, {SIZE}, forward, {provider}: {ABSENT[provider]}"
    with pytest.raises(pytest.skip.Exception, match=line):
        runner.Runner(0.0, time.monotonic()).report(Benchmark(), infer, provider)


def test_the_patch_has_int8_if_its_signature_has(monkeypatch):
    monkeypatch.setattr(hf, "patch", lambda model, *, int8=False: None)
    models.patch_has_int8()


def test_a_case_runs_on_the_threads_that_it_names(monkeypatch):
    class Threads(bench_infer.InferCase):
        headline = ("fused",)

        def prepare(self, provider):
            return lambda: seen.append(torch.get_num_threads())

    before, seen = torch.get_num_threads(), []
    torch.set_num_threads(2)
    try:
        run, case = runner.Runner(60.0, time.monotonic()), Threads(SIZE)
        monkeypatch.setattr(case, "threads", 1, raising=False)
        monkeypatch.setattr(run.clock, "peak_bytes", lambda function: 0)
        monkeypatch.setitem(case.errors, "fused", {})
        run.report(Benchmark(), case, "fused")
        assert set(seen) == {1} and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.fixture(scope="module")
def fine_tune():
    case = bench_fine_tune.FineTuneCase()
    return case, case.model("fused")


@pytest.mark.parametrize("provider", ["fused", "packed"])
def test_a_patched_step_passes_the_gate(fine_tune, provider):
    case, model = fine_tune
    assert set(case.check(model, provider)) == {"logits", "loss", "gradient"}


def test_the_gate_refuses_the_gradient_of_another_step(fine_tune):
    case, model = fine_tune
    model = copy.deepcopy(model)
    model.classifier.out_proj.weight.register_hook(lambda gradient: 1.001 * gradient)
    with pytest.raises(AssertionError, match=r"gradient: .* from the reference"):
        case.check(model, "fused")


def test_queries_are_short_and_of_real_lengths():
    lengths = [len(ids) for ids in bench_fine_tune.sequences()]
    assert len(lengths) == 32 and 13 <= sum(lengths) / 32 <= 15 and min(lengths) < 8 and max(lengths) > 20
    padded, packed = bench_fine_tune.batch(False), bench_fine_tune.batch(True)
    real = padded.inputs["attention_mask"].bool()
    assert torch.equal(padded.inputs["input_ids"][real], packed.inputs["input_ids"][0])
    assert torch.equal(packed.inputs["input_ids"][0, packed.first], padded.inputs["input_ids"][:, 0])


def with_models():
    """Return RESULT with inference and fine-tuning."""
    infer, tune = "infer, 1x16, one thread, forward", "fine_tune, 32 queries, step"
    int8 = fake_benchmark(infer, "ort_int8", 0.002, {"fused": 2.0, "fused_int8": 0.8})
    int8["extra_info"]["against"] = "fused_int8"
    benchmarks = [
        fake_benchmark(infer, "fused", 0.004, {"huggingface": 2.0}),
        fake_benchmark(infer, "huggingface", 0.008, {"fused": 0.5}),
        fake_benchmark(infer, "fused_int8", 0.0016, {"fused": 2.5}),
        int8,
        fake_benchmark(tune, "fused", 0.4, {"packed": 0.5}),
        fake_benchmark(tune, "packed", 0.2, {"fused": 2.0}),
    ]
    return RESULT | {"benchmarks": [*RESULT["benchmarks"], *benchmarks]}


def test_inference_and_fine_tuning_are_in_the_tables():
    shown = markdown.tables(with_models(), "abc")
    assert "| size | packed | fused, int8 | Hugging Face | ONNX Runtime, int8 |" in shown
    assert "| infer | 1x16, one thread |  | 0.40 | 2.00 | 1.25 (fused, int8) |" in shown
    assert "| fine_tune | 32 queries | 0.50 |  |  |  |" in shown
    lines = [line.split() for line in text.summary(with_models()).splitlines()]
    int8 = "1.60 ONNX Runtime, int8 (fused, int8) 2.00 1.25x as fast 5"
    assert int8.split() in lines[-20:], "the first time is that of our int8"
    assert {"packed", "fused_int8"} <= set(providers.OURS)
