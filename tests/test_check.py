"""Reports about functions of others: right, wrong, raised, unsupported, and what is refused."""

import json
from xml.etree import ElementTree

import pytest
import torch
import torch.nn.functional as F

from electra_fast import ops, testing
from electra_fast.__main__ import main
from electra_fast.testing.report import RAISED, RIGHT, UNSUPPORTED, WRONG
from electra_fast.testing.supports import OWN

F32 = [torch.float32]


def reasons(report):
    return {row.why for row in report.of(UNSUPPORTED)}


def gelu(x, bias):
    return F.gelu(x + bias.to(x.dtype))


def softmax(x):
    return x.softmax(-1)


# --- report: an op ------------------------------------------------------------------------------------------


def test_attention_of_pytorch_has_a_complete_report(seed):
    report = testing.report("attention", F.scaled_dot_product_attention, adapter="sdpa", seed=seed)
    assert report.ok and reasons(report) == {"packed", OWN}, report
    right = {row.example for row in report.of(RIGHT)}
    assert {"no mask D=64", "causal, own scale D=36", "1e30"} <= right
    for variant in ("no sequence", "L = 0", "strided", "expanded", "offset"):
        assert any(variant in name for name in right), variant
    assert {row.dtype for row in report.of(RIGHT)} == {"float32", "bfloat16", "float16"}
    assert {row.quantity for row in report.of(RIGHT)} >= {"result", "gradient of q", "gradient of v"}


def test_each_row_has_its_numbers(seed):
    report = testing.report("bias_gelu", gelu, dtypes=F32, seed=seed)
    rows = [row for row in report.rows if row.error]
    assert rows and all(row.ratio == pytest.approx(row.error / row.budget) for row in rows)
    assert report.largest.ratio == max(row.ratio for row in rows) <= 1
    assert report.summary() in str(report) and report.largest.quantity in str(report)


def test_the_tanh_form_of_gelu_is_wrong_by_its_known_distance():
    def tanh(x, bias):
        return F.gelu(x + bias, approximate="tanh")

    report = testing.report("bias_gelu", tanh, dtypes=F32, seed=0)
    wrong = {row.example for row in report.of(WRONG)}
    assert not report.ok and wrong >= {"contiguous", "transposed"}
    row = next(row for row in report.of(WRONG) if row.quantity == "result")
    assert "error 0.00047" in row.why and row.ratio > 100  # |tanh form - erf form| is at most 4.8e-4
    with pytest.raises(AssertionError, match=r"bias_gelu \(contiguous.*exceeds the budget.*\[seed 0\]"):
        report.assert_right()


def test_an_error_of_the_function_is_a_row_with_its_line():
    def fails(x, bias):
        return gelu(x, bias) if x.dtype == torch.float32 else [][0]

    report = testing.report("bias_gelu", fails, seed=0)
    assert {row.dtype for row in report.of(RAISED)} == {"bfloat16", "float16"}
    assert all("IndexError: list index out of range (test_check.py:" in row.why for row in report.of(RAISED))
    assert report.of(RIGHT) and not report.ok


def mutates(x, bias):
    with torch.no_grad():
        bias.add_(0 if 0 in bias.stride() else 1)
    return gelu(x, bias)


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda x, bias: gelu(x, bias)[..., :1], "shape"),
        (lambda x, bias: gelu(x, bias).double(), "has dtype torch.float64"),
        (mutates, "bias must not change"),
        (lambda x, bias: None, "must return a Tensor, got None"),
        (lambda x, bias: gelu(x, bias.detach()), "gradients of ['x'], not ['bias', 'x']"),
        (lambda x, bias: gelu(x.contiguous(), bias) + bias.stride(0) - 1, "contiguous tensors are right"),
    ],
)
def test_what_is_wrong_is_said(function, said):
    wrong = testing.report("bias_gelu", function, dtypes=F32, seed=0).of(WRONG)
    assert any(said in row.why for row in wrong), wrong


# --- what is not supported ----------------------------------------------------------------------------------


def plain_attention(q, k, v, causal=False):
    return ops.TORCH.attention(q, k, v, causal=causal)


def test_arguments_that_the_function_lacks_are_listed_as_unsupported():
    report = testing.report("attention", plain_attention, dtypes=F32, seed=0)
    assert report.ok and reasons(report) == {"key_mask", "scale", "cu_seqlens"}
    assert any("every argument offset" in row.example for row in report.of(RIGHT))
    assert "unsupported: key_mask" in str(report)


def test_what_is_declared_is_left_out_and_counted():
    supports = {
        "head_dims": (64,),
        "dtypes": F32,
        "packed": False,
        "dropout": False,
        "layouts": ["contiguous"],
    }
    report = testing.report("attention", ops.TORCH.attention, supports=supports, seed=0)
    assert report.ok and {row.dtype for row in report.of(RIGHT)} == {"float32"}
    assert {"packed", "dropout", "head_dims=36", "dtypes=bfloat16", "layouts=strided"} <= reasons(report)
    forward = testing.report("bias_gelu", gelu, supports={"gradients": ("x",)}, dtypes=F32, seed=0)
    assert forward.ok and {row.quantity for row in forward.of(UNSUPPORTED)} == {"gradient of bias"}


def test_results_that_are_not_returned_are_declared():
    def loss_only(logits, replaced, weights=None):
        return ops.reference.RTDLoss(ops.rtd_loss(logits, replaced, weights).loss, None)

    with pytest.raises(AssertionError, match="must return loss, counts, got loss"):
        testing.check_op("rtd_loss", loss_only, seed=0)
    testing.check_op("rtd_loss", loss_only, supports={"results": ["loss"]}, seed=0)


def test_check_op_accepts_notimplementederror_only_if_it_is_declared():
    def half(x, bias):
        if x.dtype == torch.float16:
            raise NotImplementedError("float16 is slow")
        return gelu(x, bias)

    with pytest.raises(AssertionError, match=r"not declared .*: float16 is slow \(3 examples"):
        testing.check_op("bias_gelu", half, seed=0)
    assert testing.report("bias_gelu", half, seed=0).ok
    assert testing.check_op("bias_gelu", half, supports={"dtypes": [torch.bfloat16]}, seed=0).of(UNSUPPORTED)


def test_nothing_compared_is_not_right():
    def never(x, bias):
        raise NotImplementedError

    report = testing.report("bias_gelu", never, seed=0)
    assert not report.ok and not report.of(RIGHT)
    with pytest.raises(AssertionError, match="nothing was compared: dtypes="):
        testing.check_op("bias_gelu", gelu, supports={"dtypes": ()}, seed=0)


# --- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, TypeError, r"accept q, k, v by name, got \(query, key, .*, which lacks q, k, v, .* sdpa"),
        ({"adapter": "sdpb"}, ValueError, "adapter of attention must be sdpa, flash_attn or a function"),
        (
            {"supports": {"dropuot": False}},
            ValueError,
            "supports must name .*dropout.*, got 'dropuot'",
        ),
        ({"supports": {"head_dims": 64}}, ValueError, r"a collection .*, got 64; for example \(64,\)"),
        ({"supports": {"random": True}}, ValueError, r"supports\['random'\] must be 'own', got True"),
    ],
)
def test_a_wrong_request_is_refused_with_the_remedy(options, error, message):
    with pytest.raises(error, match=message):
        testing.report("attention", F.scaled_dot_product_attention, **options)


def test_a_required_argument_that_the_op_does_not_have_is_shown():
    with pytest.raises(TypeError, match=r"got \(x, bias, out\), which also requires out"):
        testing.report("bias_gelu", lambda x, bias, out: out)


# --- crashes ------------------------------------------------------------------------------------------------

CRASHES = """
import ctypes
import torch.nn.functional as F

def gelu(x, bias):
    return F.gelu(x + bias.to(x.dtype)) if x.numel() else ctypes.string_at(0)

def bias_gelu(x, bias):
    return 1.01 * gelu(x, bias)
"""


def test_a_crash_is_a_row_and_the_others_are_compared(tmp_path, monkeypatch):
    (tmp_path / "crashing.py").write_text(CRASHES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    report = testing.report("bias_gelu", "crashing:gelu", dtypes=F32, seed=0, isolate=True)
    (crash,) = report.of(RAISED)
    assert "no token" in crash.example and "ended with exit code -11 (SIGSEGV)" in crash.why
    assert len(report.of(RIGHT)) > 10 and not report.of(WRONG)


# --- the files and the command ------------------------------------------------------------------------------


def test_json_and_html_have_every_row(tmp_path):
    report = testing.report("rtd_loss", lambda logits, replaced: ops.rtd_loss(logits, replaced), seed=0)
    found = json.loads(report.to_json(tmp_path / "report.json"))
    assert found == json.loads((tmp_path / "report.json").read_text())
    assert [row["verdict"] for row in found["rows"]] == [row.verdict for row in report.rows] and found["ok"]
    text = report.to_html(tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text() == text and text.count("<tr>") == len(report.rows) + 1
    picture = ElementTree.fromstring(text[text.index("<svg") : text.index("</svg>") + 6])
    dots = [dot for dot in picture.iter("circle") if dot.find("title") is not None]
    assert len(dots) == sum(bool(row.ratio) for row in report.rows) > 0


def test_the_command_prints_the_report_and_its_status_says_whether_it_is_right(tmp_path, monkeypatch, capsys):
    (tmp_path / "commanded.py").write_text(CRASHES)
    monkeypatch.syspath_prepend(tmp_path)
    options = ["--seed", "0", "--no-isolate", "--dtypes", "float32", "--without", "empty"]
    file = str(tmp_path / "report.json")
    with pytest.raises(SystemExit) as right:
        main(["check", "commanded:gelu", "--op", "bias_gelu", *options, "--json", file])
    assert right.value.code == 0 and "0 wrong, 0 raised, 1 unsupported" in capsys.readouterr().out
    with pytest.raises(SystemExit) as wrong:
        main(["check", "commanded:bias_gelu", *options])
    assert wrong.value.code == 1 and "exceeds the budget" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["commanded:nothing"], "check must be an importable module:function, got commanded:nothing"),
        (["torch.nn.functional:gelu"], "--op must be given, got a function called gelu"),
        (["torch.nn.functional:gelu", "--op", "geglu"], "op must be one of .*, got geglu"),
        (
            ["torch.nn.functional:gelu", "--op", "bias_gelu"],
            r"x, bias by name, got \(input, approximate",
        ),
        (["torch.nn.functional:gelu", "--op", "bias_gelu", "--dtypes", "half"], "--dtypes must be some of"),
        (["torch.nn.functional:gelu", "--op", "bias_gelu", "--json", "no/x"], "--json must name a file in"),
    ],
)
def test_a_wrong_command_is_refused(arguments, message, tmp_path, monkeypatch):
    (tmp_path / "commanded.py").write_text(CRASHES)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SystemExit, match=message):
        main(["check", *arguments])


# --- check: any function ------------------------------------------------------------------------------------


def test_any_function_is_compared_with_its_own_reference(seed):
    x = torch.randn(33, 100, generator=torch.Generator().manual_seed(seed))
    report = testing.check(lambda x: softmax(x), softmax, {"x": x}, gradients=["x"], seed=seed)
    assert {row.quantity for row in report.of(RIGHT)} == {"result", "gradient of x"}
    both = testing.check(
        lambda x, k: x.topk(k), lambda x, k: x.topk(k), [{"x": x, "k": 3}, {"x": x.bfloat16(), "k": 1}]
    )
    assert {(row.example, row.quantity) for row in both.of(RIGHT)} == {
        (f"inputs {i}", name) for i in (0, 1) for name in ("result 0", "result 1")
    }


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda x: softmax(x) * 1.01, "result: error"),
        (lambda x: (softmax(x),), "must return result, got result 0"),
        (lambda x: softmax(x) + 0 * x.detach(), None),
        (lambda x: softmax(x.detach()) + 0 * x, "gradient of x: error"),
        (lambda x: 1 / 0, "raised ZeroDivisionError"),
    ],
)
def test_a_function_is_wrong_in_its_results_or_gradients(function, said):
    call = {"x": torch.randn(5, 40, generator=torch.Generator().manual_seed(0))}
    if said is None:
        testing.check(function, softmax, call, gradients=["x"])
    else:
        with pytest.raises(AssertionError, match=said):
            testing.check(function, softmax, call, gradients=["x"])


@pytest.mark.parametrize(
    ("reference", "options", "error", "message"),
    [
        (lambda x: softmax(x.float()), {}, ValueError, "reference must compute in the dtype of its inputs"),
        (lambda x: softmax(x)[9], {}, ValueError, "the reference must run on every example"),
        (softmax, {"gradients": ["y"]}, ValueError, "gradients must name floating tensors .* got y"),
        (softmax, {"inputs": []}, ValueError, "inputs must have a call, got none"),
        (
            softmax,
            {"inputs": {"y": torch.ones(2)}},
            TypeError,
            r"got \(x\), which lacks y; rename",
        ),
        (softmax, {"inputs": [3]}, TypeError, "inputs must be a dict of arguments"),
        (3, {}, TypeError, "reference must be callable, got int"),
    ],
)
def test_a_wrong_check_is_refused(reference, options, error, message):
    inputs = options.pop("inputs", {"x": torch.randn(3, 4)})
    with pytest.raises(error, match=message):
        testing.check(lambda x: softmax(x), reference, inputs, **options)
