"""The pytest plugin: one test per example, with the reasons of failures and skips."""

import importlib.metadata

import pytest
import torch

from electra_fast.testing.check import kernel_examples

pytest_plugins = ["pytester"]

TESTS = """
import pytest
import torch
import torch.nn.functional as F

@pytest.mark.kernel("bias_gelu", dtypes=[torch.float32])
def test_right(kernel_example):
    kernel_example(lambda x, bias: F.gelu(x + bias.to(x.dtype)))

@pytest.mark.kernel("bias_gelu", supports={"layouts": ["contiguous"]}, dtypes=[torch.float32])
def test_wrong(kernel_example):
    kernel_example(lambda x, bias: 1.01 * F.gelu(x + bias))
"""


ENTRY_POINTS = {entry.value for entry in importlib.metadata.entry_points(group="pytest11")}
INSTALLED = "electra_fast.pytest_plugin" in ENTRY_POINTS  # not where only the tree is on the path
OPTIONS = ["-rs", "-p", "no:cacheprovider", *([] if INSTALLED else ["-p", "electra_fast.pytest_plugin"])]


@pytest.fixture
def pytest_run(pytester):
    """Return a function that runs tests in a folder of their own."""

    def run(text):
        pytester.makepyfile(text)
        return pytester.runpytest_inprocess(*OPTIONS)

    return run


def test_each_example_is_a_test(pytest_run):
    done = pytest_run(TESTS)
    names = list(kernel_examples("bias_gelu", dtypes=[torch.float32]))
    skipped, empty = 4, sum("no token" in name for name in names)  # four layouts
    right = len(names) + empty  # of the second test, an empty batch is right too
    done.assert_outcomes(passed=right, failed=len(names) - skipped - empty, skipped=skipped)
    done.stdout.fnmatch_lines(["*bias_gelu (contiguous*error * exceeds the budget*"])
    done.stdout.fnmatch_lines(["SKIPPED*layouts=strided*"])


@pytest.mark.parametrize(
    ("marker", "message"),
    [
        ("", "must have the marker kernel(op), got none"),
        ("@pytest.mark.kernel('geglu')", "op must be one of * got geglu"),
        ("@pytest.mark.kernel('bias_gelu', supports={'fp8': False})", "must name one of * got 'fp8'"),
        ("@pytest.mark.kernel('bias_gelu', dtypes=['float32'])", "dtypes must be some of torch.float32"),
        ("@pytest.mark.kernel('bias_gelu', fp8=False)", "*unexpected keyword argument 'fp8'"),
    ],
)
def test_a_wrong_marker_is_refused(pytest_run, marker, message):
    done = pytest_run(f"import pytest\n{marker}\ndef test_mine(kernel_example):\n    pass\n")
    assert done.ret != 0
    (done.stdout if "ERROR" in done.stdout.str() else done.stderr).fnmatch_lines([f"*{message}*"])


def test_the_plugin_imports_torch_only_if_it_is_used(pytester):
    pytester.makepyfile("import sys\ndef test_one():\n    assert 'torch' not in sys.modules\n")
    done = pytester.runpytest_subprocess(*OPTIONS, "-p", "no:benchmark")
    done.assert_outcomes(passed=1)
