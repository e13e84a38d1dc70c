"""csrc/cuda without a GPU: run by tests/host in several thread orders, broken on purpose, and compiled.

What holds for every implementation, and for the op, holds for the host-run one in those tests too.
"""

import re
import shutil
import subprocess

import host
import pytest
import torch
from torch.utils.cpp_extension import include_paths

from electra_fast import ops, reference, testing
from electra_fast.ops._register import Kernels
from electra_fast.testing.examples import Example

CUDA = host.CSRC / "cuda"
NVCC = shutil.which("nvcc")

host_run = pytest.mark.skipif(
    "mlm_head" not in testing.HOST_RUN, reason="a GPU runs csrc/cuda itself, or there is no C++ compiler"
)
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc on PATH")


def example(M, V, E=8, **options):
    g = torch.Generator().manual_seed(V)
    args = {"x": torch.randn(M, E, generator=g), "table": 0.3 * torch.randn(V, E, generator=g)}
    args |= {"bias": torch.randn(V, generator=g), "targets": torch.randint(V, (M,), generator=g)}
    args |= {"weights": torch.rand(M, generator=g) + 0.5, "rng": torch.tensor([5, 6]), **options}
    return Example("mlm_head", f"M={M} V={V}", args, ("x", "table", "bias"))


# Every warp goes through several groups of tokens, the gradient's rows through several blocks.
LARGE = example(5, 10007, temperature=0.9, disallow_correct=True)


def check(function):
    testing.check_op("mlm_head", function, seed=0)
    testing.check_example(function, LARGE)


@host_run
def test_a_large_vocabulary():
    testing.check_example(testing.implementations("mlm_head")["cuda"], LARGE)


@host_run
def test_slots_of_several_chunks():
    V = (256 << 20) // 4 // 128 + 1  # logits of 127 rows fit: a chunk has 64
    case = example(65, V, E=2)
    got, gradients = testing.run(testing.implementations("mlm_head")["cuda"], case)
    wanted, right = testing.run(reference.mlm_head, case.to(torch.float64))
    torch.testing.assert_close({**got, **gradients}, {**wanted, **right}, check_dtype=False)


@host_run
def test_results_do_not_depend_on_the_order_of_threads(monkeypatch):
    function = testing.implementations("mlm_head")["cuda"]
    for case in (*testing.examples("mlm_head"), LARGE):
        outcomes = []
        for order in range(5):
            monkeypatch.setenv("CUDA_HOST_ORDER", str(order))
            results, gradients = testing.run(function, case)
            outcomes.append({**results, **gradients})
        for name, first in outcomes[0].items():
            assert all(torch.equal(first, other[name]) for other in outcomes[1:]), f"{case.name}: {name}"


@host_run
def test_float64_is_refused():
    case = example(2, 9).to(torch.float64)
    case.args["weights"] = case.args["weights"].float()
    message = "mlm_head: x must be float32, float16 or bfloat16 for the CUDA kernel, got float64; "
    with pytest.raises(TypeError, match=message):
        testing.run(testing.implementations("mlm_head")["cuda"], case)


@host_run
@pytest.mark.parametrize("bad", [9, -1, 2**32 + 1])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_a_target_outside_the_vocabulary_makes_its_row_nan(bad, dtype):
    if bad > torch.iinfo(dtype).max:
        pytest.skip("no such number in this dtype")
    case = example(4, 9)
    case.args["targets"] = case.args["targets"].to(dtype)
    case.args["targets"][2] = bad
    results, gradients = testing.run(testing.implementations("mlm_head")["cuda"], case)
    assert results["loss"].isnan() and results["lse"].isfinite().all()
    assert gradients["x"].isnan().any(1).tolist() == [False, False, True, False]
    assert results["samples"].dtype == dtype and (0 <= results["samples"]).all()


FAULTS = {
    "a warp reads sums that others have not left": (
        "  __syncthreads();  // each warp has left its sums; from",
        "  // from",
    ),
    "the loss is summed before each warp has left its part": (
        "  __syncthreads();  // each warp has left its sums\n",
        "",
    ),
    "a barrier that one warp alone reaches": (
        "  if (warp != 0) return;\n",
        "  if (warp != 0) return;\n  __syncthreads();\n",
    ),
    "the tail of the vocabulary dropped": (
        "base < span.end; base += kGroup) {\n    float l",
        "base + kGroup <= span.end; base += kGroup) {\n    float l",
    ),
    "the bias dropped": ("l[k] = v < end ? logits[v] + bias[v]", "l[k] = v < end ? logits[v]"),
    "a new maximum does not rescale the sum": (
        "sum = sum * expf(beta * (before - top)) + part",
        "sum = sum + part",
    ),
    "the target may be drawn": ("draw.disallow_correct ? target : -1", "-1"),
    "another stream": ("static_cast<uint32_t>(draw.rng[1]), 1}", "static_cast<uint32_t>(draw.rng[1]), 0}"),
    "a lane too few in the scan": ("if (lane >= d) x += below", "if (lane > d) x += below"),
    "the second look begins at the span": ("(goal - below) /", "goal /"),
    "a tie or a smaller logit beats the target": ("l[k] > l_target;", "l[k] != l_target;"),
    "unused rows are looked at": (
        "  if (w == 0) {\n    if (threadIdx.x",
        "  if (false) {\n    if (threadIdx.x",
    ),
    "no gradient through the target's logit": ("(v == target ? 1.0f : 0.0f)", "0.0f"),
    "a gradient without its weight": (": w * (p - ", ": (p - "),
    "blocks of the gradient overlap": ("blockIdx.y * kItems * kThreads", "blockIdx.y * kThreads"),
    "the mean over slots, not weights": ("sums[2] += weights[m]", "sums[2] += 1"),
}


@host_run
@pytest.mark.parametrize("fault", FAULTS)
def test_the_check_sees(fault, tmp_path):
    right, wrong = FAULTS[fault]
    source = (CUDA / "mlm_head.cu").read_text()
    assert right in source, "the fault no longer fits the kernel"
    broken = tmp_path / "mlm_head.cu"
    broken.write_text(source.replace(right, wrong))
    kernels = host.load(host.rebuilt(broken, tmp_path), f"broken{list(FAULTS).index(fault)}")
    # RuntimeError: the run itself found threads that do not meet.
    with pytest.raises((AssertionError, RuntimeError)):
        check(ops.mlm_head.over(Kernels(kernels["mlm_head_fwd"], kernels["mlm_head_bwd"])))


@needs_nvcc
@pytest.mark.parametrize("arch", [80, 86, 90, 100, 120])
@pytest.mark.parametrize("source", sorted(CUDA.glob("*.cu")), ids=lambda path: path.stem)
def test_compiles_without_spills(source, arch, tmp_path):
    command = [NVCC, "-std=c++20", "-O3", f"-arch=sm_{arch}", "-cubin", "-Xptxas", "-v", "-Werror"]
    command += ["all-warnings", "-o", tmp_path / "kernels.cubin", source]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    print(done.stderr)
    memory = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill", done.stderr)
    assert memory and set(memory) == {("0", "0", "0")}, done.stderr


def toolkit_includes() -> list[str]:
    """Return the folders of CUDA's headers, as nvcc names them to its host compiler."""
    said = subprocess.run([NVCC, "--dryrun", "-c", "none.cu"], capture_output=True, text=True).stderr
    lines = re.findall(r"^#\$ (?:SYSTEM_)?INCLUDES=(.*)$", said, re.M)
    return [folder for line in lines for folder in re.findall(r'"(?:-I)?(/[^"]+)"', line)]


@needs_nvcc
@pytest.mark.parametrize("source", sorted(host.CSRC.glob("*_cuda.cpp")), ids=lambda path: path.stem)
def test_the_glue_compiles_beside_the_real_headers(source, tmp_path):
    generated = tmp_path / "c10/cuda/impl/cuda_cmake_macros.h"  # by a build of PyTorch with CUDA alone
    generated.parent.mkdir(parents=True)
    generated.touch()
    folders = [tmp_path, *include_paths(), *toolkit_includes()]
    command = [host.COMPILER, "-std=c++20", "-Wall", "-fsyntax-only", "-DELECTRA_FAST_CUDA=1", source]
    command += [word for folder in folders for word in ("-isystem", folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
