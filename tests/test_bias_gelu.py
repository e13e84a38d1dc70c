import pytest
import torch
import torch.nn.functional as F

from electra_fast import ops, testing

OP = "bias_gelu"


def test_is_the_erf_form_and_not_the_tanh_form(implementation, device):
    x = torch.linspace(-6, 6, 700, device=device).view(7, 100)
    y = testing.implementations(OP)[implementation[1]](x, torch.zeros(100, device=device))
    assert torch.allclose(y, F.gelu(x), atol=1e-6)
    assert not torch.allclose(y, F.gelu(x, approximate="tanh"), atol=1e-6)


def test_float32_bias_beside_bfloat16(implementation, device):
    x = torch.randn(4, 8, device=device).bfloat16().requires_grad_()
    bias = torch.randn(8, device=device, requires_grad=True)
    y = testing.implementations(OP)[implementation[1]](x, bias)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == torch.bfloat16 and bias.grad.dtype == torch.float32


def test_an_empty_batch(implementation, device):
    bias = torch.ones(8, device=device, requires_grad=True)
    testing.implementations(OP)[implementation[1]](torch.zeros(0, 8, device=device), bias).sum().backward()
    assert (bias.grad == 0).all()


@pytest.mark.parametrize(
    ("bias", "error", "message"),
    [
        (torch.zeros(7), ValueError, "bias_gelu: bias must have shape [8], got [7]"),
        (torch.zeros(8).bfloat16(), TypeError, "bias_gelu: bias must be float32, got bfloat16"),
    ],
)
def test_refuses(bias, error, message):
    with pytest.raises(error) as caught:
        ops.bias_gelu(torch.zeros(2, 8), bias)
    assert message in str(caught.value)


# Widths of one column, of an odd number, beside a power of two, and of two blocks of columns.
@pytest.mark.parametrize("W", [1, 5, 36, 100, 1030])
def test_rows_of_any_width_and_number(W, implementation, device):
    f = testing.implementations(OP)[implementation[1]]
    generator = torch.Generator().manual_seed(W)
    args = {"x": 3 * torch.randn(67, W, generator=generator), "bias": torch.randn(W, generator=generator)}
    args = {name: x.to(device) for name, x in args.items()}
    testing.check_example(f, testing.Example(OP, f"W={W}", args, ("x", "bias")))


@pytest.mark.filterwarnings("ignore:overflow encountered")  # numpy's, in Triton's interpreter
def test_tails(implementation, device):
    """gelu(z) from -12 to 12 and its gradient are right within float32's rounding of 1; and far outside."""
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
