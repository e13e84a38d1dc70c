import pytest
import torch
import torch.nn.functional as F
from conftest import both_paths

from electra_fast import ops, testing

OP = "linear"


def test_is_torchs_linear(implementation, device):
    x, weight, bias = (torch.randn(*shape, device=device) for shape in ((2, 5, 24), (7, 24), (7,)))
    y = testing.implementations(OP)[implementation[1]](x, weight, bias)
    assert torch.allclose(y, F.linear(x, weight, bias), atol=1e-5)


def test_products_use_the_copies_and_gradients_have_the_dtype_of_the_originals(implementation, device):
    """The copies are twice the originals, so that the result shows which of them was used."""
    x = torch.randn(3, 24, device=device, requires_grad=True)
    weight, bias = (torch.randn(*shape, device=device, requires_grad=True) for shape in ((7, 24), (7,)))
    low = {"low_weight": 2 * weight.detach().bfloat16(), "low_bias": 2 * bias.detach().bfloat16()}
    y = testing.implementations(OP)[implementation[1]](x, weight, bias, **low)
    assert y.dtype == torch.bfloat16
    assert torch.allclose(y.float(), F.linear(x, 2 * weight, 2 * bias), rtol=0.05, atol=0.2)
    dx, dweight, dbias = torch.autograd.grad(y.sum(), (x, weight, bias))
    assert dx.dtype == dweight.dtype == dbias.dtype == torch.float32
    assert torch.allclose(dx, 2 * weight.sum(0).expand_as(dx), rtol=0.05, atol=0.2)
    assert (dbias == 3).all() and torch.allclose(dweight, x.sum(0).expand_as(dweight), rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("T", "K", "N"), [(0, 8, 5), (3, 0, 5), (3, 8, 0), (0, 0, 0), (None, 8, 5), (None, 0, 5)]
)
def test_any_axis_may_be_empty_or_the_only_one(T, K, N, implementation, device):
    x = torch.randn(() if T is None else (2, T), device=device)[..., None].repeat_interleave(K, -1)
    leaves = [x, torch.randn(N, K, device=device), torch.randn(N, device=device)]
    outcomes = []
    for function in (testing.implementations(OP)[implementation[1]], F.linear):
        args = [x.clone().requires_grad_() for x in leaves]
        y = function(*args)
        outcomes.append([y, *torch.autograd.grad(y.sum(), args)])
    for got, wanted in zip(*outcomes, strict=True):
        assert got.shape == wanted.shape and torch.allclose(got, wanted, atol=1e-5)


def test_only_inputs_that_require_a_gradient_get_one(implementation, device):
    function = testing.implementations(OP)[implementation[1]]
    x, weight = torch.randn(3, 8, device=device), torch.randn(4, 8, device=device, requires_grad=True)
    function(x, weight).sum().backward()
    assert torch.allclose(weight.grad, x.sum(0).expand_as(weight), atol=1e-5)
    y = function(x.requires_grad_(), weight.detach())
    assert torch.allclose(torch.autograd.grad(y.sum(), x)[0], weight.sum(0).expand_as(x), atol=1e-5)


def _arguments(T, K, N, low, generator=None):
    """Return arguments in float32 or, if `low`, x in bfloat16 with bfloat16 copies of weight and bias."""
    shapes = {"x": (1, T, K), "weight": (N, K), "bias": (N,)}
    args = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    if not low:
        return args
    args = {name: x.bfloat16() for name, x in args.items()}
    copies = {f"low_{name}": args[name] for name in ("weight", "bias")}
    return {"x": args["x"], "weight": args["weight"].float(), "bias": args["bias"].float()} | copies


SIZES = [(255, 32, 48), (256, 16, 16), (300, 48, 304), (521, 304, 80), (257, 17, 513), (600, 256, 256)]


@pytest.mark.parametrize("low", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("T", "K", "N"), SIZES)
def test_whole_and_partial_tiles(T, K, N, low, implementation, device, seed):
    """From 256 tokens on, the CPU kernel works in tiles. Most of these sizes are not multiples of a tile."""
    args = _arguments(T, K, N, low, torch.Generator().manual_seed(seed))
    example = testing.Example(OP, f"{T} {K} {N}", args, ("x", "weight", "bias"))
    testing.check_example(testing.implementations(OP)[implementation[1]], example.to(device=device))


@pytest.mark.skipif("cpu" not in testing.implementations(OP), reason="built without electra_fast._C")
@pytest.mark.parametrize("low", [False, True], ids=["float32", "bfloat16"])
def test_any_number_of_threads_gives_the_same_bits(low, check_thread_counts):
    example = testing.Example(OP, "threads", _arguments(700, 304, 528, low), ("x", "weight", "bias"))
    check_thread_counts(testing.implementations(OP)["cpu"], example)


@pytest.mark.skipif("cpu" not in testing.implementations(OP), reason="built without electra_fast._C")
@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="no tiles of bfloat16")
def test_the_gradient_of_a_float32_weight_is_not_rounded_to_bfloat16():
    args = _arguments(512, 64, 32, low=True)
    wanted = torch.randn(512, 32).bfloat16()
    leaf = args["weight"].requires_grad_()
    testing.implementations(OP)["cpu"](**args).backward(wanted[None])
    exact = wanted.double().t() @ args["x"][0].double()
    assert (leaf.grad - exact).norm() < 1e-5 * exact.norm()


def test_casts_to_the_autocast_dtype(device):
    x, weight, bias = (torch.randn(*s, device=device, requires_grad=True) for s in ((3, 8), (4, 8), (4,)))
    with torch.autocast(device, torch.bfloat16):
        y = ops.linear(x, weight, bias)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and weight.grad.dtype == bias.grad.dtype == torch.float32


X, W = torch.zeros(2, 8), torch.zeros(3, 8)


@both_paths(OP)
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"weight": W[:, :5]}, ValueError, "linear: weight must have shape [*, 8], got [3, 5]"),
        ({"weight": W.half()}, TypeError, "linear: weight must be float32, got float16"),
        ({"bias": torch.zeros(2)}, ValueError, "linear: bias must have shape [3], got [2]"),
        ({"low_weight": W[:2].half()}, ValueError, "linear: low_weight must have shape [3, 8], got [2, 8]"),
        (
            {"low_weight": W.half(), "low_bias": torch.zeros(3).half()},
            ValueError,
            "linear: low_bias must be given if and only if bias is",
        ),
    ],
)
def test_refuses(arguments, error, message, path):
    with pytest.raises(error) as caught:
        path(**{"x": X, "weight": W} | arguments)
    assert message in str(caught.value)
