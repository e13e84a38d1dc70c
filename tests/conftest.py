"""The seed of a run, printed so that the run can be repeated; the CPU cores, divided among the workers."""

import os
import random

from electra_fast import testing

testing.interpret()  # before anything imports Triton

import host  # noqa: E402
import interpreter  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

from electra_fast import inference, ops  # noqa: E402
from electra_fast.ops._operators import HAS_TRITON, OPERATORS  # noqa: E402
from electra_fast.ops.encoder_layer import encoder_layer  # noqa: E402

if not torch.cuda.is_available():
    host.install()
if testing.interpreted() and HAS_TRITON:
    interpreter.install()

SEED = "ELECTRA_FAST_TEST_SEED"  # passes the seed from the controller to the workers


def integer_or_random(text):
    return random.randrange(2**31) if text == "random" else int(text)


def pytest_addoption(parser):
    parser.addoption(
        "--seed", type=integer_or_random, default=0, help="seed of the example inputs, or random (default: 0)"
    )


def pytest_configure(config):
    if not hasattr(config, "workerinput"):
        os.environ[SEED] = str(config.getoption("--seed"))
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


def both_paths(op):
    """Run a test with `path` = the op, whose calls begin in C++ if it was built, and its path in Python."""
    function = getattr(ops, op)
    return pytest.mark.parametrize("path", [function, function.in_python], ids=["C++", "Python"])


@pytest.fixture
def seed():
    return int(os.environ[SEED])


@pytest.fixture
def kernel(implementation):
    """Each implementation of the module's OP, with the public signature."""
    op, name = implementation
    return testing.implementations(op)[name]


@pytest.fixture
def layer_calls(monkeypatch):
    """The dtypes of the weights with which the operator of an encoder layer is called."""
    seen = []

    def spy(x, weights, *rest):
        seen.append(weights[0].dtype)
        return encoder_layer(x, weights, *rest)

    monkeypatch.setattr(inference, "encoder_layer", spy)
    return seen


@pytest.fixture(scope="session")
def device():
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def check_thread_counts(device):
    """Return a check that a CPU kernel gives the same bits for an example with 1, 2 and 5 threads."""
    if device != "cpu":
        pytest.skip("tests the CPU kernels")
    threads = torch.get_num_threads()

    def check(function, example):
        outcomes = []
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            outcomes.append(testing.run(function, example))
        for outcome in outcomes[1:]:
            for found, wanted in zip(outcome, outcomes[0], strict=True):
                assert all(torch.equal(found[name], x) for name, x in wanted.items())

    yield check
    torch.set_num_threads(threads)
