"""Random cases: a few for every implementation, and proof that the fuzzer finds faults, crashes and hangs."""

import subprocess
import sys

import pytest
import torch

from electra_fast import ops, testing
from electra_fast.testing.cases import MAKERS, case, judge_case
from electra_fast.testing.layouts import LAYOUTS, copied


def test_a_few_cases_of_every_implementation(implementation, device, seed):
    op, name = implementation
    function = testing.implementations(op)[name]
    for number in range(3):
        outcome = judge_case(op, function, seed + number, small=True, device=device)
        assert not outcome.finding, f"{op}, {name} [seed {seed + number}]: {outcome.finding}"


def test_a_seed_always_gives_the_same_case():
    for op in MAKERS:
        first, again = (case(op, 704239).example for _ in range(2))
        assert first.args.keys() == again.args.keys() and first.layout == again.layout
        for x, y in zip(first.args.values(), again.args.values(), strict=True):
            if isinstance(x, torch.Tensor):
                assert x.stride() == y.stride() and torch.equal(x.nan_to_num(), y.nan_to_num())
            else:
                assert x == y
    assert set(MAKERS) == set(testing.OPS)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_keep_the_values_and_copies_keep_the_layout(layout):
    x = torch.randn(3, 4, 5)
    y = LAYOUTS[layout](x)
    assert torch.equal(y, x[-1:].expand_as(x) if layout == "expanded" else x)
    assert layout == "offset" or not y.is_contiguous()
    for other in (copied(y), copied(y, torch.float64)):
        assert torch.equal(other.float(), y) and other.stride() == y.stride()
        assert other.storage_offset() == y.storage_offset() and other.data_ptr() != y.data_ptr()


def as_if_contiguous(x):
    strides = x.new_empty(x.shape, device="meta").stride()
    return x.as_strided(x.shape, strides, 0)


def test_a_kernel_that_ignores_strides_is_found_and_the_argument_named():
    def broken(x, bias):
        return ops.bias_gelu(x, as_if_contiguous(bias))

    with pytest.raises(AssertionError, match="contiguous tensors are right, strided are wrong: bias"):
        testing.check_op("bias_gelu", broken, seed=0)
    with pytest.raises(AssertionError, match=r"bias_gelu \[seed \d+\]"):
        testing.fuzz_op("bias_gelu", broken, seconds=60, seed=0)


@pytest.mark.parametrize(
    "fault",
    [
        lambda x, y, w: (_ for _ in ()).throw(RuntimeError("view size is not compatible")),
        lambda x, y, w: ops.rtd_loss(x.clone(), y, w)._replace(loss=x.sum() / 1e3),
    ],
    ids=["an internal error", "another loss"],
)
def test_fuzz_op_finds_a_fault(fault):
    with pytest.raises(AssertionError, match="rtd_loss"):
        testing.fuzz_op("rtd_loss", lambda logits, replaced, weights=None: fault(logits, replaced, weights))


KERNELS = """
import ctypes, time
from electra_fast import ops

right = ops.rtd_loss

def crashes(logits, replaced, weights=None):
    return ctypes.string_at(0) if logits.numel() == 0 else ops.rtd_loss(logits, replaced, weights)

def hangs(logits, replaced, weights=None):
    time.sleep(600)
"""


def command(folder, *arguments):
    (folder / "planted.py").write_text(KERNELS)
    program = [sys.executable, "-m", "electra_fast.testing.fuzz", "--op", "rtd_loss", *arguments]
    return subprocess.run(program, cwd=folder, capture_output=True, text=True, timeout=300)


def seed_of_empty_logits():
    return next(s for s in range(1000) if case("rtd_loss", s).example.args["logits"].numel() == 0)


def test_a_crash_is_a_finding_with_its_command(tmp_path):
    done = command(tmp_path, "--implementation", "planted:crashes", "--seed", str(seed_of_empty_logits()))
    assert done.returncode == 1, done.stderr
    assert "the process ended with exit code -11" in done.stdout
    assert f"--implementation planted:crashes --seed {seed_of_empty_logits()}" in done.stdout


def test_a_hang_is_a_finding(tmp_path):
    done = command(tmp_path, "--implementation", "planted:hangs", "--seed", "1", "--limit", "3")
    assert done.returncode == 1 and "no result within 3 seconds" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("planted:nope", "got planted:nope: AttributeError: module 'planted' has no attribute 'nope'"),
        ("absent:right", "got absent:right: ModuleNotFoundError: No module named 'absent'"),
        (":right", "got :right: ValueError"),
        ("planted:time", "must name a function, got planted:time of type module"),
    ],
)
def test_a_name_that_is_not_a_function_is_refused_before_the_first_case(tmp_path, name, message):
    done = command(tmp_path, "--implementation", name, "--seed", "1")
    assert done.returncode == 2 and message in done.stderr and not done.stdout, done.stdout + done.stderr


def test_a_right_kernel_has_no_finding(tmp_path):
    done = command(tmp_path, "--implementation", "planted:right", "--seed", "0", "--seconds", "3")
    cases, _, findings = done.stdout.splitlines()[-1].split()[-1].split("/")
    assert done.returncode == 0 and int(cases) and findings == "0", done.stdout + done.stderr
