"""csrc/cuda without a GPU: run by tests/host in several thread orders, run with planted faults, and compiled.

The tests of all ops and of each op also run the kernels of csrc/cuda on the host. Examples, checks and faults
that only these kernels need are in tests/host/<op>.py.
"""

import random
import re
import subprocess

import host
import pytest
import torch
from host import embed, mlm_head
from test_aot import hold_to_figures, shares
from torch.utils.cpp_extension import include_paths

from benchmarks.static import cuda, figures, gpus
from electra_fast import ops, reference, testing
from electra_fast.ops._public import Kernels

CUDA = host.CSRC / "cuda"
NVCC = cuda.NVCC
PARTS = (embed, mlm_head)

host_run = pytest.mark.skipif(
    not all(part.OP in testing.HOST_RUN for part in PARTS),
    reason="a GPU runs csrc/cuda itself, or there is no C++ compiler",
)
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc here")
of_every_op = pytest.mark.parametrize("part", PARTS, ids=lambda part: part.OP)


def kernel(part):
    return testing.implementations(part.OP)["cuda"]


def of_each(name):
    """Parametrize by (part, entry), for every entry of the list or dict `name` of every part."""
    pairs = [(part, entry) for part in PARTS for entry in getattr(part, name)]
    ids = [f"{part.OP}-{getattr(entry, '__name__', entry)}" for part, entry in pairs]
    return pytest.mark.parametrize(("part", "entry"), pairs, ids=ids)


@host_run
@of_every_op
def test_examples_of_each_regime(part):
    for example in part.EXAMPLES:
        testing.check_example(kernel(part), example)


@host_run
@of_each("CHECKS")
def test_check(part, entry):
    entry(kernel(part))


@host_run
@of_every_op
def test_results_do_not_depend_on_the_order_of_threads(part, monkeypatch):
    for example in (*testing.examples(part.OP), *part.EXAMPLES):
        outcomes = []
        for order in range(5):
            monkeypatch.setenv("CUDA_HOST_ORDER", str(order))
            results, gradients = testing.run(kernel(part), example)
            outcomes.append({**results, **gradients})
        for name, first in outcomes[0].items():
            assert all(torch.equal(first, other[name]) for other in outcomes[1:]), f"{example.name}: {name}"


@host_run
@of_every_op
def test_float64_is_refused(part):
    example = testing.examples(part.OP)[0].to(torch.float64)
    if "weights" in example.args:
        example.args["weights"] = example.args["weights"].float()
    message = (
        f"{part.OP}: .* must be float32, float16 or bfloat16 for the CUDA kernel, got float64; electra_fast"
    )
    with pytest.raises(TypeError, match=message):
        testing.run(kernel(part), example)


@host_run
def test_mlm_head_with_slots_in_several_chunks():
    V = (256 << 20) // 4 // 128 + 1  # the logits of 127 rows fit, so a chunk has 64 rows
    example = mlm_head.example(65, V, E=2)
    results, gradients = testing.run(kernel(mlm_head), example)
    expected, expected_gradients = testing.run(reference.mlm_head, example.to(torch.float64))
    torch.testing.assert_close(
        {**results, **gradients}, {**expected, **expected_gradients}, check_dtype=False
    )


@host_run
@of_each("FAULTS")
def test_the_checks_detect(part, entry, tmp_path, monkeypatch):
    right, wrong = part.FAULTS[entry]
    found = [name for name in part.SOURCES if right in (CUDA / name).read_text()]
    assert len(found) == 1, "the fault no longer fits the sources"
    broken = tmp_path / found[0]
    broken.write_text((CUDA / found[0]).read_text().replace(right, wrong))
    kernels = host.load(host.rebuilt(broken, tmp_path), f"broken_{part.OP}_{list(part.FAULTS).index(entry)}")
    fwd, bwd = (kernels[f"{part.OP}_{direction}"] for direction in ("fwd", "bwd"))
    function = getattr(ops, part.OP).over(Kernels(fwd, bwd))
    # The run itself raises RuntimeError if threads do not meet, or for an access that is not aligned.
    with pytest.raises((AssertionError, RuntimeError)):
        for order in ("0", "1"):
            monkeypatch.setenv("CUDA_HOST_ORDER", order)
            for example in part.EXAMPLES:
                testing.check_example(function, example)
        for check in part.CHECKS:
            check(function)
        testing.check_op(part.OP, function, seed=0)


@needs_nvcc
@shares
@pytest.mark.parametrize("arch", gpus.GPUS)
@pytest.mark.parametrize("source", cuda.SOURCES, ids=lambda path: path.stem)
def test_compiles_without_spills(source, arch, share):
    rows = figures.of_source(arch, cuda.source_hash(source))
    if not rows or random.random() < share:
        rows = cuda.compiled(arch, source)
    print(rows)
    assert rows and not any(row["spill_bytes"] for row in rows)
    hold_to_figures(rows)


def toolkit_includes() -> list[str]:
    """Return the folders of CUDA's headers that nvcc passes to its host compiler."""
    printed = subprocess.run([NVCC, "--dryrun", "-c", "none.cu"], capture_output=True, text=True).stderr
    lines = re.findall(r"^#\$ (?:SYSTEM_)?INCLUDES=(.*)$", printed, re.M)
    return [folder for line in lines for folder in re.findall(r'"(?:-I)?(/[^"]+)"', line)]


@needs_nvcc
@pytest.mark.parametrize("source", sorted(CUDA.glob("*.cpp")), ids=lambda path: path.stem)
def test_ops_compile_with_the_real_headers(source, tmp_path):
    generated = tmp_path / "c10/cuda/impl/cuda_cmake_macros.h"  # only CUDA builds of PyTorch have it
    generated.parent.mkdir(parents=True)
    generated.touch()
    folders = [tmp_path, *include_paths(), *toolkit_includes()]
    command = [host.COMPILER, "-std=c++20", "-Wall", "-fsyntax-only", "-DELECTRA_FAST_CUDA=1", source]
    command += [word for folder in folders for word in ("-isystem", folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
