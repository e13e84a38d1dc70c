"""A seed for the run, printed and repeatable; the machine's cores shared between the workers."""

import os
import random

from electra_fast import testing  # first: it has Triton interpret its kernels where there is no GPU
from electra_fast.ops._register import OPERATORS

import host  # isort: skip
import pytest  # isort: skip
import torch  # isort: skip

if not torch.cuda.is_available():
    host.install()

SEED = "ELECTRA_FAST_TEST_SEED"  # how the controller hands its seed to the workers


def pytest_addoption(parser):
    parser.addoption(
        "--seed", type=int, default=None, help="of the example inputs; printed, and fresh if not given"
    )


def pytest_configure(config):
    if not hasattr(config, "workerinput"):
        seed = config.getoption("--seed")
        os.environ[SEED] = str(random.randrange(2**31) if seed is None else seed)
    torch.set_num_threads(
        max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1)))
    )


def pytest_report_header(config):
    return f"seed of the example inputs: --seed {os.environ[SEED]}"


def pytest_generate_tests(metafunc):
    """`op`: every op; `differentiable`: those with a gradient; `implementation`: every (op, name)."""
    if "implementation" in metafunc.fixturenames:
        ops = [metafunc.module.OP] if hasattr(metafunc.module, "OP") else testing.OPS
        pairs = [(op, name) for op in ops for name in testing.implementations(op)]
        metafunc.parametrize("implementation", pairs, ids="-".join)
    elif "op" in metafunc.fixturenames:
        metafunc.parametrize("op", testing.OPS)
    elif "differentiable" in metafunc.fixturenames:
        metafunc.parametrize("differentiable", [op for op in testing.OPS if f"{op}_bwd" in OPERATORS])


@pytest.fixture
def seed():
    return int(os.environ[SEED])


@pytest.fixture
def kernel(implementation):
    """Each implementation of the module's OP, with the public signature."""
    op, name = implementation
    return testing.implementations(op)[name]


@pytest.fixture(scope="session")
def device():
    return "cuda" if torch.cuda.is_available() else "cpu"
