"""Triton's real launch path without a GPU: every example of every op, and a step, over a stub driver.

Binding, specialisation, ptxas, the C launcher and the launch configuration are those of a GPU with sm_90; the
kernels themselves do not run (the interpreter runs them in other tests).
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from electra_fast import testing
from electra_fast.ops._operators import COMPILED, OPERATORS

sys.path.insert(0, str(Path(__file__).parents[1]))  # the harness is not installed

from benchmarks.static import on_stub, stub

IN_TRITON = [op for op in testing.OPS if OPERATORS.get(op, OPERATORS.get(f"{op}_fwd")).triton]
# Triton launches of one step of ELECTRA-small; cuBLAS's and PyTorch's own come on top.
STEP = {"padded": 294, "packed": 298}
# Operators that PyTorch dispatches inside one call, and Triton launches.
HOST = {
    ("empty kernel", "launch by Triton"): (0, 1),
    ("mask_tokens", "forward"): (6, 1),
    ("embed", "forward"): (5, 1),
    ("embed", "forward+backward"): (27, 4),
    ("attention", "forward"): (2, 1),
    ("attention", "forward+backward"): (9, 3),
    ("attention_qkv", "forward"): (3, 1),
    ("attention_qkv", "forward+backward"): (10, 3),
    ("add_norm", "forward"): (3, 1),
    ("add_norm", "forward+backward"): (9, 3),
    ("bias_gelu", "forward"): (1, 1),
    ("bias_gelu", "forward+backward"): (5, 3),
    ("mlm_head", "forward"): (15, 4),
    ("mlm_head", "forward+backward"): (37, 7),
    ("replace_tokens", "forward"): (4, 2),
    ("rtd_loss", "forward"): (5, 2),
    ("rtd_loss", "forward+backward"): (10, 3),
    ("nce_loss", "forward"): (5, 2),
    ("nce_loss", "forward+backward"): (10, 3),
}
# The same for forward and backward of transformers' two models, and for the unpatched ones.
HOST_STEP = {"patched": (1474, 313), "unpatched": (3393, 0)}
# The same for forward and backward of a layer of an encoder and of a decoder.
HOST_LAYER = {"encoder": (41, 12), "decoder": (71, 18)}


@pytest.mark.skipif(bool(COMPILED), reason="test_launch.py compares these launches with the extension's")
@pytest.mark.parametrize("name", IN_TRITON)
def test_every_example_launches(name):
    rows = on_stub.lines("examples", name)
    assert len(rows) == len(list(testing.examples(name, 0)))
    assert not [row for row in rows if row["error"]]
    assert any(row["launches"] for row in rows)


def test_the_candidate_launches():
    (row,) = on_stub.lines("shapes", "linear_gelu")
    assert row["launches"] == 4 * 3 + 1  # forward, and two kernels backward; once only forward


def test_the_launches_of_a_step():
    rows = on_stub.lines("steps", "small")
    print(rows)
    assert {row["layout"]: row["launches"] for row in rows} == STEP


@pytest.mark.skipif(not COMPILED, reason="the extension launches")
def test_the_host_work_per_call():
    rows = {(row["op"], row["passes"]): row for row in on_stub.lines("host")}
    compare_host_work(rows, HOST)
    empty = rows.pop(("empty kernel", "launch by Triton"))
    assert empty["binder"] == 1  # the count sees Triton's binder
    assert {name: row["binder"] for name, row in rows.items() if row["binder"]} == {}


@pytest.mark.skipif(not COMPILED, reason="the extension launches")
def test_the_host_work_of_a_patched_step():
    pytest.importorskip("transformers")
    rows = {row["step"]: row for row in on_stub.lines("host_step")}
    compare_host_work(rows, HOST_STEP)
    assert rows["patched"]["binder"] == 0


@pytest.mark.skipif(not COMPILED, reason="the extension launches")
def test_a_decoder_layer_launches_no_more_than_two_encoder_layers():
    rows = {row["layer"]: row for row in on_stub.lines("host_layer")}
    compare_host_work(rows, HOST_LAYER)
    assert rows["decoder"]["launches"] <= 2 * rows["encoder"]["launches"]
    assert rows["decoder"]["operators"] <= 2 * rows["encoder"]["operators"]


def compare_host_work(rows: dict, committed: dict) -> None:
    """Fewer operators than committed are allowed: another PyTorch may need fewer for the same call."""
    print(rows)
    assert {name: row["launches"] for name, row in rows.items()} == {n: c[1] for n, c in committed.items()}
    more = {name: row["operators"] for name, row in rows.items() if row["operators"] > committed[name][0]}
    assert more == {}


def test_the_stub_refuses_a_launch_that_a_gpu_refuses(tmp_path):
    program = """
from benchmarks.static import stub
launches = stub.install()
import torch, triton
@triton.jit
def nothing(x_ptr):
    pass
nothing[(1, 65535)](torch.zeros(1))
try:
    nothing[(1, 65536)](torch.zeros(1))
except RuntimeError as error:
    print(launches(), error)
"""
    file = tmp_path / "program.py"  # Triton reads a kernel's source from its file
    file.write_text(program)
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(stub.ROOT)}
    done = subprocess.run([sys.executable, file], env=environment, capture_output=True, text=True)
    assert done.stdout.startswith("2 ") and "launch configuration" in done.stdout, done.stderr


KEYS = """
import sys
from triton.runtime.jit import JITFunction
from electra_fast.kernels._cache_keys import fix_cache_keys
for name in sys.argv[1].split(","):
    fix_cache_keys(f"electra_fast.kernels.{name}")
    # As by use: a kernel, which stands last in its file, is hashed before what it calls.
    for module in [m for m in sys.modules if m.startswith("electra_fast.kernels.")]:
        for kernel in reversed(vars(sys.modules[module]).values()):
            if isinstance(kernel, JITFunction):
                print(kernel.__module__, kernel.__name__, kernel.cache_key)
"""


def test_cache_keys_do_not_depend_on_the_order_of_use():
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    said = set()
    for order in (IN_TRITON, IN_TRITON[::-1], ["attention_qkv"]):
        command = [sys.executable, "-c", KEYS, ",".join(order)]
        done = subprocess.run(command, cwd=stub.ROOT, env=environment, capture_output=True, text=True)
        assert done.stdout and not done.stderr
        said |= set(done.stdout.splitlines())
    kernels = [line.rpartition(" ")[0] for line in said]
    assert len(kernels) == len(set(kernels)) > 20, sorted(said)
