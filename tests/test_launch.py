"""Launches by the extension pass to the driver what Triton passes; otherwise Triton launches.

The driver is a stub (`benchmarks/static/stub.py`), so each test runs in a process of its own.
"""

import json
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
pytestmark = pytest.mark.skipif(not COMPILED, reason="the extension launches")


def test_every_launch_of_every_example_passes_what_triton_passes():
    rows = on_stub.lines("same", *IN_TRITON)  # an example that does not launch is an error
    assert [row["op"] for row in rows] == [op for op in IN_TRITON for _ in testing.examples(op, 0)]
    assert rows[-1]["different"] == []
    by_triton = [(row["op"], row["example"]) for row in rows if row["direct"] != row["calls"]]
    assert by_triton == [], "a second call was launched by Triton"
    assert {row["op"] for row in rows if row["calls"]} == {*IN_TRITON}


def test_any_arguments_pass_what_triton_passes(seed):
    *rows, last = on_stub.lines("arguments", str(seed))
    assert last["different"] == []
    again = rows[len(rows) // 2 :]
    assert [row["case"] for row in again if row["direct"] == row["unknown"]] == []
    assert {row["unknown"] for row in again} == {True, False}


PROGRAM = """
import copy, json, threading, warnings
from benchmarks.static import stub
launches = stub.install()
import torch, triton, triton.language as tl
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from electra_fast import _C
from electra_fast.kernels import _launch

bound = 0
def run(self, *args, original=JITFunction.run, **kwargs):
    global bound
    bound += 1
    return original(self, *args, **kwargs)
JITFunction.run = run

@triton.jit
def nothing(x_ptr, n, N: tl.constexpr):
    pass

def counts(x=torch.zeros(64), n=3, N=1, grid=(2,)):
    before = bound, launches()
    _launch.launch(nothing, grid, x, n, N=N)
    return [bound - before[0], launches() - before[1]]

found = {"enabled": _launch.enable(_C), "first": counts(), "again": counts(), "empty grid": counts(grid=(0,))}
found["offset"] = counts(torch.zeros(64)[1:]), counts(torch.zeros(64)[1:]), counts()
found["constant"] = counts(N=2), counts(N=2), counts()

runtime, called = triton.knobs.runtime, []
runtime.launch_enter_hook.add(called.append)
found["hook"] = counts(), len(called)
runtime.launch_enter_hook.remove(called.append)
runtime.launch_exit_hook, hook = called.append, runtime.launch_exit_hook
found["exit hook"] = counts(), len(called)
runtime.launch_exit_hook = hook
nothing.add_pre_run_hook(lambda *args, **kwargs: called.append(0))
found["hook of the kernel"] = counts(), len(called)
nothing.pre_run_hooks.clear()
found["without hooks"] = counts()

runtime.debug = True
found["debug"] = counts(), counts()
runtime.debug = False
found["not debug"] = counts()
torch.compiler.is_compiling, real = lambda: True, torch.compiler.is_compiling
found["torch.compile"] = counts()
torch.compiler.is_compiling = real

active = driver.active
driver.set_active(copy.copy(active))
found["another driver"] = counts(), counts()
driver.set_active(active)
thread = threading.Thread(target=lambda: found.__setitem__("thread", counts()))
thread.start(), thread.join()

try:
    counts(grid=(1, 65536))
except RuntimeError as error:
    found["refused"] = str(error)
runtime.add_stages_inspection_hook = lambda *_: ("key", "hash")
found["inspection"] = counts()
runtime.add_stages_inspection_hook = None

_launch.SCRATCH = ["u64"]
with warnings.catch_warnings(record=True) as said:
    found["unknown parameters"] = counts(N=5), counts(N=5), len(said)
found["no extension"] = _launch.enable(None), counts()
triton.__version__ = "9.9.1"
found["unknown version"] = _launch.enable(_C), counts()
print(json.dumps(found))
"""


def test_when_triton_launches(tmp_path):
    file = tmp_path / "program.py"  # Triton reads a kernel's source from its file
    file.write_text(PROGRAM)
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(stub.ROOT)}
    done = subprocess.run([sys.executable, file], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    triton, extension = [1, 1], [0, 1]  # calls of Triton's binder, and launches
    found = json.loads(done.stdout)
    refused = found.pop("refused")
    assert "launch configuration" in refused
    assert found == {
        "enabled": "",
        "first": triton,
        "again": extension,
        "empty grid": [0, 0],
        "offset": [triton, extension, extension],
        "constant": [triton, extension, extension],
        "hook": [triton, 1],
        "exit hook": [triton, 2],
        "hook of the kernel": [triton, 3],
        "without hooks": extension,
        "debug": [triton, extension],
        "not debug": extension,
        "torch.compile": triton,
        "another driver": [triton, extension],
        "thread": extension,
        "inspection": triton,
        "unknown parameters": [triton, triton, 1],  # with one warning
        "no extension": ["the extension is not built", triton],
        "unknown version": ["Triton 9.9.1 is not one of 3.6, 3.7, 3.8", triton],
    }
