import pytest
import torch
import torch.nn.functional as F
from conftest import both_paths

from electra_fast import ops, testing
from electra_fast.philox import keep_mask
from electra_fast.testing.examples import Example

OP = "add_norm"
RNG = torch.tensor([1, 0])


def test_is_torchs_layer_norm_of_the_sum(implementation, device):
    x, r = torch.randn(2, 5, 6, 40, device=device)
    w, b = torch.randn(2, 40, device=device)
    y = testing.implementations(OP)[implementation[1]](x, r, w, b, eps=1e-5)
    assert torch.allclose(y, F.layer_norm(x + r, (40,), w, b, 1e-5), atol=1e-5)


def test_dropout_drops_what_keep_mask_says(implementation, device):
    """The gradient of x is 0 exactly where x was dropped."""
    x = torch.randn(3, 5, 40, device=device, requires_grad=True)
    w, b = torch.ones(40, device=device), torch.zeros(40, device=device)
    f = testing.implementations(OP)[implementation[1]]
    y = f(x, x.detach(), w, b, eps=1e-5, dropout=0.3, rng=RNG.to(device), stream=7)
    y.backward(torch.randn(3, 5, 40, device=device))
    assert torch.equal((x.grad != 0).cpu(), keep_mask(RNG, 7, torch.arange(15).view(3, 5), 40, 0.3))


CONSTANTS = (0.3, -0.0123, 1 / 3, 9.9, 1234.567, -7e4, 1e10, 1e-30)


@pytest.mark.parametrize("W", [1, 2, 36, 100, 115, 256, 768, 1000])
@pytest.mark.parametrize("eps", [1e-12, 1e-5])
def test_a_constant_row_is_the_bias(W, eps, implementation, device):
    """The sum of W constants is rounded, so without a correction the mean differs from the constant."""
    f = testing.implementations(OP)[implementation[1]]
    x = torch.tensor(CONSTANTS, device=device)[:, None].repeat(1, W).requires_grad_()
    w, b = torch.randn(2, W, generator=torch.Generator().manual_seed(W)).to(device)
    y = f(x, None, w, b, eps=eps)
    y.sum().backward()
    assert torch.equal(y, b.expand_as(y)) and x.grad.isfinite().all()
    both = f(x.detach() / 2, x.detach() / 2, w, b, eps=eps)
    assert torch.equal(both, b.expand_as(both))
    kept = f(0 * x, x.detach(), w, b, eps=eps, dropout=0.1, rng=RNG.to(device))
    assert torch.equal(kept, b.expand_as(kept))


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")  # of NumPy
def test_a_constant_row_has_a_finite_gradient_in_float16(implementation, device):
    f = testing.implementations(OP)[implementation[1]]
    x = torch.full((4, 115), 0.3, device=device).half().requires_grad_()
    f(x, None, torch.ones(115, device=device), torch.zeros(115, device=device), eps=1e-12).sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")  # of NumPy
@pytest.mark.parametrize("W", [3, 36, 115, 768])
def test_the_largest_numbers_are_no_worse_than_in_torch(W, implementation, device):
    """Squares of 1e30 are infinite, so PyTorch's LayerNorm returns the bias, or NaN for some widths."""
    f = testing.implementations(OP)[implementation[1]]
    rows = torch.randn(7, W, generator=torch.Generator().manual_seed(W))
    for row, largest in zip(rows, (3e38, -3e38, 1e30, 1e30, 3e38, 3e38, 1e18), strict=True):
        row[: W // 2 + 1] = largest
    rows[3, ::2] *= -1
    rows[4] = 3e38 * torch.linspace(0.5, 1, W)
    rows[5] = 3e38
    w, b = torch.randn(2, W, generator=torch.Generator().manual_seed(W + 1))
    wanted = F.layer_norm(rows, (W,), w, b, 1e-12)
    y = f(rows.to(device), None, w.to(device), b.to(device), eps=1e-12).cpu()
    finite = wanted.isfinite()
    assert finite[6].all() and torch.allclose(y[finite], wanted[finite], atol=1e-5)
    if implementation[1] != "reference":
        assert torch.allclose(y, torch.where(finite, wanted, b), atol=1e-5)


@pytest.mark.parametrize(("T", "W"), [(0, 8), (3, 0), (0, 0)])
def test_any_axis_may_be_empty(T, W, implementation, device):
    f = testing.implementations(OP)[implementation[1]]
    x, r = (torch.zeros(T, W, device=device, requires_grad=True) for _ in range(2))
    w, b = (torch.ones(W, device=device, requires_grad=True) for _ in range(2))
    y = f(x, r, w, b, eps=1e-12, dropout=0.1, rng=RNG.to(device))
    y.sum().backward()
    assert y.shape == x.grad.shape == r.grad.shape == (T, W)
    assert w.grad.shape == b.grad.shape == (W,) and (w.grad == 0).all() and (b.grad == 0).all()


def batch(T, W, dtype=torch.float32, mean=0.0, **options):
    g = torch.Generator().manual_seed(W)
    x, residual = (torch.randn(T, W, generator=g) + mean for _ in range(2))
    args = {"x": x.to(dtype), "residual": residual.to(dtype)}
    args |= {"weight": 1 + 0.1 * torch.randn(W, generator=g), "bias": 0.1 * torch.randn(W, generator=g)}
    args |= {"eps": 1e-12, "dropout": 0.1, "rng": RNG, "stream": 3, **options}
    return Example("add_norm", f"T={T} W={W} {dtype} {mean}", args, ("x", "residual", "weight", "bias"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("W", [1, 5, 36, 100, 256, 768, 1000])
def test_any_width(W, dtype, device):
    testing.check_example(ops.add_norm, batch(70, W, dtype).to(device=device))


def test_a_large_mean_causes_no_cancellation(kernel, device):
    testing.check_example(kernel, batch(70, 256, mean=1e4).to(device=device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_thousands_of_rows_are_summed_in_float32(dtype, device):
    testing.check_example(ops.add_norm, batch(20_000, 24, dtype).to(device=device))


def test_tensors_need_not_be_contiguous(implementation, device):
    function = testing.implementations(OP)[implementation[1]]
    args = batch(64, 64, dropout=0.0).to(device=device).args
    strided = {"x": args["x"].t(), "residual": args["residual"].t()}
    strided |= {name: args[name].repeat_interleave(2)[::2] for name in ("weight", "bias")}
    whole = {name: x.contiguous() for name, x in strided.items()}
    assert torch.equal(function(**args | strided), function(**args | whole))


@pytest.mark.parametrize("residual", [True, False], ids=["residual", "no residual"])
def test_dropped_elements_may_be_nan_or_infinite(residual, implementation, device):
    f = testing.implementations(OP)[implementation[1]]
    args = batch(40, 36, dropout=0.3).to(device=device).args
    args |= {} if residual else {"residual": None}
    dropped = ~keep_mask(args["rng"], 3, torch.arange(40, device=device), 36, 0.3)
    outcomes = []
    for value in (0.0, torch.nan, torch.inf):
        x = args["x"].masked_fill(dropped, value).requires_grad_()
        y = f(**args | {"x": x})
        outcomes.append((y, *torch.autograd.grad(y.square().sum(), x)))
    for outcome in outcomes[1:]:
        assert all(map(torch.equal, outcome, outcomes[0]))
    assert (outcomes[0][1][dropped] == 0).all()


def test_any_number_of_threads_gives_the_same_bits(check_thread_counts):
    check_thread_counts(ops.add_norm, batch(3001, 100))


X = torch.zeros(2, 8)


@both_paths(OP)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"residual": X[:1]}, ValueError, "add_norm: residual must have shape [2, 8], got [1, 8]"),
        ({"residual": X.half()}, TypeError, "add_norm: residual must be float32, got float16"),
        ({"weight": torch.ones(7)}, ValueError, "add_norm: weight must have shape [8], got [7]"),
        ({"bias": torch.ones(8).half()}, TypeError, "add_norm: bias must be float32, got float16"),
        ({"dropout": -0.1}, ValueError, "add_norm: dropout must be in [0, 1), got -0.1"),
        ({"dropout": 0.1}, ValueError, "add_norm: rng must be given if random numbers are drawn, got None"),
        ({"dropout": 0.1, "rng": RNG.int()}, TypeError, "add_norm: rng must be int64, got int32"),
        ({"rng": RNG.to("meta")}, ValueError, "add_norm: rng must be on cpu as the others are, got meta"),
    ],
)
def test_refuses(change, error, message, path):
    with pytest.raises(error) as caught:
        path(
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


# One column, odd widths, just above a power of two, three blocks of columns, several warps.
@pytest.mark.parametrize("W", [1, 5, 36, 96, 100, 260, 768])
def test_rows_of_any_width_and_number(W, implementation, device):
    """67 rows: more than the interpreter has programs, and a partial last tile. Means of three scales."""
    f = testing.implementations(OP)[implementation[1]]
    generator = torch.Generator().manual_seed(W)
    x, residual = torch.randn(2, 67, W, generator=generator).to(device)
    x[3] = 2.0  # constant, like the residual of this row
    residual[3] = 1.0
    x[5:9] += 1e4
    weight, bias = torch.randn(2, W, generator=generator).to(device)
    args = {"x": x, "residual": residual, "weight": weight, "bias": bias}
    args |= {"eps": 1e-5, "dropout": 0.1, "rng": RNG.to(device), "stream": 5}
    testing.check_example(f, testing.Example(OP, f"W={W}", args, ("x", "residual", "weight", "bias")))
