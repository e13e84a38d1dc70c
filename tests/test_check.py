"""Reports about functions of others: right, wrong, raised, unsupported, and what is refused."""

import functools

import pytest
import torch
import torch.nn.functional as F

from electra_fast import ops, testing
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
    assert {row.dtype for row in report.of(RIGHT)} >= {"float32", "bfloat16", "float16"}
    assert "kept share" in {row.quantity for row in report.of(RIGHT) if row.example == "distribution"}
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


def test_gradients_are_compared_whatever_the_grad_mode():
    def without(x, bias):
        torch.set_grad_enabled(False)
        return gelu(x, bias)

    with torch.inference_mode():
        report = testing.report("bias_gelu", gelu, dtypes=F32, seed=0)
    assert "gradient of x" in {row.quantity for row in report.of(RIGHT)}
    try:
        assert testing.report("bias_gelu", without, dtypes=F32, seed=0).of(WRONG)
    finally:
        torch.set_grad_enabled(True)


class ChangesItsInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias):
        ctx.save_for_backward(x, bias)
        return gelu(x, bias)

    @staticmethod
    def backward(ctx, dy):
        x, bias = ctx.saved_tensors
        with torch.enable_grad():
            leaves = [t.detach().clone().requires_grad_() for t in (x, bias)]
            found = torch.autograd.grad(gelu(*leaves), leaves, dy)
        x.data.mul_(2)
        return found


def test_an_input_that_changes_in_the_backward_pass_is_found():
    report = testing.report("bias_gelu", lambda x, bias: ChangesItsInput.apply(x, bias), dtypes=F32, seed=0)
    assert any("x must not change in the backward pass" in row.why for row in report.of(WRONG))


def test_random_cases_have_sizes_that_the_examples_do_not():
    def last_block_lost(x, bias):
        y = gelu(x, bias)
        rows = y.flatten(0, -2).shape[0]
        whole = rows // 64 * 64 if rows > 64 else rows
        return torch.where((torch.arange(rows) < whole).view(*y.shape[:-1], 1), y, 0)

    assert testing.report("bias_gelu", last_block_lost, seed=0, cases=0).ok
    wrong = testing.report("bias_gelu", last_block_lost, seed=0).of(WRONG)
    assert {row.example for row in wrong} == {"random cases"} and "bias_gelu (seed " in wrong[0].why


def test_random_cases_that_are_not_run_are_counted():
    report = testing.report("bias_gelu", lambda x, bias: gelu(x, bias) + 1, dtypes=F32, seed=0)
    verdicts = [row.verdict for row in report.rows if row.example == "random cases"]
    left = verdicts[verdicts.index(UNSUPPORTED) :]
    assert verdicts.count(WRONG) == 3 and set(left) == {UNSUPPORTED} and len(verdicts) > 15
    assert "not run, because 3 random cases were wrong" in str(report)


class Module(torch.nn.Module):
    def forward(self, logits, replaced):
        return ops.rtd_loss(logits, replaced)


@pytest.mark.parametrize("function", [Module(), functools.partial(ops.rtd_loss, weights=None)])
def test_a_module_and_a_partial_function_are_functions(function):
    report = testing.report("rtd_loss", function, dtypes=F32, seed=0)
    assert report.ok or (isinstance(function, functools.partial) and report.of(RIGHT))
    assert isinstance(function, functools.partial) or reasons(report) == {"weights"}


# --- what is not supported ----------------------------------------------------------------------------------


def plain_attention(q, k, v, causal=False):
    return ops.TORCH.attention(q, k, v, causal=causal)


def test_arguments_that_the_function_lacks_are_listed_as_unsupported():
    report = testing.report("attention", plain_attention, dtypes=F32, seed=0)
    assert report.ok and reasons(report) >= {"key_mask", "scale", "cu_seqlens"}
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


def test_a_function_of_contiguous_tensors_declares_its_layouts():
    def contiguous(x, bias):
        if not x.is_contiguous():
            raise ValueError("x is not contiguous")
        return gelu(x, bias)

    assert testing.report("bias_gelu", contiguous, seed=0).of(RAISED)
    report = testing.report("bias_gelu", contiguous, supports={"layouts": ["contiguous"]}, seed=0)
    assert report.ok and reasons(report) >= {"layouts=transposed", "layouts=strided"}


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
        ({"supports": {"dtypes": ["float8"]}}, ValueError, r"supports\['dtypes'\] must have only float32"),
        ({"supports": {"gradients": ["zz"]}}, ValueError, "must have only q, k, v, .*, got 'zz'"),
        ({"supports": ["dropout"]}, TypeError, "supports must be a dict, got"),
        ({"adapter": lambda function: None}, TypeError, "adapter must return a function, got NoneType"),
        ({"checks": "nope"}, ValueError, "checks must be 'all' or names of .*, got 'nope'"),
        ({"seed": -1}, ValueError, r"seed must be an integer in \[0, 2\^63\), got -1"),
        ({"limit": float("nan")}, ValueError, "limit must be a positive number of seconds, got nan"),
        ({"dtypes": ["float32"]}, ValueError, "dtypes must be some of torch.float32"),
        ({"device": "nonsense"}, ValueError, "device must be usable here, got nonsense"),
        ({"cases": -1}, ValueError, "cases must be 0 or more, got -1"),
        ({"supports": {"random": True}}, ValueError, r"supports\['random'\] must be 'own', got True"),
    ],
)
def test_a_wrong_request_is_refused_with_the_remedy(options, error, message):
    with pytest.raises(error, match=message):
        testing.report("attention", F.scaled_dot_product_attention, **options)


def test_a_required_argument_that_the_op_does_not_have_is_shown():
    with pytest.raises(TypeError, match=r"got \(x, bias, out\), which also requires out"):
        testing.report("bias_gelu", lambda x, bias, out: out)


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


def test_a_stable_algorithm_may_be_as_far_away_as_one_rounding_of_its_inputs():
    def in_two_passes(x):
        mean = x.float().mean(-1, keepdim=True)
        variance = (x.float() - mean).square().mean(-1, keepdim=True)
        return ((x.float() - mean) * (variance + 1e-5).rsqrt()).to(x.dtype)

    def reference(x):
        return F.layer_norm(x, x.shape[-1:])

    inputs = testing.inputs({"x": testing.Floats("T", "W")}, gradients=["x"], sizes={"W": (37, 1000)}, seed=0)
    testing.check(in_two_passes, reference, inputs)
    with pytest.raises(AssertionError, match="exceeds the budget"):
        testing.check(lambda x: 1.0005 * in_two_passes(x), reference, inputs)


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
        (softmax, {"checks": ["nope"]}, ValueError, "checks must be 'all' or names of"),
        (softmax, {"gradients": "x"}, TypeError, "gradients must be a list of names, got 'x'"),
        (3, {}, TypeError, "reference must be callable, got int"),
    ],
)
def test_a_wrong_check_is_refused(reference, options, error, message):
    inputs = options.pop("inputs", {"x": torch.randn(3, 4)})
    with pytest.raises(error, match=message):
        testing.check(lambda x: softmax(x), reference, inputs, **options)
