"""`testing.bites` plants every kind of fault, and tells a check that finds them from one that does not."""

import functools
import importlib
import importlib.util
import os
import sys
import time

import pytest
import torch

from electra_fast import ops, testing
from electra_fast.ops._public import Kernels
from electra_fast.testing.faults import KINDS, plant

pytestmark = pytest.mark.skipif(not testing.interpreted(), reason="bites refuses kernels on a GPU")

# A name of two bytes, because Python counts columns in bytes.
SOFTMAX = '''\
"""Softmax of the rows of x, times a scale."""

import functools

import torch
import triton
from triton import language as tl

BLOCK_T, BLOCK_W = 4, 8


@triton.jit
def _softmax(x_ptr, y_ptr, T, W, scale, BLOCK_T: tl.constexpr, BLOCK_W: tl.constexpr):
    offs_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    offs_w = tl.arange(0, BLOCK_W)[None, :]
    rows = x_ptr + offs_t * W
    largest = tl.full((BLOCK_T, 1), float("-inf"), tl.float32)
    for w0 in range(0, W, BLOCK_W):
        mask = (offs_t < T) & (w0 + offs_w < W)
        x = tl.load(rows + w0 + offs_w, mask=mask, other=float("-inf")).to(tl.float32) * scale
        largest = tl.maximum(largest, tl.max(x, axis=1)[:, None])
    Σ = tl.zeros((BLOCK_T, 1), tl.float32)
    for w0 in range(0, W, BLOCK_W):
        mask = (offs_t < T) & (w0 + offs_w < W)
        x = tl.load(
            rows + w0 + offs_w,
            mask=mask,
        ).to(tl.float32) * scale
        Σ += tl.sum(tl.where(mask, tl.exp(x - largest), 0.0), axis=1)[:, None]
    for w0 in range(0, W, BLOCK_W):
        mask = (offs_t < T) & (w0 + offs_w < W)
        x = tl.load(rows + w0 + offs_w, mask).to(tl.float32) * scale
        tl.store(y_ptr + offs_t * W + w0 + offs_w, tl.exp(x - largest) / Σ, mask=mask)


def documented(function):
    @functools.wraps(function)
    def call(*args):
        return function(*args)

    return call


@documented
def softmax(x, scale):
    T, W = x.shape
    y = torch.empty_like(x)
    grid = (triton.cdiv(T, BLOCK_T),)
    _softmax[grid](x, y, T, W, scale, BLOCK_T, BLOCK_W)
    return y
'''

LINES = [
    ("tl.store(p, x, m)", "mask", "tl.store(p, x)"),
    ("tl.atomic_add(p, x, mask=m, sem='relaxed')", "mask", "tl.atomic_add(p, x, sem='relaxed')"),
    ("x = load(p, m, 0.0)", "mask", "x = load(p)"),
    ("x = tl.where(m, x + 1, 0.0)", "mask", "x = (x + 1)"),
    ("x = tl.where(m, 0.0, x)", "mask", "x = x"),
    ("x = tl.dot(a, b) + tl.sum(x)", "scale", "x = (tl.dot(a, b) * 1.01) + tl.sum(x)"),
    ("x = tl.dot(a, b) + tl.sum(x)", "scale", "x = tl.dot(a, b) + (tl.sum(x) * 1.01)"),
    ("tl.store(p, (x + y).to(d))", "scale", "tl.store(p, (((x + y) * 1.01)).to(d))"),
    ("x *= s.scale", "scale", "x *= (s.scale * 1.01)"),
    ("for i in tl.static_range(n):", "range", "for i in tl.static_range(n - 1):"),
    ("for i in tl.static_range(n):", "range", "for i in tl.static_range(1, n):"),
    ("for i in range(a, b | c):", "range", "for i in range(a, (b | c) - 1):"),
    ("for i in range(a, b | c):", "range", "for i in range(a + 1, b | c):"),
    ("m = i <= n // 2", "range", "m = i <= (n // 2) - 1"),
    ("x += y", "sum", "x = y"),
    ("x += y", "precision", "x = (x + y).to(tl.float16).to(x.dtype)"),
    ("x = f(y, dtype=tl.float64)", "precision", "x = f(y, dtype=tl.float32)"),
    ("x = tl.exp2(a * b - c)", "overflow", "x = tl.exp2(a * b)"),
]
NO_FAULT = ["m = x < 0", "p = q * n", "x = tl.zeros((2,), tl.float32)", "tl.store(p, i.to(tl.int32))"]
NO_FAULT += ["x = i.to(tl.float32, bitcast=True)", "n = cdiv(a, b)", "x = tl.load(p)", "x = tl.exp(-y)"]


def kernel(line):
    body = line + (" pass" if line.endswith(":") else "")
    return (
        f"import triton.language as tl\nfrom triton import jit\n\n@jit(debug=True)\ndef k(*_):\n    {body}\n"
    )


@pytest.mark.parametrize(("line", "kind", "broken"), LINES)
def test_a_pattern_makes_this_fault(line, kind, broken):
    faults = {(fault.line, fault.kind, fault.source.removesuffix(" pass")) for fault in plant(kernel(line))}
    assert (6, kind, broken) in faults


@pytest.mark.parametrize("line", NO_FAULT)
def test_no_pattern_fits(line):
    assert plant(kernel(line)) == []


def test_only_kernels_of_triton_are_broken():
    source = "import numba\nimport triton\n\n@{}.jit\ndef k(x):\n    x += 1\n"
    assert plant(source.format("numba")) == [] and len(plant(source.format("triton"))) == 1


def test_each_fault_is_valid_python_and_planted_once():
    faults = plant(SOFTMAX)
    assert {fault.kind for fault in faults} == {*KINDS}
    assert len({fault.file for fault in faults}) == len(faults)
    for fault in faults:
        compile(fault.file, "file", "exec")


@pytest.fixture
def module(tmp_path):
    """Return the module with this source, from a file."""

    def load(source):
        path = tmp_path / "my_kernels.py"
        path.write_text(source, encoding="utf-8")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


def check_softmax(softmax, x):
    with testing.guarded_memory():
        got = softmax(x, 0.5)
    ref, low = (0.5 * x.double()).softmax(-1), (0.5 * x).softmax(-1)
    testing.assert_within_budget("softmax", got, ref, low)


def good_check(softmax):
    """Has a row and a column more than whole blocks, rows of all magnitudes, and NaN around x."""
    T, W = 5, 17
    x = torch.randn(T, W, generator=torch.Generator().manual_seed(0))
    x += 20000 * torch.tensor([[-1], [1], [0], [1], [-1]])
    x[:, 0] += 200 * torch.tensor([1, 0, 1, 0, 0])
    x[:, -1] += 200 * torch.tensor([0, 1, 0, 0, 1])
    margin = torch.full((64,), torch.nan)
    check_softmax(softmax, torch.cat([margin, x.flatten(), margin])[64:-64].view(T, W))


def weak_check(softmax):
    check_softmax(softmax, torch.randn(4, 8, generator=torch.Generator().manual_seed(0)))


def lines(faults):
    return [(fault.line, fault.kind) for fault in faults]


def test_a_good_check_finds_all_faults_that_change_a_result(module):
    report = testing.bites(module(SOFTMAX).softmax, good_check)
    # The largest element, which cancels, rounded to 16 bits; two loads of elements that are masked later.
    equivalent = [(20, "precision"), (25, "mask"), (32, "mask")]
    assert lines(report.let_through) == equivalent
    assert str(report).endswith("27 of 30 faults found")
    (row,) = (row for row in str(report).splitlines() if row.split()[:2] == ["48", "grid"])
    assert "found: AssertionError" in row and row.endswith("grid = (max(T // BLOCK_T, 1),)")
    with pytest.raises(AssertionError, match=r"^3 of 30 faults let through\n(.*\n){2}.*25 .*LET THROUGH"):
        report.assert_all_found()


def test_a_weak_check_lets_faults_through(module):
    report = testing.bites(module(SOFTMAX).softmax, weak_check)
    # In whole blocks, in one block, and with a largest element that is small.
    in_whole_blocks = [(20, "mask"), (25, "mask"), (29, "mask"), (32, "mask"), (33, "mask"), (48, "grid")]
    in_one_block = [(18, "range"), (23, "range"), (29, "sum"), (30, "range")]
    if_small = [
        (19, "range"),
        (20, "precision"),
        (20, "scale"),
    ]
    assert sorted(lines(report.let_through)) == sorted(in_whole_blocks + in_one_block + if_small)


FRAGILE = """\
import triton
import triton.language as tl


@triton.jit
def _first(x_ptr, y_ptr, FAR: tl.constexpr):
    offs = tl.arange(0, 2).to(tl.int64)
    total = 1.0
    total += tl.load(x_ptr + FAR * offs, mask=offs < 1, other=0.0)
    tl.store(y_ptr + offs, total, mask=offs < 1)


def first(x):
    y = x.new_empty(1)
    _first[(1,)](x, y, 2**44)
    return y
"""


def test_a_crash_a_hang_and_an_exit_are_found(module):
    def check(first):
        result = first(torch.ones(1))
        if result == 1:
            time.sleep(3600)
        if result != 2:
            os._exit(3)

    report = testing.bites(module(FRAGILE).first, check, limit=5, only=("mask", "scale", "sum"))
    found = [(fault.line, fault.kind, fault.found_by) for fault in report.faults]
    assert (9, "sum", "time limit: 5 s") in found
    assert (9, "mask", "crash: SIGSEGV") in found
    assert (10, "scale", "crash: exit code 3") in found


def test_a_factory_makes_the_function_from_the_module(module):
    def halved(module):
        return lambda x: module.softmax(x, 0.5)

    def check(halved):
        check_softmax(lambda x, _: halved(x), torch.randn(5, 8))

    report = testing.bites(halved, check, module=module(SOFTMAX), only=["grid"])
    assert lines(report.faults) == [(48, "grid")] and report.let_through == []


def accept(_):
    pass


def refuse(_):
    raise AssertionError("the sum is 2")


def test_a_check_that_refuses_the_right_function(module):
    with pytest.raises(ValueError, match=r"check must accept .*, got AssertionError: the sum is 2"):
        testing.bites(module(SOFTMAX).softmax, refuse)


def test_a_check_that_is_slower_than_the_limit(module):
    with pytest.raises(ValueError, match=r"check must accept .*, got time limit: 0 s in a child process"):
        testing.bites(module(SOFTMAX).softmax, accept, limit=0)


def test_functions_without_kernels_are_refused():
    with pytest.raises(ValueError, match=r"top level of a file, got .*<lambda>; .*module="):
        testing.bites(lambda x: x, accept)
    with pytest.raises(ValueError, match=r"top level of a file, got .*partial.*module="):
        testing.bites(functools.partial(accept, 0), accept)
    with pytest.raises(ValueError, match=r"with Triton kernels .*ops/rtd_loss.py; .*module="):
        testing.bites(ops.rtd_loss, accept)
    names = {}
    exec("def typed(x): return x", names)
    with pytest.raises(ValueError, match="be in a source file, got None; write"):
        testing.bites(names["typed"], accept)


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match=r"only must have only names in mask, .*, got masks"):
        testing.bites(accept, accept, only=["masks", "scale"])


def test_a_process_for_a_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(RuntimeError, match="a process that has not used a GPU"):
        testing.bites(accept, accept)
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(RuntimeError, match=r"interpreter, got compiled kernels.*set TRITON_INTERPRET=1"):
        testing.bites(accept, accept)


# The faults in our kernels that `check_op` lets through. Most are equivalent: without its mask, a load reads
# elements that a `where` or a store leaves out; `log1p` never chooses the infinite element; a bool is exact
# in float16. Two are not: the dy of `check_op` is exact in float16, and only tests/test_rtd_loss.py has so
# many blocks that `acc` needs its sum.
LET_THROUGH = {
    "add_norm": [],
    "bias_gelu": [
        "bias = tl.load(bias_ptr + offs_w).to(tl.float32)[None, :]",
        "z = tl.load(x_ptr + offs).to(tl.float32) + bias # [BLOCK_T, BLOCK_W]",
        "bias = tl.load(bias_ptr + offs_w).to(tl.float32)[None, :]",
        "dy = tl.load(dy_ptr + offs, mask=mask, other=0.0).to(tl.float16) # [BLOCK_T, BLOCK_W]",
    ],
    "_binary_cross_entropy": [
        "y = tl.load(y_ptr + offs_t) != 0",
        "w = in_t.to(tl.float16) if w_ptr is None else tl.load(w_ptr + offs_t, mask=in_t, other=0.0)",
        "log1p = tl.where(u == 1.0, e, tl.log(u) * (e / (u - 1.0)))",
        "acc = tl.load(partial_ptr + row * blocks + offs_p, mask=(row < 5) & (offs_p < blocks), other=0.0)",
    ],
    "rtd_loss": ["x = tl.load(x_ptr + offs_t).to(tl.float32)"],
    "nce_loss": ["x = tl.load(x_ptr + offs_t).to(tl.float32)", "q = tl.load(q_ptr + offs_t)"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LET_THROUGH)
def test_our_checks_find_the_faults_in_our_kernels(name, monkeypatch):
    op = "nce_loss" if name == "_binary_cross_entropy" else name

    def function(module):
        if op != name:  # the op's file, importing the broken one
            monkeypatch.setitem(sys.modules, f"electra_fast.kernels.{name}", module)
            spec = importlib.util.find_spec(f"electra_fast.kernels.{op}")
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        kernels = Kernels(getattr(module, f"{op}_fwd"), getattr(module, f"{op}_bwd"))
        return getattr(ops, op).over(kernels)

    def check(function):
        with testing.guarded_memory():
            testing.check_op(op, function, seed=0)

    module = importlib.import_module(f"electra_fast.kernels.{name}")
    report = testing.bites(function, check, module=module, limit=300)
    assert [fault.source for fault in report.let_through] == LET_THROUGH[name]
