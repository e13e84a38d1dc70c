"""The candidate kernels/_linear_gelu.py, which no op uses yet: values, gradients, memory, faults."""

import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from test_broken_kernels import load

from electra_fast import testing

sys.path.insert(0, str(Path(__file__).parents[1]))  # the harness is not installed

from benchmarks.harness import candidates
from electra_fast.kernels import _linear_gelu as kernels

ROOT = Path(__file__).parents[1]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# (T, K, N): one tile, several tiles with odd ends, more columns than backward computes again, single ones.
SIZES = ((64, 64, 64), (130, 40, 200), (70, 256, 136), (67, 300, 72), (1, 1, 1))


def gate(T, K, N, dtype, device="cpu", seed=0) -> candidates.LinearGELUGate:
    g = torch.Generator().manual_seed(seed)
    shapes = {"x": (T, K), "weight": (N, K), "bias": (N,)}
    args = {name: torch.randn(shape, generator=g).to(device, dtype) for name, shape in shapes.items()}
    args["weight"] *= 2 * max(K, 1) ** -0.5  # z then has GELU's whole range
    return candidates.LinearGELUGate(args, tuple(shapes))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_values_and_gradients(size, dtype, device, seed):
    gate(*size, dtype, device, seed).check(candidates.linear_gelu)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [(0, 40, 24), (5, 0, 24), (5, 40, 0), (0, 0, 0)])
def test_any_axis_may_be_empty(size, dtype, device):
    gate(*size, dtype, device).check(candidates.linear_gelu)


def test_x_may_have_any_number_of_axes_and_any_strides(device):
    args = gate(24, 40, 72, torch.bfloat16, device).example.args
    y = candidates.linear_gelu(**args)
    for shape in ((2, 12, 40), (2, 3, 4, 40)):
        assert torch.equal(candidates.linear_gelu(**args | {"x": args["x"].view(shape)}).view(24, 72), y)
    assert torch.equal(candidates.linear_gelu(**args | {"x": args["x"].t().contiguous().t()}), y)
    assert torch.equal(candidates.linear_gelu(**args | {"x": args["x"][3]}), y[3])


@pytest.mark.parametrize("size", SIZES[1:4])
def test_reads_only_what_was_written_and_writes_only_its_own(size, device):
    outcomes = []
    for poison in (float("nan"), 3e4):
        with testing.guarded_memory(poison):
            outcomes.append(testing.run(candidates.linear_gelu, gate(*size, torch.bfloat16, device).example))
    for results, others in zip(*outcomes, strict=True):
        assert all(torch.equal(y, others[name]) for name, y in results.items())


def test_the_product_is_stored_only_for_a_backward_pass_that_needs_it(device):
    narrow, wide = ((torch.zeros(3, K, device=device), torch.zeros(5, K, device=device)) for K in (256, 257))
    bias = torch.zeros(5, device=device)
    for (x, weight), dtype, stored in (
        (narrow, torch.bfloat16, False),
        (narrow, torch.float32, True),
        (wide, torch.bfloat16, True),
    ):
        for backward in (False, True):
            _, h = kernels.linear_gelu_fwd(x.to(dtype), weight.to(dtype), bias, backward)
            assert h.shape == ((3, 5) if stored and backward else (0,))


def test_without_a_gradient_nothing_is_stored(device, monkeypatch):
    seen, launch = [], candidates.linear_gelu_fwd
    monkeypatch.setattr(candidates, "linear_gelu_fwd", lambda *args: seen.append(args[3]) or launch(*args))
    args = gate(3, 5, 7, torch.float32, device).example.args
    candidates.linear_gelu(**args)
    args["weight"].requires_grad_()
    candidates.linear_gelu(**args)
    with torch.no_grad():
        candidates.linear_gelu(**args)
    assert seen == [False, True, False]


def test_float64_is_refused(device):
    with pytest.raises(TypeError, match="x must be float32, float16 or bfloat16 for the Triton kernel"):
        candidates.linear_gelu(*(torch.zeros(3, 3, dtype=torch.float64, device=device) for _ in range(3)))


FAULTS = [
    ("acc = dot(x, w.T, acc)", "acc = dot(x, w.T, 0.99 * acc)"),
    ("range(0, K, BLOCK_K)", "range(0, K - BLOCK_K, BLOCK_K)"),
    ("(offs_c < columns)[None, :]\n    base_ptr = x_ptr", "(offs_c < 8)[None, :]\n    base_ptr = x_ptr"),
    ("(row + offs_r < rows)[:, None] & (offs_c < columns)[None, :]\n    base_ptr = y_ptr",
     "(row + offs_r < rows)[:, None] & (offs_c <= columns)[None, :]\n    base_ptr = y_ptr"),
    ("% tiles * BLOCK_N", "% tiles * BLOCK_N // 2"),
    ("// tiles * BLOCK_T", "// tiles * (BLOCK_T + 1)"),
    ("cdiv(T, BLOCK_T) * cdiv(N", "max(T // BLOCK_T, 1) * cdiv(N"),
    ("cdiv(T, BLOCK_T) * cdiv(N, BLOCK_N)", "cdiv(T, BLOCK_T) * max(N // BLOCK_N, 1)"),
    ("_store_tile(h_ptr, acc,", "_store_tile(h_ptr, 1.01 * acc,"),
    ("z = acc + tl.load", "z = acc - tl.load"),
    ("z * normal_cdf(z)", "z * normal_cdf(1.7 * z)"),
    ("z = dot(x, w.T, tl.zeros((BLOCK_T, BLOCK_N), tl.float32)) + bias[None, :]",
     "z = dot(x, w.T, tl.zeros((BLOCK_T, BLOCK_N), tl.float32))"),
    ("dz = dy * gelu_slope(z)", "dz = dy * normal_cdf(z)"),
    ("dx = dot(rounded(dz, w.dtype), w, dx)", "dx = dot(rounded(dz, w.dtype), w, 0.0 * dx)"),
    ("tl.program_id(0).to(tl.int64) * N + offs_n", "offs_n"),
    ("tl.sum(dz, axis=0)", "tl.max(dz, axis=0)"),
    ("range(0, N, BLOCK_N)", "range(0, N - BLOCK_N, BLOCK_N)"),
    ("programs = cdiv(T, BLOCK_T)", "programs = max(T // BLOCK_T, 1)"),
    ("bias_gelu_bwd(dy, h, bias)", "bias_gelu_bwd(dy, h, 0 * bias)"),
    ("dx = dz @ weight", "dx = 1.01 * (dz @ weight)"),
]  # fmt: skip


@pytest.mark.skipif(not testing.interpreted(), reason="on a GPU a broken kernel may destroy the context")
@pytest.mark.parametrize(("right", "wrong"), FAULTS, ids=[wrong.replace("\n", " ") for _, wrong in FAULTS])
def test_the_check_sees(right, wrong, tmp_path, monkeypatch):
    source = (ROOT / "kernels" / "_linear_gelu.py").read_text()
    assert right in source, "the fault no longer fits the kernel"
    broken = tmp_path / "_linear_gelu.py"
    broken.write_text(source.replace(right, wrong))
    module = load(broken, "broken_linear_gelu")
    for name in ("linear_gelu_fwd", "linear_gelu_bwd"):
        monkeypatch.setattr(candidates, name, getattr(module, name))
    with pytest.raises(AssertionError), testing.guarded_memory():
        for size, dtype in product(SIZES[1:4], (torch.bfloat16, torch.float32)):
            gate(*size, dtype).check(candidates.linear_gelu)
