"""A user's own function in the benchmarks: `--provider`, `--adapter`, `--baseline`, and its example."""

import copy
import json
import os
import subprocess
import sys
import time

import pytest
import torch
from fake_runs import GELU, GROUP, RESULT, ROOT, SIZE, fake_benchmark
from test_report import Page

from benchmarks import __main__ as command
from benchmarks.harness import machine, runner, yours
from benchmarks.harness.cases import BOTH, FORWARD, Call, OpCase, Round
from benchmarks.harness.inputs import SIZES
from benchmarks.report import page, runs, svg
from electra_fast import testing
from examples.my_attention import attention

MODULE = """
import torch.nn.functional as F

def bias_gelu(x, bias):
    return F.gelu(x + bias)

def tanh(x, bias):
    return F.gelu(x + bias, approximate="tanh")

def forward_only(x, bias):
    return F.gelu(x + bias).detach()

def too_wide(x, bias):
    raise NotImplementedError("at most 4 columns")

def broken(x, bias):
    return 1 / 0

def another(x, bias, table):
    return x

number = 3
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Return a folder with the module `my_kernels`, which can be imported."""
    (tmp_path / "my_kernels.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_kernels", raising=False)
    return tmp_path


@pytest.fixture
def measured(folder, monkeypatch):
    """Return a function that measures a provider `mine`, the source, of a case of these arguments."""

    def measure(source, op, args, gradients, passes, adapter=None):
        yours.give([f"mine={source}"], op, adapter)
        call = Call(args, "B/s", forward=100, backward=100, gradients=gradients)
        case = OpCase(op, lambda make: call, SIZES[SIZE], passes, {})
        monkeypatch.setattr(case, "right", {})
        run = runner.Runner(0.0, time.monotonic())  # the budget is spent
        monkeypatch.setattr(run.clock, "peak_bytes", lambda function: 0)
        monkeypatch.setattr(case, "seconds", 0.01, raising=False)
        return run.measure(case, ("mine", "torch"), Round.OPS)["mine"]

    yield measure
    yours.GIVEN.clear()


def test_a_run_has_the_right_one_in_all_its_outputs_and_refuses_the_wrong_one(folder):
    options = ["--provider", "mine=my_kernels:bias_gelu", "--provider", "off=my_kernels:tanh"]
    options += ["--only", "bias_gelu", "--quick", "--budget", "0", "--json", "mine.json"]
    shell = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    shell |= {"ELECTRA_FAST_REHEARSAL": "1", "PYTHONPATH": str(ROOT)}  # tiny sizes
    arguments = [sys.executable, "-m", "benchmarks", *options]
    done = subprocess.run(arguments, cwd=folder, env=shell, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stdout + done.stderr
    result = runs.read(folder / "mine.json")
    assert result["yours"] == {"mine": "my_kernels:bias_gelu", "off": "my_kernels:tanh"}
    timed = {group: of for group, of in runs.groups(result).items() if of.pop("off") == "wrong"}
    assert len(timed) == 4, "each case, though the budget is spent"
    assert all(list(of) == ["fused", "torch", "mine"] for of in timed.values())
    assert [line.partition(": ")[0] for line in result["wrong"]] == [f"{group}, off" for group in timed]
    group, of = next(iter(timed.items()))
    extra = of["mine"]["extra_info"]
    assert extra["yours"] == "my_kernels:bias_gelu" and set(extra["ratio"]) == {"fused", "torch"}
    assert {"result", "gradient of x", "gradient of bias"} == set(extra["errors"])

    lines = done.stdout.splitlines()
    rows = lines[lines.index("Your own kernel:") + 1 :]
    right, wrong = (next(row for row in rows if name in row) for name in (" mine ", " off "))
    assert right.startswith(group) and f" {extra['ratio']['fused']:.2f} (" in right
    assert wrong.startswith(group) and " wrong: result: " in wrong and "is allowed" in wrong
    assert "--provider mine=my_kernels:bias_gelu --provider off=my_kernels:tanh --budget" in done.stdout

    _, *rows = Page(page.page([result], "")).tables["Your own kernel"]
    shown = {tuple(row[:2]): row[2:] for row in rows}
    assert shown[group, "mine"][2].startswith(f"{extra['ratio']['torch']:.2f} (")
    assert shown[group, "off"][3].startswith("wrong: result: ") and len(shown) == 2 * len(timed)


@pytest.mark.parametrize(
    ("name", "passes", "word", "reason"),
    [
        ("tanh", FORWARD, "wrong", "from the reference"),
        ("forward_only", BOTH, "dropped", "its results have no gradient"),
        ("too_wide", BOTH, "dropped", "at most 4 columns"),
        ("broken", BOTH, "fails", "ZeroDivisionError: division by zero"),
    ],
)
def test_what_is_not_timed_has_a_reason(name, passes, word, reason, measured):
    refused = measured(f"my_kernels:{name}", "bias_gelu", GELU, ("x", "bias"), passes)
    assert refused.word == word and reason in refused.reason


def test_a_kernel_without_a_backward_pass_is_timed_in_the_forward_pass(measured):
    found = measured("my_kernels:forward_only", "bias_gelu", GELU, ("x", "bias"), FORWARD)
    assert set(found.extra["ratio"]) == {"torch"}


PACKED = {"cu_seqlens": torch.tensor([0, 4, 6], dtype=torch.int32), "max_seqlen": 4}
DROPOUT = {"dropout": 0.1, "rng": torch.tensor([0, 1]), "stream": 3}


def tokens(*shape):
    return {name: torch.randn(*shape, 2, 8, generator=torch.Generator().manual_seed(0)) for name in "qkv"}


@pytest.mark.parametrize(("shape", "options"), [((2, 3), DROPOUT), ((6,), PACKED)])
def test_what_a_case_needs_and_a_function_lacks_is_the_reason(shape, options, measured):
    source = "examples.my_attention:attention"
    found = measured(source, "attention", tokens(*shape) | options, tuple("qkv"), BOTH)
    assert found == runner.Refused("dropped", f"does not support {next(iter(options))}")


def test_an_adapter_calls_a_function_with_another_signature(measured):
    """PyTorch's attention draws its own dropout, which is timed but not compared."""
    source = "torch.nn.functional:scaled_dot_product_attention"
    found = measured(source, "attention", tokens(2, 3) | DROPOUT, tuple("qkv"), BOTH, adapter="sdpa")
    assert set(found.extra["ratio"]) == {"torch"}
    assert yours.facts() == {"yours": {"mine": source}, "adapter": "sdpa"}


@pytest.fixture
def main(folder, monkeypatch, capsys):
    """Return a function that runs the command, whose results are `timed`; it returns status and output."""

    def run(*options, timed=None):
        def pytest_main(arguments, plugins):
            assert timed, "nothing may be timed"
            (file,) = (a.partition("=")[2] for a in arguments if a.startswith("--benchmark-json="))
            with open(file, "w") as out:
                json.dump(timed, out)
            return 0

        monkeypatch.setattr(pytest, "main", pytest_main)
        status = command.main([*options, "--json", str(folder / "out.json")])
        said = capsys.readouterr()
        return status, said.out + said.err

    yield run
    yours.GIVEN.clear()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--provider", "my_kernels:bias_gelu"], "--provider must be NAME=MODULE:FUNCTION, got 'my_kernels:"),
        (["--provider", "my-own=my_kernels:bias_gelu"], "that no other provider has, got 'my-own'"),
        (["--provider", "torch=my_kernels:bias_gelu"], "that no other provider has, got 'torch'"),
        (["--provider", "a=my_kernels:bias_gelu"] * 2, "that no other provider has, got 'a'"),
        (["--provider", "a=no_such_module:f"], "must be an importable module:function, got no_such_module:f"),
        (["--provider", "a=my_kernels:f"], "must be an importable module:function, got my_kernels:f: Attrib"),
        (["--provider", "a=my_kernels"], "must be an importable module:function, got my_kernels: "),
        (["--provider", "a=my_kernels:number"], "must name a function, got my_kernels:number of type int"),
        (["--provider", "a=my_kernels:tanh"], "got my_kernels:tanh; name the op by --only, one of mask_"),
        (["--provider", "a=my_kernels:another", "--only", "bias_gelu"], "which also requires table"),
        (["--provider", "a=my_kernels:bias_gelu", "--adapter", "x"], "adapter of bias_gelu must be a functi"),
        (["--provider", "a=my_kernels:bias_gelu", "--adapter", "x:y"], "--adapter must be an importable mod"),
        (["--adapter", "sdpa"], "--adapter must be given with --provider, got sdpa without it"),
    ],
)
def test_a_wrong_spelling_gets_a_sentence_before_anything_is_timed(options, sentence, main):
    status, said = main(*options)
    assert status == 2 and sentence in said


def run_of(seconds, mine="my_kernels:bias_gelu"):
    """Return the results of a run on this machine in which a provider of a user needed `seconds`."""
    group = GROUP.replace("embed", "bias_gelu")
    found = [
        fake_benchmark(group, "fused", 0.002, {"torch": 2.0, "mine": seconds / 0.002}),
        fake_benchmark(group, "torch", 0.004, {"fused": 0.5, "mine": seconds / 0.004}),
        fake_benchmark(group, "mine", seconds, {"fused": 0.002 / seconds, "torch": 0.004 / seconds}),
    ]
    found[2]["extra_info"]["yours"] = mine
    facts = {"yours": {"mine": mine}, "machine_info": RESULT["machine_info"] | machine.info()}
    return copy.deepcopy(RESULT) | facts | {"benchmarks": found, "wrong": []}


@pytest.mark.parametrize(
    ("seconds", "word", "status"), [(0.004, "slower", 1), (0.002, "faster", 0), (0.003, "", 0)]
)
def test_a_baseline_tells_whether_yours_got_slower(seconds, word, status, folder, main):
    (folder / "before.json").write_text(json.dumps(run_of(0.003)))
    mine = ["--provider", "mine=my_kernels:bias_gelu", "--baseline", str(folder / "before.json")]
    got, said = main(*mine, timed=run_of(seconds))
    row = said.splitlines()[-3]
    assert got == status and row.split()[:2] == ["mine", "3.00"] and row.split()[-1] == (word or "1.33")
    assert said.splitlines()[-1].startswith(f"{status} of 3 got slower")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (None, "before.json must be readable, got 'No such file or directory'"),
        (lambda run: "{", "before.json must be complete JSON"),
        (
            lambda run: run | {"machine_info": run["machine_info"] | {"device_name": "Another"}},
            "compare: device_n",
        ),
        (
            lambda run: run | {"wrong": ["bias_gelu, small, forward, mine: y"]},
            "results must be right",
        ),
        (lambda run: run | {"benchmarks": RESULT["benchmarks"]}, "--baseline must contain bias_gelu, got "),
    ],
)
def test_a_baseline_that_cannot_be_compared_is_refused_before_the_run(change, sentence, folder, main):
    if change:
        changed = change(run_of(0.003))
        (folder / "before.json").write_text(changed if isinstance(changed, str) else json.dumps(changed))
    mine = ["--provider", "mine=my_kernels:bias_gelu", "--baseline", str(folder / "before.json")]
    status, said = main(*mine)
    assert status == 2 and sentence in said


def test_a_provider_that_is_not_in_the_lists_is_on_the_page():
    result = run_of(0.003)
    assert list(runs.groups(result)["bias_gelu, small, forward+backward"]) == ["fused", "torch", "mine"]
    shown = Page(page.page([result], "")).tables
    assert ["bias_gelu, small, forward+backward", "mine"] in [row[:2] for row in shown["Everything"]]
    assert "</svg>mine</li>" in page.page([result], ""), "in a legend"
    assert set(svg.YOURS).isdisjoint(svg.STYLES.values()) and svg.style("mine") in svg.YOURS


def test_the_example_is_right(seed):
    testing.check_op("attention", attention, seed=seed)
