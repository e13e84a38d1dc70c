"""The doctor reports everything that is wrong, and continues after each error."""

import os
import subprocess
import sys

import pytest
import torch

from electra_fast import doctor, ops, testing, versions
from electra_fast.ops import _operators

FEW_OPS = ("replace_tokens", "rtd_loss", "bias_gelu")


def test_a_healthy_installation_is_right(capsys):
    assert doctor.examine(FEW_OPS) == 0
    said = capsys.readouterr().out
    assert "everything that can run here is right" in said and said.count("  right\n") == 3 + 4
    assert f"torch: {torch.__version__}" in said and "rtd_loss" in said.split("Milliseconds")[1]


@pytest.mark.parametrize(
    ("kernel", "words"),
    [
        (lambda x, bias: x * 1.01, "exceeds the budget"),
        (lambda x, bias: 1 / 0, "raised ZeroDivisionError: division by zero"),
    ],
)
def test_a_wrong_kernel_is_named_and_the_others_are_examined(kernel, words, monkeypatch, capsys):
    monkeypatch.setattr(ops, "bias_gelu", kernel)
    monkeypatch.setattr(doctor, "transformers_verdicts", lambda: iter(()))  # they call the kernel too
    found = {v.subject: v for v in doctor.verdicts(FEW_OPS)}
    assert words in found["bias_gelu"].words and found["rtd_loss"].words == "right"
    assert doctor.examine(("bias_gelu",)) == 1
    said = capsys.readouterr().out
    assert "1 wrong" in said and words in said.split("```")[1]


@pytest.fixture
def hf():
    pytest.importorskip("transformers")
    from electra_fast import hf

    return hf


def test_a_wrong_patch_is_named_and_the_rest_is_tried(hf, monkeypatch, capsys):
    fused = hf.blocks.Embeddings.fused

    def no_such_argument(self, *args, **kwargs):
        raise TypeError("fused() got an unexpected keyword argument 'cache_length'")

    monkeypatch.setattr(hf.blocks.Embeddings, "fused", no_such_argument)
    assert doctor.examine(("rtd_loss",)) == 1
    said = capsys.readouterr().out
    wrong = said.count("wrong: TypeError: fused() got an unexpected keyword")
    assert "4 wrong" in said and wrong == 8, "each is printed twice"
    monkeypatch.setattr(
        hf.blocks.Embeddings, "fused", lambda self, *args, **kwargs: fused(self, *args, **kwargs).cumsum(-1)
    )
    found = {v.subject: v.words for v in doctor.transformers_verdicts()}
    assert len(found) == 4 and all("wrong: an error of " in words for words in found.values()), found


def test_an_unknown_block_is_named_but_not_wrong(hf, monkeypatch):
    monkeypatch.setattr(hf.blocks.BiasGELU, "forwards", ("states",))
    said = {v.subject: v for v in doctor.transformers_verdicts()}["patch ELECTRA"]
    assert not said.wrong and said.words.startswith("right: ElectraIntermediate runs unfused, transformers ")


@pytest.mark.parametrize(
    ("version", "message"),
    [(None, "transformers is not installed; pip install"), ("4.57.6", "transformers must be 5.0.0 or newer")],
)
def test_without_transformers_the_doctor_continues(version, message, monkeypatch, capsys):
    real = versions.installed
    monkeypatch.setattr(versions, "installed", lambda name: version if name == "transformers" else real(name))
    assert doctor.examine(("rtd_loss",)) == 0
    assert message in capsys.readouterr().out


def test_a_missing_extension_is_reported(monkeypatch, capsys):
    if torch.cuda.is_available():
        pytest.skip("tests the report without a GPU")
    monkeypatch.setattr(_operators, "COMPILED", frozenset())
    for op, implementations in _operators.OPERATORS.items():
        monkeypatch.setitem(_operators.OPERATORS, op, implementations._replace(serving={}))
    doctor.examine(("replace_tokens",))
    assert "replace_tokens  reference (built without electra_fast._C)" in capsys.readouterr().out


def test_refuses_to_run_without_assertions():
    command = [sys.executable, "-O", "-m", "electra_fast", "doctor"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "doctor: python must run without -O" in done.stderr


def test_every_op_is_timed():
    assert set(doctor._arguments("cpu")) == set(testing.OPS)


def test_unrelated_environment_variables_are_not_printed(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    facts = doctor.environment()
    assert facts["OMP_NUM_THREADS"] == "3" and "secret" not in str(facts)


@pytest.mark.parametrize("set_to", [None, "0", "1"])
def test_only_the_variables_that_the_user_set_are_printed(set_to):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_INTERPRET": set_to} if set_to else {}
    code = "from electra_fast import doctor; print(doctor.environment().get('TRITON_INTERPRET'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.split() == [str(set_to)], done.stderr
