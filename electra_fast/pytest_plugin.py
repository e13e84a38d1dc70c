"""A pytest plugin: one test per example of an op. pytest finds it wherever electra_fast is installed.

    @pytest.mark.kernel("attention", supports={"dropout": False})
    def test_my_attention(kernel_example):
        kernel_example(my_attention)

The marker accepts what `testing.report` accepts: adapter, supports, seed, device and dtypes. An example that
is not supported is skipped with the reason. `--kernel-seed` changes the inputs.
"""

import pytest

from electra_fast.errors import must


def pytest_addoption(parser):
    group = parser.getgroup("electra_fast")
    group.addoption("--kernel-seed", type=int, default=0, help="seed of the examples of @pytest.mark.kernel")


def pytest_configure(config):
    options = "kernel(op, adapter=None, supports=None, seed=None, device=None, dtypes=None)"
    config.addinivalue_line("markers", f"{options}: run the test once per example of an op of electra_fast")


def pytest_generate_tests(metafunc):
    if "kernel_example" not in metafunc.fixturenames:
        return
    marker = metafunc.definition.get_closest_marker("kernel")
    if marker is None or len(marker.args) != 1:
        rule, got = "have the marker kernel(op)", "none" if marker is None else f"kernel{marker.args}"
        raise pytest.UsageError(must(f"kernel_example: {metafunc.definition.nodeid}", rule, got))
    from electra_fast.testing.check import kernel_examples  # imports torch, which other tests may not need

    options = {"seed": metafunc.config.getoption("--kernel-seed"), **marker.kwargs}
    try:
        found = kernel_examples(*marker.args, **options)
    except (TypeError, ValueError) as error:
        raise pytest.UsageError(f"{metafunc.definition.nodeid}: {error}") from None
    metafunc.parametrize("kernel_example", list(found.values()), ids=list(found), indirect=True)


@pytest.fixture
def kernel_example(request):
    """A function that compares your function with the op on this test's example."""

    def compare(function) -> None:
        rows = request.param(function)
        bad = [row.why for row in rows if row.verdict in ("wrong", "raised")]
        if bad:
            pytest.fail("\n".join(bad), pytrace=False)
        if all(row.verdict == "unsupported" for row in rows):
            pytest.skip(rows[0].why)

    return compare
