"""The benchmarks of inference and of fine-tuning: their gates, their providers, their place in the tables."""

import sys
import time

import pytest
import torch
from fake_runs import RESULT, Benchmark, fake_benchmark
from torch import nn

pytest.importorskip("transformers")

from benchmarks import bench_fine_tune, bench_infer, bench_infer_texts
from benchmarks.harness import lengths, models, providers, runner, texts
from benchmarks.harness.cases import Round
from benchmarks.report import inference, markdown, text
from electra_fast import data, hf

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


@pytest.mark.parametrize("provider", ["fused", "packed"])
def test_our_models_pass_the_gate_in_a_batch(provider, monkeypatch):
    monkeypatch.setitem(bench_infer.SIZES, "2x8", (2, 8))
    assert bench_infer.InferCase("2x8").check(bench_infer.of_module(bench_infer.classifier(provider)))


def test_a_graph_reads_each_batch_and_its_results_are_kept(infer, monkeypatch):
    def logits(ids, mask):
        result[:] = (ids * mask).sum(1, keepdim=True)
        return result  # at a fixed address, as in a graph

    result = torch.empty(1, 1, dtype=torch.long)
    monkeypatch.setattr(bench_infer, "device", lambda: "cpu")
    monkeypatch.setattr(bench_infer, "cuda_graph", lambda body: body)
    batches = [(torch.full((1, 2), i), torch.tensor([[1, i]])) for i in (1, 2, 3)]
    replayed = bench_infer.graph(logits, batches[0])
    assert torch.cat([replayed(*batch) for batch in batches]).flatten().tolist() == [2, 6, 12]


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
def small():
    """Batches of 4 texts, and a model of two layers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_fine_tune, "BATCH", 4)
        patch.setattr(bench_fine_tune, "SMALLER", {"num_hidden_layers": 2, "hidden_size": 32})
        yield


@pytest.fixture(scope="module", params=["step", "forward"])
def fine_tune(small, request):
    return bench_fine_tune.FineTuneCase(bench_fine_tune.Size("banking77", request.param, 8))


TRAINERS = ("trainer", "trainer_grouped", "trainer_patched", "trainer_packed")


@pytest.mark.parametrize("provider", ["fused", *TRAINERS])
def test_every_way_to_fine_tune_passes_the_gate(fine_tune, provider):
    errors = fine_tune.check(fine_tune.model(provider, **bench_fine_tune.NO_DROPOUT), provider)
    assert set(errors) == ({"logits"} if fine_tune.size.passes == "forward" else {"loss", "gradient"})


LAST = {
    "fused": "head.encoder.layers.1.feed_forward.norm.bias",
    "trainer_packed": "electra.encoder.layer.1.output.LayerNorm.bias",
}


@pytest.mark.parametrize("provider", LAST)
def test_the_gate_refuses_another_model(fine_tune, provider):
    model = fine_tune.model(provider, **bench_fine_tune.NO_DROPOUT)
    model.get_parameter(LAST[provider]).data[-1] += 1e-3
    with pytest.raises(AssertionError, match=r"from the reference"):
        fine_tune.check(model, provider)


def test_the_gate_refuses_the_gradient_of_another_step(small):
    case = bench_fine_tune.FineTuneCase(bench_fine_tune.Size("banking77", "step", 4))
    model = case.model("fused", **bench_fine_tune.NO_DROPOUT)
    model.head.classifier.out.weight.register_hook(lambda gradient: 1.001 * gradient)
    with pytest.raises(AssertionError, match=r"gradient: .* from the reference"):
        case.check(model, "fused")


@pytest.mark.parametrize("provider", ["fused", *TRAINERS])
def test_an_epoch_trains_on_each_text_once(small, provider):
    def note(model, args, inputs):
        ids = inputs.get("ids", inputs.get("input_ids"))
        seen.append(ids[ids != 0])  # without padding

    seen, case = [], bench_fine_tune.FineTuneCase(bench_fine_tune.Size("banking77", "epoch", 16))
    model = case.model(provider)
    model.register_forward_pre_hook(note, with_kwargs=True)
    case.training(model, provider)()
    ids = torch.from_numpy(case.texts.examples.ids).long()
    assert len(seen) == 4 and torch.equal(torch.cat(seen).sort().values, ids.sort().values)


def test_lengths_are_quantiles_of_those_of_a_data_set(tmp_path, monkeypatch):
    text = "".join(f"{'word ' * count},{count % 3}\n" for count in (1, 1, 3, 7))
    (tmp_path / "t.csv").write_text(f"text,label\n{text}")
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nword\n")
    monkeypatch.setattr(lengths, "FILE", tmp_path / "lengths.json")
    files = ["d", str(tmp_path / "t.csv"), "--vocab", str(tmp_path / "vocab.txt")]
    options = ["--task", "classify", "--max-len", "8", "--source", "S", "--licence", "L"]
    monkeypatch.setattr(sys, "argv", ["lengths", *files, *options])
    lengths.main()
    counts = [0, 0, 0, 2, 0, 1, 0, 0, 1]
    assert lengths.described("d") == {"source": "S", "licence": "L", "labels": 2, "counts": counts}
    assert lengths.sample("d", 4).tolist() == [3, 3, 5, 8] and lengths.sample("d", 2).tolist() == [3, 8]


@pytest.fixture(scope="module")
def classify():
    """Texts of a tiny model, in batches of 4."""
    with pytest.MonkeyPatch.context() as patch:
        sizes = {"num_hidden_layers": 2, "hidden_size": 32, "embedding_size": 16, "intermediate_size": 32}
        patch.setattr(texts, "SMALLER", sizes)
        patch.setattr(bench_infer_texts, "BATCH", 4)
        patch.setattr(bench_infer_texts, "CHECKED", 6)
        texts.folder.cache_clear()
        yield bench_infer_texts.TextsCase(bench_infer_texts.Size("banking77", 6))
        texts.folder.cache_clear()


def test_texts_have_the_lengths_of_a_data_set(classify):
    tokenizer = data.load_tokenizer(texts.folder(), special_ids=None)
    counts = [
        len(found.ids) + 2 for found in tokenizer.encode_batch(classify.texts, add_special_tokens=False)
    ]
    assert sorted(counts) == lengths.sample("banking77", 6).tolist() and counts != sorted(counts)


@pytest.mark.filterwarnings("ignore")  # of the exporters for the engines
@pytest.mark.parametrize("provider", bench_infer_texts.PROVIDERS)
def test_every_way_to_classify_texts_passes_the_gate(provider, classify):
    try:
        classify.require(provider)
    except ImportError as reason:
        pytest.skip(str(reason))
    call = classify.prepare(provider)
    labels = [found["label"] if isinstance(found, dict) else found[0] for found in call()]
    assert labels == [f"LABEL_{i}" for i in classify.truth[0].argmax(1)], "the result of what is timed"


@pytest.mark.parametrize("change", [fewer_layers, without_attention])
def test_the_gate_refuses_the_scores_of_another_model(change, classify):
    pipe = bench_infer_texts.pipeline()
    change(pipe.model)
    with pytest.raises(AssertionError, match=r"logits: .* from the reference"):
        classify.check(bench_infer_texts.of_pipeline(pipe))


def test_the_gate_refuses_results_in_another_order(classify, monkeypatch):
    def unordered(items, function):
        return function(sorted(items, key=len))

    monkeypatch.setattr(bench_infer_texts, "in_order_of_length", unordered)
    with pytest.raises(AssertionError, match=r"logits: .* from the reference"):
        classify.check(classify.provider("pipeline_sorted"))


def test_results_are_in_the_order_of_the_items():
    seen = []
    found = bench_infer_texts.in_order_of_length(
        ["ccc", "a", "bb"], lambda items: seen.extend(items) or items
    )
    assert seen == ["a", "bb", "ccc"] and found == ["ccc", "a", "bb"]


def test_only_two_providers_of_texts_and_short_batches_are_in_the_usual_budget():
    early = {
        name for name, run in bench_infer_texts.bench_infer_texts.runs.items() if run.round < Round.RIVALS
    }
    first = bench_infer_texts.SIZES[0].name
    assert early == {(first, "forward", provider) for provider in ("fused", "pipeline")}
    late = {name[0] for name, run in bench_infer.bench_infer.runs.items() if run.round is Round.DEFINITIONS}
    assert {bench_infer.SIZES[size] for size in late} == set(bench_infer.LONG)


def with_models():
    """Return RESULT with inference and fine-tuning."""
    infer, tune = "infer, 1x16, one thread, forward", "fine_tune, banking77, step of 32, step"
    int8 = fake_benchmark(infer, "ort_int8", 0.002, {"fused": 2.0, "fused_int8": 0.8})
    int8["extra_info"]["against"] = "fused_int8"
    texts, fused = (
        "infer_texts, banking77, 512 texts, forward",
        fake_benchmark(infer, "fused", 0.004, {"huggingface": 2.0}),
    )
    fused["extra_info"] |= {"p95": 0.005}
    fused["stats"]["rounds"] = inference.TAIL
    ort = fake_benchmark(infer, "ort", 0.005, {"fused": 0.8})
    ort["extra_info"]["peak_bytes"] = 0
    benchmarks = [
        fused,
        fake_benchmark(infer, "huggingface", 0.008, {"fused": 0.5}),
        fake_benchmark(infer, "fused_int8", 0.0016, {"fused": 2.5}),
        int8,
        ort,
        fake_benchmark(texts, "fused", 1.6, {"pipeline": 3.0}),
        fake_benchmark(texts, "pipeline", 4.8, {"fused": 1 / 3}),
        fake_benchmark(tune, "fused", 0.2, {"trainer": 3.0}),
        fake_benchmark(tune, "trainer", 0.6, {"fused": 1 / 3}),
    ]
    for benchmark in benchmarks:
        if benchmark["group"] == texts:
            benchmark["extra_info"] |= {"unit": "texts/s", "work": 512}
    return RESULT | {"benchmarks": [*RESULT["benchmarks"], *benchmarks]}


def test_inference_and_fine_tuning_are_in_the_tables():
    shown = markdown.tables(with_models(), "abc")
    head = "| size | fused, int8 | Trainer | pipeline | Hugging Face | ONNX Runtime | ONNX Runtime, int8 |"
    assert head in shown
    assert "| infer | 1x16, one thread | 0.40 |  |  | 2.00 | 1.25 | 1.25 (fused, int8) |" in shown
    assert "| fine_tune | banking77, step of 32 |  | 3.00 |  |  |  |  |" in shown
    assert "| infer_texts | banking77, 512 texts |  |  | 3.00 |  |  |  |" in shown
    lines = [line.split() for line in text.summary(with_models()).splitlines()]
    int8 = "1.60 ONNX Runtime, int8 (fused, int8) 2.00 1.25x as fast 5"
    assert int8.split() in lines[-20:], "the first time is that of our int8"
    assert {"packed", "fused_int8"} <= set(providers.OURS)


LATENCY = "| 1x16, one thread | 4.00 / 5.00 | 1.60 | 8.00 | 5.00 | 2.00 |"
MEMORY = "| 1x16, one thread | 1.00 | 1.00 | 1.00 |  | 1.00 |"
RATE = "| banking77, 512 texts | 320 | 107 |"


def test_latency_memory_and_rate_have_tables():
    shown = markdown.tables(with_models(), "abc")
    assert f"{LATENCY}\n\n" in shown and f"{MEMORY}\n\n" in shown and RATE in shown
    assert (
        "| latency, CPU ms: p50 / p95 | fused |" in shown and "| texts / CPU s | fused | pipeline |" in shown
    )
    readme = markdown.summary(with_models(), "abc")
    assert RATE in readme and LATENCY not in readme
    section = inference.inference_section(with_models())
    console = [line.split() for line in text.table(with_models()).splitlines()]
    for row in (LATENCY, MEMORY, RATE):
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert all(f">{cell}</" in section for cell in cells)
        assert " ".join(cells).split() in console


def test_a_run_without_inference_has_no_such_table():
    assert inference.inference(RESULT) == [] and inference.inference_section(RESULT) == ""


def test_a_95th_percentile_needs_rounds():
    benchmark = fake_benchmark("infer, 1x16, forward", "fused", 0.004, {})
    assert inference.percentiles(benchmark) == "4.00", "an old result"
    benchmark["extra_info"]["p95"], benchmark["stats"]["rounds"] = 0.005, inference.TAIL - 1
    assert inference.percentiles(benchmark) == "4.00"
    benchmark["stats"]["rounds"] = inference.TAIL
    assert inference.percentiles(benchmark) == "4.00 / 5.00"
