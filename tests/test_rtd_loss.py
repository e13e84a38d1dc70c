import pytest
import torch

from electra_fast import ops, testing

OP = "rtd_loss"


def function_of(implementation):
    return testing.implementations(OP)[implementation[1]]


def test_large_and_infinite_logits(implementation, device):
    x = torch.tensor([1e4, -1e4, torch.inf, -torch.inf, -1e4, 0.0], device=device, requires_grad=True)
    y = torch.tensor([True, False, True, False, True, True], device=device)
    loss, counts = function_of(implementation)(x, y)
    loss.backward()
    assert loss.item() == pytest.approx((1e4 + torch.tensor(2.0).log().item()) / 6)
    assert torch.allclose(x.grad.cpu(), torch.tensor([0, 0, 0, 0, -1, -0.5]) / 6)
    assert counts.tolist() == [2, 0, 2, 2]


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")  # of NumPy
def test_the_largest_logits_add_up_in_float64(implementation, device):
    x = torch.tensor([3e38, -3e38, 3e38, 1.0], device=device, requires_grad=True)
    y = torch.tensor([False, True, False, True], device=device)
    w = torch.tensor([2.0, 2.0, 2.0, 2.0], device=device)
    for weights in (None, w):
        loss, _ = function_of(implementation)(x, y, weights)
        assert loss.item() == pytest.approx(0.75 * 3e38)
        (dx,) = torch.autograd.grad(loss, x)
        assert torch.allclose(dx[:3].cpu(), torch.tensor([0.25, -0.25, 0.25]))


def test_an_infinite_loss_stays_infinite(implementation, device):
    x = torch.tensor([torch.inf, 0.0], device=device)
    assert function_of(implementation)(x, torch.tensor([False, True], device=device)).loss == torch.inf


def test_nan_is_not_lost(implementation, device):
    y = torch.tensor([True, False], device=device)
    x = torch.tensor([torch.nan, 1.0], device=device)
    assert function_of(implementation)(x, y).loss.isnan()
    w = torch.tensor([1.0, torch.nan], device=device)
    assert function_of(implementation)(torch.zeros(2, device=device), y, w).loss.isnan()


def test_tokens_of_weight_zero_may_have_any_logit(implementation, device):
    x = torch.tensor([torch.nan, torch.inf, 2.0], device=device, requires_grad=True)
    y = torch.tensor([True, False, False], device=device)
    loss, counts = function_of(implementation)(x, y, torch.tensor([0.0, 0.0, 3.0], device=device))
    loss.backward()
    assert loss.item() == pytest.approx(2.126928, rel=1e-6)
    assert x.grad[:2].tolist() == [0, 0] and counts.tolist() == [0, 3, 0, 0]


@pytest.mark.parametrize("weights", [None, torch.zeros(0), torch.zeros(4)], ids=["none", "empty", "all 0"])
def test_no_tokens_and_zero_weights_give_zero(implementation, device, weights):
    n = 4 if weights is not None and len(weights) else 0
    x = torch.randn(n, device=device, requires_grad=True)
    w = None if weights is None else weights.to(device)
    loss, counts = function_of(implementation)(x, x > 0, w)
    loss.backward()
    assert loss == 0 and (x.grad == 0).all() and counts.tolist() == [0, 0, 0, 0]


def test_counts_are_exact_over_many_blocks(implementation, device):
    T = 200_001
    x = torch.ones(T, device=device)
    counts = function_of(implementation)(x, torch.arange(T, device=device) % 3 == 0).counts
    assert counts.tolist() == [66_667, 133_334, 0, 0]


@pytest.mark.skipif("triton" not in testing.implementations(OP), reason="Triton is not installed")
def test_more_blocks_than_the_second_launch_adds_at_a_time(device):
    from electra_fast.kernels._binary_cross_entropy import BLOCK_P, _binary_cross_entropy_total

    blocks = 2 * BLOCK_P + 1  # a million tokens, which the interpreter needs 20 seconds for
    partial = torch.ones(5, blocks, dtype=torch.float64, device=device)
    loss, counts = torch.empty((), device=device), torch.empty(4, device=device)
    _binary_cross_entropy_total[(1,)](partial, loss, counts, blocks, BLOCK_P=BLOCK_P)
    assert loss == 0.25 and counts.tolist() == [blocks] * 4


def test_a_retained_graph_gives_the_gradient_again(kernel, device):
    x = torch.randn(100, device=device, requires_grad=True)
    loss = kernel(x, x > 1).loss
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    (scaled,) = torch.autograd.grad(loss, x, grad_outputs=torch.tensor(4.0, device=device))
    assert torch.equal(4 * first, scaled)


def test_expanded_and_transposed_tensors_and_any_true_byte_are_accepted(implementation, device):
    f = function_of(implementation)
    x = torch.randn(7, 5, device=device)
    odd = torch.full((7, 5), 255, dtype=torch.uint8, device=device).view(torch.bool)
    assert torch.equal(
        f(x.t(), odd.t()).loss, f(x.t().contiguous(), torch.ones_like(odd).t().contiguous()).loss
    )
    one = torch.ones(1, device=device).expand(7, 5)
    assert f(one, odd).loss.item() == pytest.approx(0.3132617)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_need_not_be_aligned(implementation, device, dtype):
    f = function_of(implementation)
    x, w = torch.randn(1300, device=device).to(dtype), torch.rand(1300, device=device)
    aligned = f(x[1:].clone(), (x > 0)[1:].clone(), w[1:].clone())
    shifted = f(x[1:], (x > 0)[1:], w[1:])
    assert torch.equal(aligned.loss, shifted.loss) and torch.equal(aligned.counts, shifted.counts)


def test_triton_refuses_float64_and_names_the_reference(implementation, device):
    x = torch.zeros(3, dtype=torch.float64, device=device)
    if implementation[1] == "triton":
        with pytest.raises(TypeError, match=r"got float64; use electra_fast.reference.rtd_loss"):
            function_of(implementation)(x, x > 0)
    else:
        assert function_of(implementation)(x, x > 0).loss.dtype == torch.float64


X, Y = torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((X, Y[0]), ValueError, "rtd_loss: replaced must have shape [2, 3], got [3]"),
        ((X, Y.int()), TypeError, "rtd_loss: replaced must be bool, got int32"),
        (
            (X.int(), Y),
            TypeError,
            "rtd_loss: logits must be float32, float16, bfloat16 or float64, got int32",
        ),
        ((X, Y, Y), TypeError, "rtd_loss: weights must be float32, got bool"),
        ((X, Y, X[:1]), ValueError, "rtd_loss: weights must have shape [2, 3], got [1, 3]"),
        ((X, Y.to("meta")), ValueError, "rtd_loss: replaced must be on cpu as the others are, got meta"),
    ],
)
def test_refuses(args, error, message):
    with pytest.raises(error) as caught:
        ops.rtd_loss(*args)
    assert message in str(caught.value)
