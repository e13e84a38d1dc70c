"""Rivals: each is absent for a named reason or gives the right result, and an absent one costs no noise."""

import re
import sys
import time
import types
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from fake_runs import RESULT, ROOT, SIZE, Benchmark

from benchmarks import rivals
from benchmarks.harness import compiled, gate, providers, runner
from benchmarks.harness.cases import BOTH, OpCase
from benchmarks.harness.inputs import SIZES, Make, Size
from benchmarks.report import markdown, text
from benchmarks.rivals import attention, mlm_head
from electra_fast import ops
from electra_fast.config import ElectraConfig

FILES = sorted(f.stem for f in (ROOT / "benchmarks" / "rivals").glob("*.py") if f.stem != "__init__")
ALL = {
    (name, provider): rival
    for name in FILES
    for provider, rival in getattr(import_module(f"benchmarks.rivals.{name}"), "RIVALS", {}).items()
}
ALL |= {("models", p): rival for p, rival in import_module("benchmarks.rivals.models").ENGINES.items()}


REASON = re.compile(
    r"needs a GPU|timed on a CPU only|torch .* has no |varlen_attn of torch|.* not installed$"
)


def test_every_rival_has_a_label_and_comes_late():
    of_the_candidate = {"cublaslt_tanh"}  # bench_linear_gelu.py
    assert {provider for _, provider in ALL} | of_the_candidate == set(providers.RIVALS)
    assert set(providers.RIVALS) <= set(providers.LATE) & set(providers.LABELS) & set(providers.ORDER)
    assert set(providers.COMPILED) <= set(providers.LATE) & set(providers.LABELS) & set(providers.ORDER)
    assert providers.ORDER[-1] == "reference"


@pytest.mark.parametrize(("name", "provider"), ALL)
def test_a_rival_is_ready_or_says_why_it_is_absent(name, provider):
    try:
        rivals.require(ALL[name, provider])
    except ImportError as missing:
        assert REASON.match(str(missing)), missing


def test_the_reasons_of_absent_rivals(monkeypatch):
    monkeypatch.setattr(rivals, "device", lambda: "cpu")
    for name in ("varlen_flash", "flex_flash", "flash_attn_3", "sdpa_cudnn"):
        with pytest.raises(ImportError, match=r"^needs a GPU$"):
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
        with pytest.raises(ImportError, match="timed on a GPU only"):
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
    q, k = torch.empty(3, 5, 2, 8), torch.empty(3, 7, 2, 8)
    cu, cu_k, L, K = attention.Options().bounds(q, k)
    assert cu.tolist() == [0, 5, 10, 15] and cu_k.tolist() == [0, 7, 14, 21] and (L, K) == (5, 7)


def test_absent_providers_are_one_line_of_the_console_and_of_the_tables():
    dropped = ["attention, a, b, sdpa_cudnn: needs a GPU", "linear, a, b, quack: needs a GPU"]
    dropped += ["infer, a, b, ort: onnxruntime is not installed", "attention, a, c, sdpa_cudnn: needs a GPU"]
    result = RESULT | {"dropped": [*dropped, *RESULT["dropped"]]}
    absent = "SDPA cuDNN, quack: needs a GPU; ONNX Runtime: onnxruntime is not installed"
    assert f"absent: {absent}" in text.endings(result)
    assert f"Absent: {absent}." in markdown.tables(result, "abc")


def layernorm_fwd(x, weight, bias, eps, return_rstd, return_mean):
    y, mean, rstd = torch.native_layer_norm(x, weight.shape, weight, bias, eps)
    return y, rstd[:, 0], mean[:, 0]


def layernorm_bwd(x, weight, dout, rstd, mean):
    rows = (mean[:, None], rstd[:, None])
    needed = [True, True, True]
    return torch.ops.aten.native_layer_norm_backward(dout, x, weight.shape, *rows, weight, weight, needed)


def flash_attn_func(q, k, v, causal=False):
    return ops.REFERENCE.attention(q, k, v, causal=causal), None  # with the log-sum-exp's place


def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
    keys = {"cu_seqlens_k": cu_seqlens_k, "max_seqlen_k": max_seqlen_k}
    return ops.REFERENCE.attention(q, k, v, cu_seqlens=cu_seqlens_q, max_seqlen=max_seqlen_q, **keys)


def linear_cross_entropy(x, weight, bias, target, ignore_index, inplace_backward):
    return F.cross_entropy(F.linear(x, weight, bias), target, ignore_index=ignore_index)


def layer_norm(x, weight, bias, eps):
    return F.layer_norm(x, weight.shape, weight, bias, eps)


# The parts of other libraries that the rivals call, in plain PyTorch.
LOOKUP = types.SimpleNamespace(apply=lambda table, ids: F.embedding(ids, table))
FLASH = {"flash_attn_func": flash_attn_func, "flash_attn_varlen_func": flash_attn_varlen_func}
STAND_INS = {
    "liger_kernel.transformers.functional": {"liger_layer_norm": layer_norm},
    "liger_kernel.ops": {"LigerEmbeddingFunction": LOOKUP},
    "quack.linear": {"linear_func": F.linear},
    "quack.linear_cross_entropy": {"linear_cross_entropy_func": linear_cross_entropy},
    "quack.rmsnorm": {"layernorm_fwd": layernorm_fwd, "layernorm_bwd": layernorm_bwd},
    "flash_attn.cute": FLASH,
}
CALLERS = [("add_norm", "liger"), ("add_norm", "quack"), ("attention", "flash_attn_4"), ("embed", "liger")]
CALLERS += [("linear", "quack"), ("mlm_head", "quack")]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the stand-ins are for a CPU")
@pytest.mark.parametrize(("name", "provider"), CALLERS)
def test_the_gate_lets_a_rival_pass_whose_library_is_right(name, provider, monkeypatch):
    for file, parts in STAND_INS.items():
        for module in (file.split(".")[0], file.rpartition(".")[0], file):
            monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
        vars(sys.modules[file]).update(parts)
    inputs = getattr(import_module(f"benchmarks.bench_{name}"), f"bench_{name}").inputs
    tiny = Size("tiny", 2, 16, ElectraConfig.tiny)
    changes = [{}, {"packed": True}, {"queries": 5}, {"queries": 5, "packed": True}, {"causal": True}]
    for size in [tiny._replace(**change) for change in (changes if name == "attention" else [{}])]:
        call = inputs(Make(size))
        assert gate.Gate(name, call.args, call.gradients).check(ALL[name, provider])
