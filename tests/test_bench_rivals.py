"""Rivals: each is absent for a named reason or gives the right result, and an absent one costs no noise."""

import sys
import time
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from fake_runs import RESULT, ROOT, SIZE, Benchmark

from benchmarks import rivals
from benchmarks.harness import compiled, providers, runner
from benchmarks.harness.cases import BOTH, Call, OpCase
from benchmarks.harness.inputs import SIZES
from benchmarks.report import markdown, text
from benchmarks.rivals import attention, mlm_head
from electra_fast import ops

FILES = sorted(f.stem for f in (ROOT / "benchmarks" / "rivals").glob("*.py") if f.stem != "__init__")
ALL = {
    (name, provider): rival
    for name in FILES
    for provider, rival in getattr(import_module(f"benchmarks.rivals.{name}"), "RIVALS", {}).items()
}
ALL |= {("models", p): rival for p, rival in import_module("benchmarks.rivals.models").ENGINES.items()}


def test_every_rival_has_a_label_and_comes_late():
    assert {provider for _, provider in ALL} == set(providers.RIVALS)
    assert set(providers.RIVALS) <= set(providers.LATE) & set(providers.LABELS) & set(providers.ORDER)
    assert set(providers.COMPILED) <= set(providers.LATE) & set(providers.LABELS) & set(providers.ORDER)
    assert providers.ORDER[-1] == "reference"


@pytest.mark.parametrize(("name", "provider"), ALL)
def test_a_rival_is_ready_or_says_why_it_is_absent(name, provider):
    try:
        rivals.require(ALL[name, provider])
    except ImportError as reason:
        assert str(reason).startswith(("needs a GPU", "is timed on", "torch ", "varlen_attn ")) or str(
            reason
        ).endswith(("is not installed", "are not installed"))


def test_the_reasons_of_absent_rivals(monkeypatch):
    monkeypatch.setattr(rivals, "device", lambda: "cpu")
    for name in ("varlen_flash", "flex_flash", "flash_attn_3", "sdpa_cudnn"):
        with pytest.raises(ImportError, match="^needs a GPU$"):
            rivals.require(attention.RIVALS[name])
    monkeypatch.setattr(rivals, "device", lambda: "cuda")
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    monkeypatch.delattr(F, "linear_cross_entropy", raising=False)
    monkeypatch.setattr(torch, "__version__", "2.13.0")
    for rival, reason in (
        (mlm_head.RIVALS["liger"], "liger_kernel is not installed"),
        (attention.RIVALS["flash_attn_4"], "flash_attn.cute is not installed"),
        (mlm_head.RIVALS["linear_ce_one"], "torch 2.13.0 has no torch.nn.functional.linear_cross_entropy"),
        (attention.RIVALS["varlen_cudnn"], "varlen_attn of torch 2.13.0 runs flash only"),
    ):
        with pytest.raises(ImportError, match=f"^{reason}$"):
            rivals.require(rival)


def test_a_way_of_compiling_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(compiled, "device", lambda: "cpu")
    monkeypatch.setenv("CXX", "/nonexistent -v")
    with pytest.raises(ImportError, match="needs a C\\+\\+ compiler for the CPU, got none"):
        compiled.require("compile")
    for provider in compiled.OPTIONS:
        with pytest.raises(ImportError, match="is timed on a GPU only"):
            compiled.require(provider)
    monkeypatch.setattr(compiled, "device", lambda: "cuda")
    for provider in ("compile", "compile_max"):
        compiled.require(provider)
    from torch._inductor import config

    monkeypatch.delattr(config, "use_rand4x", raising=False)
    with pytest.raises(ImportError, match="has no such switch"):
        compiled.require("compile_rand4x")


def test_an_absent_rival_is_dropped_with_its_reason_even_when_the_budget_is_spent(monkeypatch):
    monkeypatch.setattr(rivals, "device", lambda: "cpu")
    case = OpCase("mlm_head", None, SIZES[SIZE], BOTH, mlm_head.RIVALS)
    run = runner.Runner(0.0, time.monotonic())
    with pytest.raises(pytest.skip.Exception, match=r"^dropped: .*, liger: needs a GPU$"):
        run.report(Benchmark(), case, "liger")


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a CPU's kernels")
@pytest.mark.parametrize("name", ["sdpa_flash", "sdpa_math"])
def test_the_kernels_of_torch_are_attention(name):
    q, k, v = (torch.randn(2, 9, 2, 8) for _ in range(3))
    torch.testing.assert_close(attention.RIVALS[name](q, k, v), ops.attention(q, k, v))


def test_a_batch_without_padding_has_bounds():
    cu, longest = attention.bounds(torch.empty(3, 5, 2, 8), None, None)
    assert cu.tolist() == [0, 5, 10, 15] and longest == 5


def test_absent_providers_are_one_line_of_the_console_and_of_the_tables():
    dropped = ["attention, a, b, liger: needs a GPU", "linear, a, b, quack: needs a GPU"]
    dropped += ["infer, a, b, ort: onnxruntime is not installed", "linear, a, b, liger: needs a GPU"]
    result = RESULT | {"dropped": [*dropped, *RESULT["dropped"]]}
    absent = "Liger, quack: needs a GPU; ONNX Runtime: onnxruntime is not installed"
    assert f"absent: {absent}" in text.endings(result)
    assert f"Absent: {absent}." in markdown.tables(result, "abc")


def test_a_rival_is_called_with_a_call_s_arguments():
    """Every op with rivals passes them its arguments by name."""
    seen = []

    def rival(x, bias):
        seen.append(set(locals()))
        return F.gelu(x + bias)

    x = {"x": torch.randn(4, 8), "bias": torch.randn(8)}
    case = OpCase("bias_gelu", None, SIZES[SIZE], BOTH, {"quack": rival})
    case.call = Call(x, "B/s", 1, 1, ("x", "bias"))
    case.prepare("quack")()
    assert {"x", "bias"} <= seen[0]
