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
