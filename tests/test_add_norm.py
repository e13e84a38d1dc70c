import pytest
import torch
import torch.nn.functional as F

from electra_fast import ops, testing
from electra_fast.philox import keep_mask

OP = "add_norm"
RNG = torch.tensor([1, 0])


def test_is_torchs_layer_norm_of_the_sum(implementation, device):
    x, r = torch.randn(2, 5, 6, 40, device=device)
    w, b = torch.randn(2, 40, device=device)
    y = testing.implementations(OP)[implementation[1]](x, r, w, b, eps=1e-5)
    assert torch.allclose(y, F.layer_norm(x + r, (40,), w, b, 1e-5), atol=1e-5)


def test_dropout_is_that_of_the_contract(implementation, device):
    """What the gradient of x loses is what was dropped."""
    x = torch.randn(3, 5, 40, device=device, requires_grad=True)
    w, b = torch.ones(40, device=device), torch.zeros(40, device=device)
    f = testing.implementations(OP)[implementation[1]]
    y = f(x, x.detach(), w, b, eps=1e-5, dropout=0.3, rng=RNG.to(device), stream=7)
    y.backward(torch.randn(3, 5, 40, device=device))
    assert torch.equal((x.grad != 0).cpu(), keep_mask(RNG, 7, torch.arange(15).view(3, 5), 40, 0.3))


def test_a_constant_row_and_an_empty_batch(implementation, device):
    f = testing.implementations(OP)[implementation[1]]
    w, b = torch.ones(8, device=device), torch.full((8,), 0.5, device=device)
    assert (f(torch.full((2, 8), 3.0, device=device), None, w, b, eps=1e-12) == 0.5).all()
    empty = torch.zeros(0, 8, device=device, requires_grad=True)
    f(empty, None, w, b, eps=1e-12).sum().backward()
    assert empty.grad.shape == (0, 8)


X = torch.zeros(2, 8)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"residual": X[:1]}, ValueError, "add_norm: residual must have shape [2, 8], got [1, 8]"),
        ({"residual": X.half()}, TypeError, "add_norm: residual must be float32, got float16"),
        ({"weight": torch.ones(7)}, ValueError, "add_norm: weight must have shape [8], got [7]"),
        ({"bias": torch.ones(8).half()}, TypeError, "add_norm: bias must be float32, got float16"),
        ({"dropout": -0.1}, ValueError, "add_norm: dropout must be in [0, 1), got -0.1"),
        ({"dropout": 0.1}, ValueError, "add_norm: rng must be given where numbers are drawn, got None"),
        ({"dropout": 0.1, "rng": RNG.int()}, TypeError, "add_norm: rng must be int64, got int32"),
    ],
)
def test_refuses(change, error, message):
    with pytest.raises(error) as caught:
        ops.add_norm(
            **{
                "x": X,
                "residual": None,
                "weight": torch.ones(8),
                "bias": torch.ones(8),
                "eps": 1e-5,
                **change,
            }
        )
    assert message in str(caught.value)
