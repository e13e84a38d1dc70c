import math

import pytest
import torch
import torch.nn.functional as F
from conftest import both_paths

from electra_fast import ops, testing
from electra_fast.testing.examples import Example

OP = "bias_gelu"


def test_is_the_erf_form_and_not_the_tanh_form(implementation, device):
    x = torch.linspace(-6, 6, 700, device=device).view(7, 100)
    y = testing.implementations(OP)[implementation[1]](x, torch.zeros(100, device=device))
    assert torch.allclose(y, F.gelu(x), atol=1e-6)
    assert not torch.allclose(y, F.gelu(x, approximate="tanh"), atol=1e-6)


def test_x_may_be_bfloat16_and_the_bias_float32(implementation, device):
    x = torch.randn(4, 8, device=device).bfloat16().requires_grad_()
    bias = torch.randn(8, device=device, requires_grad=True)
    y = testing.implementations(OP)[implementation[1]](x, bias)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == torch.bfloat16 and bias.grad.dtype == torch.float32


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0, 0), (2, 0, 4), (0,)])
def test_any_axis_may_be_empty(shape, implementation, device):
    x = torch.zeros(shape, device=device, requires_grad=True)
    bias = torch.ones(shape[-1], device=device, requires_grad=True)
    y = testing.implementations(OP)[implementation[1]](x, bias)
    y.sum().backward()
    assert y.shape == x.grad.shape == shape
    assert bias.grad.shape == bias.shape and (bias.grad == 0).all()


def test_x_may_have_one_axis_only(implementation, device):
    x, bias = (torch.randn(8, device=device, requires_grad=True) for _ in range(2))
    y = testing.implementations(OP)[implementation[1]](x, bias)
    y.sum().backward()
    assert torch.allclose(y, F.gelu(x + bias), atol=1e-6) and torch.equal(x.grad, bias.grad)


def batch(T, F, dtype=torch.float32):
    g = torch.Generator().manual_seed(F)
    args = {"x": (2 * torch.randn(T, F, generator=g)).to(dtype), "bias": torch.randn(F, generator=g)}
    return Example("bias_gelu", f"T={T} F={F} {dtype}", args, ("x", "bias"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("F", [1, 5, 36, 100, 256, 1000, 3072])
def test_any_width(F, dtype, device):
    testing.check_example(ops.bias_gelu, batch(70, F, dtype).to(device=device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_thousands_of_rows_are_summed_in_float32(dtype, device):
    testing.check_example(ops.bias_gelu, batch(20_000, 24, dtype).to(device=device))


def test_the_bias_need_not_be_contiguous(implementation, device):
    function = testing.implementations(OP)[implementation[1]]
    args = batch(8, 36).to(device=device).args
    strided = torch.stack([args["bias"], -args["bias"]], 1)[:, 0]
    assert torch.equal(function(args["x"], strided), function(**args))


def compiled():
    """Return the CPU kernel, which is more accurate in the tails than the error budget requires."""
    if "cpu" not in testing.implementations(OP):
        pytest.skip("electra_fast._C is not built")
    return testing.implementations(OP)["cpu"]


def test_the_error_in_the_left_tail_is_relative_to_the_result(seed):
    z = -12 * (1 - torch.rand(1 << 16, 16, generator=torch.Generator().manual_seed(seed)))  # never 0
    y = compiled()(z, torch.zeros(16)).double()
    exact = z.double() * 0.5 * torch.special.erfc(-z.double() / math.sqrt(2))
    eps = torch.finfo(torch.float32).eps
    assert ((y / exact - 1).abs() <= 4 * eps * (1 + z.double().square() / 2)).all()  # z^2 is rounded too


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_infinite_nan_and_large_values(dtype):
    ends = torch.tensor([[torch.inf, -torch.inf, torch.nan, 6e4, -6e4, 0.0]], dtype=dtype)
    x = ends.expand(40, 6).clone().requires_grad_()
    y = compiled()(x, torch.zeros(6, dtype=dtype))
    y.sum().backward()
    for got, wanted in ((y, [torch.inf, 0, torch.nan, 6e4, 0, 0]), (x.grad, [1, 0, torch.nan, 1, 0, 0.5])):
        wanted = torch.tensor(wanted, dtype=dtype).expand(40, 6)
        assert torch.equal(got.nan_to_num(7), wanted.nan_to_num(7))


def test_any_number_of_threads_gives_the_same_bits(check_thread_counts):
    check_thread_counts(ops.bias_gelu, batch(3001, 100))


@both_paths(OP)
@pytest.mark.parametrize(
    ("bias", "error", "message"),
    [
        (torch.zeros(7), ValueError, "bias_gelu: bias must have shape [8], got [7]"),
        (torch.zeros(8).bfloat16(), TypeError, "bias_gelu: bias must be float32, got bfloat16"),
    ],
)
def test_refuses(bias, error, message, path):
    with pytest.raises(error) as caught:
        path(torch.zeros(2, 8), bias)
    assert message in str(caught.value)


# One column, odd widths, just above a power of two, two blocks of columns.
@pytest.mark.parametrize("W", [1, 5, 36, 100, 1030])
def test_rows_of_any_width_and_number(W, implementation, device):
    f = testing.implementations(OP)[implementation[1]]
    generator = torch.Generator().manual_seed(W)
    args = {"x": 3 * torch.randn(67, W, generator=generator), "bias": torch.randn(W, generator=generator)}
    args = {name: x.to(device) for name, x in args.items()}
    testing.check_example(f, testing.Example(OP, f"W={W}", args, ("x", "bias")))


@pytest.mark.filterwarnings("ignore:overflow encountered")  # of NumPy, in Triton's interpreter
def test_tails(implementation, device):
    """gelu(z) is within 2^-20, its gradient within 2^-21 for z in [-12, 12]; both are exact far outside."""
    z = torch.linspace(-12, 12, 4800, device=device).view(-1, 48).requires_grad_()
    exact = z.detach().double().cpu().requires_grad_()
    f = testing.implementations(OP)[implementation[1]]
    for function, x in ((lambda x: f(x, torch.zeros(48, device=device)), z), (F.gelu, exact)):
        function(x).sum().backward()
    assert (f(z, torch.zeros(48, device=device)).cpu() - F.gelu(exact)).abs().max() <= 2.0**-20
    assert (z.grad.cpu() - exact.grad).abs().max() <= 2.0**-21
    far = torch.tensor([[-1e20, -100.0, 100.0, 1e20, float("nan")]], device=device, requires_grad=True)
    y = f(far, torch.zeros(5, device=device))
    y.sum().backward()
    assert torch.equal(y[0, :4], torch.tensor([0, 0, 100, 1e20], device=device)) and y[0, 4].isnan()
    assert torch.equal(far.grad[0, :4], torch.tensor([0.0, 0, 1, 1], device=device))
    assert far.grad[0, 4].isnan()
