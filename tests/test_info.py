"""The report about this installation, and the warning about a slow path."""

import os
import subprocess
import sys
import warnings

import pytest
import torch

import electra_fast
from electra_fast import doctor, ops
from electra_fast.ops import SlowPathWarning, _operators


def test_info_names_the_implementation_of_each_op():
    facts = electra_fast.info()
    assert set(facts["ops"]) == set(ops.Ops._fields)
    for op, served in facts["ops"].items():
        assert served == {device: str(_operators.served_by(op, device)) for device in ("CPU", "CUDA")}
    assert facts["ops"]["rtd_loss"]["CUDA"] == (
        "Triton" if _operators.HAS_TRITON else "reference (Triton is not installed)"
    )
    if ("mask_tokens", "CPU") in _operators.COMPILED:
        assert facts["ops"]["mask_tokens"]["CPU"] == "compiled from csrc/"


def test_info_says_why_nothing_was_built_for_cuda(monkeypatch):
    monkeypatch.setattr(_operators, "COMPILED", frozenset({("embed_fwd", "CPU"), ("linear_fwd", "CUDA")}))
    assert electra_fast.info()["extension"].startswith("built for CPU; not for CUDA: ")


def test_info_repeats_why_the_build_left_something_out(monkeypatch, tmp_path):
    monkeypatch.setattr(_operators, "COMPILED", frozenset({("embed_fwd", "CPU")}))
    monkeypatch.setattr(electra_fast, "__file__", str(tmp_path / "__init__.py"))
    found = {"electra_fast._C": object()}
    monkeypatch.setattr(doctor.importlib.util, "find_spec", found.get)
    (tmp_path / "_left_out.json").write_text('{"CUDA": "no nvcc; install it", "all": "no omp.h; set CXX"}')
    assert electra_fast.info()["extension"] == "built for CPU; not for CUDA: no nvcc; install it"
    found.clear()
    assert electra_fast.info()["extension"] == "not built: no omp.h; set CXX"
    (tmp_path / "_left_out.json").unlink()
    assert electra_fast.info()["extension"].startswith("not built: ")


def test_info_agrees_with_the_dispatcher():
    for op, implementations in _operators.OPERATORS.items():
        has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
        name = f"electra_fast::{op}"
        for device in ("CPU", "CUDA"):
            assert has_kernel(name, device) == (device in implementations.serving), (op, device)


def test_the_command_line_prints_the_table():
    said = subprocess.run(
        [sys.executable, "-m", "electra_fast", "info"], capture_output=True, text=True, check=True
    ).stdout
    assert all(op in said for op in ops.Ops._fields) and electra_fast.__version__ in said


def test_a_slow_path_warns_once():
    _operators._warn_slow.cache_clear()
    with pytest.warns(
        SlowPathWarning, match="electra_fast: embed_fwd runs without a kernel on this GPU: it has no"
    ):
        _operators._warn_slow("embed_fwd", _operators.why_not_triton(None))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _operators._warn_slow("embed_fwd", _operators.why_not_triton(None))


def test_every_public_name_can_be_imported():
    for name in electra_fast.__all__:
        assert getattr(electra_fast, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        electra_fast.nothing  # noqa: B018


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU needs no interpreter")
def test_interpret_is_refused_after_triton_was_imported():
    code = "import triton; from electra_fast import testing; testing.interpret()"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert "testing.interpret must be called before Triton is imported" in ended.stderr
    code = "import os; from electra_fast import testing; assert 'TRITON_INTERPRET' not in os.environ"
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
