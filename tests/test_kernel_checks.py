"""Every check accepts a right function, and refuses one that has the fault for which it searches."""

import contextlib
import ctypes
import faulthandler
import multiprocessing
import signal
import time

import pytest
import torch

from electra_fast import testing
from electra_fast.testing import checks
from electra_fast.testing.checks import CHECKS, check_names, cuda
from electra_fast.testing.example import Definition, Example

NEED_A_GPU = {"graph", "streams", "races"}
NEED_GRADIENTS = {"upstream", "saved", "inplace"}


def scale(x, weight):
    return x * weight


class Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, backward):
        ctx.save_for_backward(x, weight)
        ctx.x, ctx.weight, ctx.gradient, ctx.calls = x, weight, backward, 0
        return x * weight

    @staticmethod
    def backward(ctx, dy):
        return *ctx.gradient(ctx, dy), None


def gradients(ctx, dy):
    x, weight = ctx.saved_tensors
    return dy * weight, (dy * x).sum(0)


def scale_with(backward):
    """Return `scale` with its gradient written out."""
    return lambda x, weight: Scale.apply(x, weight, backward)


def example(with_gradients=True):
    g = torch.Generator().manual_seed(0)
    args = {"x": torch.randn(6, 40, generator=g), "weight": torch.randn(40, generator=g)}
    wanted = ("x", "weight") if with_gradients else ()
    return Example("scale", "small", args, wanted, definition=Definition(scale, scale))


@torch.library.custom_op("electra_fast_tests::scale", mutates_args=())
def scale_operator(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * weight


scale_operator.register_fake(lambda x, weight: torch.empty_like(x))
scale_operator.register_autograd(
    gradients,
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


@torch.library.custom_op("electra_fast_tests::wrong_shape", mutates_args=())
def wrong_shape(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * weight


wrong_shape.register_fake(lambda x, weight: torch.empty_like(weight))


# --- faults -------------------------------------------------------------------------------------------------


def outside(x, first):
    """Return the element of the memory around x at this place, counted from the first element of x."""
    return x.detach().as_strided((1,), (1,), x.storage_offset() + first)


def random_result(x, weight):
    return x * weight + torch.rand((), device=x.device)


def random_gradient(ctx, dy):
    return gradients(ctx, dy + torch.rand(()))


def writes_after_an_input(x, weight):
    outside(weight, weight.numel()).fill_(7)
    return x * weight


def writes_before_an_input(x, weight):
    outside(x, -1).fill_(7)
    return x * weight


def writes_into_an_input(x, weight):
    x.detach()[2, 3] = 7
    return x * weight


def writes_outside_of_its_result(x, weight):
    y = torch.empty_like(x)
    outside(y, y.numel()).fill_(7)
    return x * weight + 0 * y.nan_to_num()


def reads_after_an_input(x, weight):
    return x * weight + outside(x, x.numel())


def leaves_a_row_uninitialized(x, weight):
    y = torch.empty_like(x)
    y[:-1] = (x * weight)[:-1]
    return y


def reads_a_byte_after_an_input(x, weight):
    ctypes.string_at(x.data_ptr() + x.nbytes, 1)
    return x * weight


def ignores_the_offset(x, weight):
    return x.as_strided(x.shape, x.stride(), 0) * weight


def contiguous(x):
    """Return the memory of x as if it was contiguous."""
    return x.as_strided(x.shape, torch.empty(x.shape).stride(), x.storage_offset())


def ignores_strides(x, weight):
    return contiguous(x) * weight


def ignores_strides_of_the_upstream_gradient(ctx, dy):
    return gradients(ctx, contiguous(dy))


def changes_a_saved_tensor(ctx, dy):
    found = gradients(ctx, dy)
    ctx.saved_tensors[1].mul_(2)
    return found


def adds_to_its_gradient(ctx, dy):
    ctx.calls += 1
    return gradients(ctx, ctx.calls * dy)


def saves_x_by_itself(ctx, dy):
    return dy * ctx.weight, (dy * ctx.x).sum(0)


def breaks_the_graph(x, weight):
    torch._dynamo.graph_break()
    return x * weight


def is_coarse_under_autocast(x, weight):
    return (x.to(torch.float8_e5m2) if torch.is_autocast_enabled("cpu") else x).to(x.dtype) * weight


def is_infinite_under_autocast(x, weight):
    y = x * weight
    return (y * 1e6).half().float() / 1e6 if torch.is_autocast_enabled("cpu") else y


SHARED = torch.empty(6, 40)


def uses_a_shared_buffer(x, weight):
    SHARED.copy_(x.detach())
    time.sleep(1e-3)
    return x * weight + (SHARED - x.detach())


FAULTS = [
    ("determinism", random_result, r"result differs between two calls: .* and .* at \[0, 0\]"),
    ("determinism", scale_with(random_gradient), "gradient of x differs between two calls"),
    ("memory", writes_after_an_input, r"wrote after the memory of weight: nan and 7.0 at \[0\]"),
    ("memory", writes_before_an_input, r"wrote before the memory of x: nan and 7.0 at \[63\]"),
    ("memory", writes_into_an_input, r"wrote into the memory of x: .* and 7.0 at \[83\]"),
    ("memory", writes_outside_of_its_result, r"the function wrote outside of a tensor of 240 torch.float32"),
    ("memory", reads_after_an_input, "result differs with the contents of memory .* outside the inputs"),
    ("memory", leaves_a_row_uninitialized, r"memory that is uninitialized .*: nan and 30000.0 at \[5, 0\]"),
    ("misaligned", ignores_the_offset, "inputs offset.*contiguous tensors are right, offset are wrong: x"),
    ("strided", ignores_strides, "inputs strided.*strided are wrong: x$"),
    (
        "upstream",
        scale_with(ignores_strides_of_the_upstream_gradient),
        "strided are wrong: the upstream gradient$",
    ),
    ("saved", scale_with(changes_a_saved_tensor), "the backward pass changes weight"),
    ("saved", scale_with(adds_to_its_gradient), "gradient of x differs in a second backward pass"),
    ("inplace", scale_with(saves_x_by_itself), "gradient of weight differs if x is set to 0 after the call"),
    ("compile", breaks_the_graph, "not compiled: Unsupported"),
    ("opcheck", wrong_shape, "opcheck: OpCheckError"),
    ("autocast", is_coarse_under_autocast, "under autocast.*exceeds the budget"),
    ("autocast", is_infinite_under_autocast, "under autocast.*inf"),
    ("threads", uses_a_shared_buffer, "result differs while another thread calls the function"),
]


CASES = {
    f"{name}-{i}{'' if with_gradients else '-no gradients'}": (name, function, message, with_gradients)
    for i, (name, function, message) in enumerate(FAULTS)
    for with_gradients in (True, False)
    if with_gradients or ("gradient" not in message and name not in NEED_GRADIENTS)
}


@pytest.mark.parametrize(("name", "function", "message", "with_gradients"), CASES.values(), ids=CASES)
def test_a_fault_is_found_and_named(name, function, message, with_gradients):
    with pytest.raises(AssertionError, match=rf"scale \(small.*{message}"):
        CHECKS[name](function, example(with_gradients))


@pytest.mark.parametrize("with_gradients", [True, False], ids=["gradients", "no gradients"])
@pytest.mark.parametrize("name", [name for name in CHECKS if name not in {"reads", *NEED_A_GPU}])
def test_a_right_function_is_accepted(name, with_gradients):
    functions = (scale_operator,) if name == "opcheck" else (scale, scale_with(gradients))
    for function in functions:
        without = name in NEED_GRADIENTS and not with_gradients
        with (
            pytest.raises(NotImplementedError, match="no gradients") if without else contextlib.nullcontext()
        ):
            CHECKS[name](function, example(with_gradients))


# --- what cannot be checked everywhere ----------------------------------------------------------------------


def exit_code(f, one):
    """Return the exit code of a process that runs the check `reads`."""

    def isolated():
        faulthandler.disable()  # a crash is expected
        checks.ISOLATED.set(True)
        CHECKS["reads"](f, one)

    process = multiprocessing.get_context("fork").Process(target=isolated)
    process.start()
    process.join(60)
    return process.exitcode


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
@pytest.mark.parametrize("with_gradients", [True, False], ids=["gradients", "no gradients"])
def test_a_read_after_an_input_ends_the_process(with_gradients):
    one = example(with_gradients)
    assert exit_code(scale_with(gradients), one) == 0
    assert exit_code(scale, one.laid_out("strided")) == 0
    assert exit_code(reads_a_byte_after_an_input, one) == -signal.SIGSEGV
    with pytest.raises(NotImplementedError, match="needs isolate=True"):
        CHECKS["reads"](scale, one)


@pytest.mark.skipif("triton" not in testing.implementations("bias_gelu", "cpu"), reason="no interpreter")
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_tritons_interpreter_reads_no_masked_element_and_has_one_thread():
    from unmasked_kernel import copy_with_a_look_ahead

    kernel = testing.implementations("bias_gelu", "cpu")["triton"]
    args = {"x": torch.randn(3, 37), "bias": torch.randn(37)}
    one = Example("bias_gelu", "small", args, ("x", "bias"))
    assert exit_code(kernel, one) == 0

    def looks_ahead(x):
        y = torch.empty_like(x)
        copy_with_a_look_ahead[(1,)](x, y, N=64)
        return y

    copy = Example("copy", "small", {"x": torch.randn(64)}, definition=Definition(torch.clone, torch.clone))
    assert exit_code(looks_ahead, copy) == -signal.SIGSEGV
    with pytest.raises(NotImplementedError, match="interpreter runs the kernels of one thread"):
        CHECKS["threads"](kernel, one)


@pytest.mark.parametrize("name", sorted(NEED_A_GPU))
def test_a_check_that_needs_a_gpu_says_so(name):
    with pytest.raises(NotImplementedError, match="needs a GPU"):
        CHECKS[name](scale, example())


def test_a_check_without_the_arguments_that_it_needs_says_so():
    integers = Example(
        "next", "small", {"ids": torch.arange(5)}, definition=Definition(lambda ids: ids + 1, None)
    )
    for name, reason in (("autocast", "no floats"), ("threads", "no floats"), ("inplace", "no gradients")):
        with pytest.raises(NotImplementedError, match=reason):
            CHECKS[name](lambda ids: ids + 1, integers)
    for name in ("misaligned", "strided"):
        with pytest.raises(NotImplementedError, match="no tensors"):
            CHECKS[name](lambda n: torch.ones(n), Example("ones", "small", {"n": 3}))
    with pytest.raises(NotImplementedError, match=r"not an operator of torch\.library"):
        CHECKS["opcheck"](scale, example())


class FakeGraph:
    """A stand-in for a CUDA graph, which needs a GPU: its replay runs Python again, or does nothing."""

    def __init__(self, monkeypatch, replays=True, fails=False):
        self.replays, self.fails = replays, fails
        monkeypatch.setattr(cuda, "_gpu", lambda example: torch.device("cpu"))
        monkeypatch.setattr(cuda, "cuda_graph", self.capture)
        for name in ("Stream", "synchronize", "_sleep"):
            monkeypatch.setattr(torch.cuda, name, lambda *args: None)
        for name in ("device", "stream"):
            monkeypatch.setattr(torch.cuda, name, lambda *args: contextlib.nullcontext())

    def capture(self, body):
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        body()
        return body if self.replays else lambda: None


@pytest.mark.parametrize("with_gradients", [True, False], ids=["gradients", "no gradients"])
@pytest.mark.parametrize("name", sorted(NEED_A_GPU))
def test_what_a_gpu_check_compares(name, with_gradients, monkeypatch):
    """It shows only that these checks compare the right tensors: no graph and no stream is involved."""
    FakeGraph(monkeypatch)
    monkeypatch.setattr(cuda, "BUSY", 2)
    monkeypatch.setattr(cuda, "WIDTH", 16)
    one = example(with_gradients)
    CHECKS[name](scale, one)
    CHECKS[name](scale_with(gradients), one.laid_out("strided"))
    with pytest.raises(AssertionError, match="result differs between"):
        CHECKS[name](random_result, one)


def test_a_graph_that_keeps_old_values_or_cannot_be_captured_is_refused(monkeypatch):
    FakeGraph(monkeypatch, replays=False)
    with pytest.raises(AssertionError, match="result differs between a call and the replay of a CUDA graph"):
        CHECKS["graph"](scale, example())
    FakeGraph(monkeypatch, fails=True)
    with pytest.raises(
        AssertionError, match="not captured: operation not permitted when stream is capturing"
    ):
        CHECKS["graph"](scale, example())


def uses_the_default_stream(x, weight):
    with torch.cuda.stream(torch.cuda.default_stream()):
        return x * weight


def waits_for_the_gpu(x, weight):
    return x * weight * (1 if x.sum().item() < 1e9 else 2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs and streams need a GPU")
@pytest.mark.parametrize(
    ("name", "fault", "message"),
    [
        ("graph", waits_for_the_gpu, "not captured"),
        ("streams", uses_the_default_stream, "result differs between two CUDA streams"),
        ("races", random_result, "result differs between calls while another stream is busy"),
    ],
)
def test_a_gpu_check_on_a_gpu(name, fault, message):
    one = example().to(device="cuda")
    CHECKS[name](scale, one)
    with pytest.raises(AssertionError, match=message):
        CHECKS[name](fault, one)


def test_names_of_checks():
    assert check_names("check", "all") == tuple(CHECKS)
    assert check_names("check", ["memory", "saved"]) == ("memory", "saved")
    assert check_names("check", "memory") == ("memory",)
    with pytest.raises(
        ValueError, match=r"check: checks must be 'all' or names of determinism, .*, got 'speed'"
    ):
        check_names("check", ["memory", "speed"])
    for name, check in CHECKS.items():
        assert check.says.endswith("."), name
