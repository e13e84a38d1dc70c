"""The worked examples of docs/check_your_kernel.md run, and print what the page shows."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch

from electra_fast import testing

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs/check_your_kernel.md").read_text()
ATTENTION, SOFTMAX, READS, LIGER = re.findall(r"^```python\n(.*?)^```", TEXT, re.M | re.S)


@pytest.fixture
def run(monkeypatch, capsys):
    """Return a function that runs blocks with the same names, and returns what they print."""
    monkeypatch.syspath_prepend(ROOT)  # the examples are not installed
    names = {"torch": torch}

    def run(*blocks):
        for block in blocks:
            exec(compile(block, "docs/check_your_kernel.md", "exec"), names)
        return capsys.readouterr().out

    return run


def counts(text):
    """Return the counts of the last summary: "44 right, 0 wrong, 0 raised, 0 unsupported"."""
    return re.findall(r"\d+ right, \d+ wrong, \d+ raised, \d+ unsupported", text)[-1]


def shown_after(block):
    """Return the output that the page shows below a block."""
    return re.match(r"```\n+```\n(.*?)```", TEXT[TEXT.index(block) + len(block) :], re.S)[1]


def test_attention_of_pytorch(run):
    assert counts(run(ATTENTION)) == counts(shown_after(ATTENTION))


@pytest.mark.skipif(not testing.interpreted(), reason="a GPU may end with the fault that is shown")
def test_a_softmax_in_triton_whose_fault_only_a_guard_finds(run):
    assert counts(run(SOFTMAX)) == counts(shown_after(SOFTMAX))
    said = shown_after(READS).strip().removeprefix("AssertionError: ")
    with pytest.raises(AssertionError, match=re.escape(said)):
        run(READS)


def test_ligers_softmax(run):
    if importlib.util.find_spec("liger_kernel") is None:
        pytest.skip("Liger is not installed")
    assert counts(run(SOFTMAX, LIGER)) == counts(shown_after(LIGER))


def test_the_table_of_checks_is_complete():
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", TEXT, re.M)
    assert rows == [(name, check.says) for name, check in testing.CHECKS.items()]
