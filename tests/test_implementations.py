"""Properties of every implementation of every op."""

import inspect
import math

import pytest
import torch
from torch import Tensor

from electra_fast import ops, reference, testing
from electra_fast.ops import _operators
from electra_fast.ops._public import Kernels
from electra_fast.testing import budget


def function_of(implementation):
    op, name = implementation
    return op, testing.implementations(op)[name]


def small(op, device, seed=0, count=2):
    """Return the first and the last `count` examples of an op."""
    examples = [e.to(device=device) for e in testing.examples(op, seed)]
    return examples[:count] + examples[-count:]


def test_matches_the_reference_within_the_error_budget(implementation, device, seed):
    op, function = function_of(implementation)
    testing.check_op(op, function, seed=seed, device=device)


@pytest.mark.parametrize("kind", [tuple, list])
def test_a_plain_tuple_or_list_of_results_is_accepted(op, kind):
    function = getattr(reference, op)

    def plain(**args):
        result = function(**args)
        return result if isinstance(result, Tensor) else kind(result)

    testing.check_op(op, plain, seed=0, dtypes=[torch.float32])
    testing.fuzz_op(op, plain, seed=0, seconds=0)


@pytest.mark.parametrize(
    ("function", "result", "message"),
    [
        ("rtd_loss", (1, 2, 3), r"rtd_loss: must return RTDLoss\(loss, counts\), got tuple of 3"),
        ("rtd_loss", None, r"rtd_loss: must return RTDLoss\(loss, counts\), got None"),
        ("rtd_loss", torch.zeros(()), r"rtd_loss: must return RTDLoss\(loss, counts\), got Tensor"),
        ("bias_gelu", None, "bias_gelu: must return a Tensor, got None"),
        ("embed", [1], r"embed: must return a Tensor or Embedded\(x, word\), got list of 1"),
        ("mlm_head", (1, 2), r"must return MLMHead\(loss, samples, correct, lse, table\), got tuple of 2"),
        ("rtd_loss", reference.Embedded(1, 2), r"must return RTDLoss\(loss, counts\), got Embedded of 2"),
        ("rtd_loss", (1, 2), r"rtd_loss: loss must be a Tensor, got int"),
        ("embed", [torch.zeros(())] * 2, r"embed \(.*\): must return result, got x, word"),
    ],
)
def test_a_result_of_another_type_is_named(function, result, message):
    with pytest.raises(AssertionError, match=message):
        testing.check_op(function, lambda **args: result, seed=0)


def changes_its_input(x, bias):
    y = ops.bias_gelu(x, bias)
    with torch.no_grad():
        bias.add_(0 if 0 in bias.stride() else 1)
    return y


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            lambda x, bias: ops.bias_gelu(x, bias).float(),
            "result has dtype torch.float32, not torch.bfloat16",
        ),
        (changes_its_input, r"bias_gelu \(.*\): bias must not change, got another value"),
    ],
    ids=["another dtype", "an input that changes"],
)
def test_another_dtype_and_a_changed_input_are_found(function, message):
    with pytest.raises(AssertionError, match=message):
        testing.check_op("bias_gelu", function, seed=0)
    with pytest.raises(AssertionError, match="bias_gelu"):
        testing.fuzz_op("bias_gelu", function, seed=0, seconds=20)


@pytest.mark.parametrize("call", [testing.check_op, testing.fuzz_op])
def test_an_unknown_op_and_a_value_that_is_not_a_function_are_refused(call):
    with pytest.raises(ValueError, match=f"{call.__name__}: op must be one of .*, got nosuch"):
        call("nosuch", ops.bias_gelu)
    with pytest.raises(TypeError, match=f"{call.__name__}: function must be callable, got int"):
        call("bias_gelu", 3)


def test_every_planted_fault_is_found(op):
    function = testing.implementations(op)["reference"]
    for name, fault in testing.mutations(op).items():
        with pytest.raises((AssertionError, IndexError)):
            testing.check_op(op, fault(function), seed=1)
            pytest.fail(f"{op}: the check accepts a fault: {name}", pytrace=False)


def test_the_error_of_plain_pytorch_allows_one_large_error_but_not_many():
    ref, eps = torch.linspace(-1, 1, 1000, dtype=torch.float64), 2.0**-23
    low, got = ref.float(), ref.float()
    got[5] += 4 * eps  # low is within eps / 4, so 2.5 eps are allowed
    assert budget.judge("y", got, ref, low).why
    assert not budget.judge("y", got, ref, low, plain_error=2 * eps).why
    got += 3 * eps  # an error of every element
    assert "L2" in budget.judge("y", got, ref, low, plain_error=10 * eps).why


def test_reads_only_what_was_written_and_writes_only_its_own(implementation, device):
    op, function = function_of(implementation)
    for example in small(op, device):
        outcomes = []
        for poison in (float("nan"), 3e4):
            with testing.guarded_memory(poison):
                outcomes.append(testing.run(function, example))
        assert_bitwise(*outcomes)


def test_is_deterministic(implementation, device):
    op, function = function_of(implementation)
    for example in small(op, device):
        assert_bitwise(testing.run(function, example), testing.run(function, example))


def assert_bitwise(first, second):
    for a, b in zip(first, second, strict=True):
        for name in a:
            assert torch.equal(a[name].nan_to_num(), b[name].nan_to_num()), name


def raw_calls(op, example):
    """Return the (operator, arguments) calls that the public op makes, forward and backward."""
    fwd, bwd = (op, None) if op in _operators.OPERATORS else (f"{op}_fwd", f"{op}_bwd")
    calls = []

    def recorded(name):
        operator = getattr(torch.ops.electra_fast, name).default

        def call(*args):
            calls.append((operator, tuple(a.detach() if isinstance(a, Tensor) else a for a in args)))
            return operator(*args)

        return call

    function = getattr(ops, op).over(Kernels(recorded(fwd), recorded(bwd) if bwd else None))
    testing.run(function, example)
    return calls


def test_opcheck(op, device):
    for example in small(op, device, count=1):
        for operator, args in raw_calls(op, example):
            torch.library.opcheck(operator, args)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_into_one_graph_forward_and_backward(op, device):
    example = small(op, device, count=1)[0]
    torch._dynamo.reset()
    compiled = torch.compile(getattr(ops, op), fullgraph=True, backend="aot_eager")
    assert_bitwise(testing.run(compiled, example), testing.run(getattr(ops, op), example))


def test_signature_is_the_references(op):
    def parameters(function):
        return [(p.name, p.default, p.kind) for p in inspect.signature(function).parameters.values()]

    ours = parameters(getattr(ops, op))
    assert ours == parameters(getattr(reference, op))
    assert sum(kind != inspect.Parameter.KEYWORD_ONLY for *_, kind in ours) <= 8


@pytest.mark.parametrize(
    ("function", "argument", "value", "rule"),
    [
        ("add_norm", "eps", -1e-12, "at least 0 and finite"),
        ("embed", "eps", math.nan, "at least 0 and finite"),
        ("attention", "scale", math.nan, "finite"),
        ("attention_qkv", "scale", math.inf, "finite"),
        ("add_norm", "stream", -1, r"in \[0, 2\^32\)"),
        ("embed", "stream", 2**32, r"in \[0, 2\^32\)"),
        ("attention", "stream", 2**32, r"in \[0, 2\^32\)"),
    ],
)
def test_numbers_outside_their_range_are_refused(function, argument, value, rule):
    example = small(function, "cpu", count=1)[0]
    with pytest.raises(ValueError, match=f"{function}: {argument} must be {rule}, got"):
        getattr(ops, function)(**{**example.args, argument: value})


def _double(example):
    return {n: x.double().requires_grad_() if n in example.gradients else x for n, x in example.args.items()}


@pytest.mark.parametrize("functions", [ops, reference], ids=["ops", "reference"])
def test_gradcheck_in_float64(differentiable, functions):
    op = differentiable
    chosen = {
        "attention": "packed, dropout D=36",
        "attention_qkv": "holes",
        "rtd_loss": "large logits",
        "mlm_head": "M=9",
    }
    example = next(e for e in testing.examples(op) if e.name.startswith(chosen.get(op, "")) and e.gradients)
    args = _double(example)
    names = example.gradients

    def scalar(*tensors):
        result = getattr(functions, op)(**{**args, **dict(zip(names, tensors, strict=True))})
        return result if isinstance(result, Tensor) else result.loss

    inputs = tuple(args[n] for n in names)
    assert torch.autograd.gradcheck(scalar, inputs, fast_mode=True)


def test_inference_mode_builds_no_graph(op, device):
    example = small(op, device, count=1)[0]
    with torch.inference_mode():
        result = getattr(ops, op)(**example.args)
    for y in result if isinstance(result, tuple) else (result,):
        assert y is None or not y.requires_grad


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CPU has nothing to synchronise with")
def test_a_call_costs_no_synchronisation(op, device):
    example = small(op, device, count=1)[0]
    args = {n: x.requires_grad_() if n in example.gradients else x for n, x in example.args.items()}

    def step():
        result = getattr(ops, op)(**args)
        results = result if isinstance(result, tuple) else (result,)
        wanted = [y.sum() for y in results if y is not None and y.requires_grad]
        if wanted:
            sum(wanted).backward()

    step()  # the first call may synchronise, to set something up
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
