"""The benchmark harness: its clock, its runner, its tables and its command line."""

import contextlib
import json
import os
import subprocess
import sys
import time
import types

import pytest
import torch
import torch.nn.functional as F
from fake_runs import RESULT, ROOT, SIZE, Benchmark, Fake

from benchmarks import conftest
from benchmarks.harness import clock, machine, runner, tune
from benchmarks.harness.cases import BOTH, Call, OpCase, sdpa_backend
from benchmarks.harness.inputs import SIZES
from benchmarks.report import markdown, numbers, picture, runs, text
from electra_fast import testing
from electra_fast.kernels import attention as kernels


def test_every_op_has_its_bench_file(op):
    assert f"def bench_{op}(" in (ROOT / "benchmarks" / f"bench_{op}.py").read_text()


def test_the_clock_moves_by_what_was_measured():
    now = clock.Clock()
    assert now() == now() == 0
    now.add(0.25)
    assert now() == 0.25
    assert clock.quantile([4.0, 1.0, 3.0, 2.0], 0.5) == 2.5
    assert clock.quantile([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 0.2) == 2.0


def test_rounds_are_interleaved_and_begin_in_turn():
    a, b, c = (clock.Timed(None, name, None) for name in "abc")
    seen = []
    clock.interleave([a, b, c], 3, lambda one: seen.append(one.how))
    assert "".join(seen) == "abc" + "bca" + "cab"


def test_no_more_rounds_once_there_are_enough():
    seen = []
    a = clock.Timed(None, "a", None)
    clock.interleave([a, a], 9, seen.append, enough=lambda done: done == 2)
    assert len(seen) == 4


def test_cpu_time_is_a_call_s_and_not_a_wait_s():
    timed = clock.CPU().prepare(lambda: time.sleep(0.01))
    timed.seconds = 0.01
    clock.CPU().sample(timed)
    assert timed.times[0] < 0.005 < timed.host[0]


def test_after_a_provider_that_cannot_be_captured_the_next_one_is(monkeypatch):
    def capture(function):
        if function is waits:
            raise RuntimeError("operation not permitted when stream is capturing\nmore of it")
        return "replay"

    def waits():
        pass

    stream = types.SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(clock, "cuda_graph", capture)
    on_cuda = object.__new__(clock.CUDA)  # without a buffer, whose size depends on the GPU
    timed = on_cuda.prepare(waits)
    assert timed.run is waits
    assert timed.how.endswith("capture failed: operation not permitted when stream is capturing")
    timed = on_cuda.prepare(lambda: None)
    assert timed.run == "replay" and timed.how == "graph replay, cold L2"


def test_the_spread_is_of_the_ratios_round_by_round():
    drifting = [1.0, 2.0, 4.0, 8.0, 16.0]
    assert runner.ratio_percentiles([3 * t for t in drifting], drifting) == (3.0, 3.0)
    assert runner.ratio_percentiles([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [1.0] * 6) == (2.0, 5.0)


def test_a_wrong_provider_gets_a_word_and_no_number(monkeypatch):
    run, benchmark = runner.Runner(60.0, time.monotonic()), Benchmark()
    monkeypatch.setattr(run.clock, "peak_bytes", lambda function: 0)
    run.report(benchmark, Fake(), "fused")
    assert len(benchmark.samples) >= Fake.rounds[0] and min(benchmark.samples) > 0
    assert benchmark.extra_info["ratio"] == {}, "no other provider to compare with"
    for provider, line in (("wrong", "wrong: fake, small, forward, wrong: "), ("broken", "fails: .*ZeroDiv")):
        with pytest.raises(pytest.fail.Exception, match=line):
            run.report(Benchmark(), Fake(), provider)


def test_what_no_time_is_left_for_is_dropped_by_name():
    run = runner.Runner(0.0, time.monotonic())
    with pytest.raises(pytest.skip.Exception, match="dropped: fake, small, forward, fused: needs 0 s"):
        run.report(Benchmark(), Fake(), "fused")


def test_triton_in_the_interpreter_is_never_timed(monkeypatch):
    assert "triton" not in OpCase("mlm_head", None, SIZES[SIZE], BOTH, {}).providers
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(conftest, "device", lambda: "cuda")
    with pytest.raises(pytest.UsageError, match="mean nothing"):
        conftest.refuse_the_interpreter()


def test_the_table_has_every_case_and_says_what_is_missing():
    lines = text.table(RESULT).splitlines()
    assert lines[0] == "A CPU (2 threads, AVX2), 2026-11-23, torch 2.13.0"
    rows = {line.split()[0]: line for line in lines if line.startswith("  ")}
    assert "2.00" in rows["fused"] or "1 500" in rows["fused"]
    assert rows["torch"].split()[1:] == "4.00 4.00 - 4.00 4 000 250 MB/s 1.00 2.00x as fast".split()
    assert rows["torch.compile"].endswith("2.00x as fast (then 3.00)")
    wrong = lines[lines.index("rtd_loss, small, forward") + 1]
    assert wrong.split() == ["reference", "wrong"]
    assert "without a kernel on this device, so fused runs plain PyTorch: embed, mlm_head" in lines
    assert lines[-2] == "the budget was too short for 1 numbers; make bench BUDGET=360 measures them too"


def test_the_markdown_says_whether_kernels_changed_since():
    assert "changed" not in markdown.tables(RESULT, "abc")
    shown = markdown.tables(RESULT, "abd")
    assert "kernels have changed since" in shown
    assert "| embed | small | 2.00 | 2.00 |" in shown and "fused, ms" not in shown  # no times of a CPU
    assert "| rtd_loss | small |  |  |" in shown


def test_the_readme_s_tables_are_replaced_and_nothing_else(tmp_path):
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    assert markdown.update(tmp_path) == 1, "no results"
    (results / "cpu.json").write_text(json.dumps(RESULT))
    assert markdown.update(tmp_path) == 1, "no documents"
    (tmp_path / "docs").mkdir()
    documents = [tmp_path / name for name in markdown.PAGES]
    for file in documents:
        file.write_text(f"before\n{markdown.BEGIN}\nold\n{markdown.END}\nafter\n")
    assert markdown.update(tmp_path) == 0
    shown = [file.read_text() for file in documents]
    assert markdown.update(tmp_path) == 0 and shown == [file.read_text() for file in documents]
    for page in shown:
        assert page.startswith("before\n") and page.endswith("\nafter\n")
        assert "old" not in page and "A CPU" in page
    assert sorted(f.name for f in results.glob("*.svg")) == ["cpu-dark.svg", "cpu-light.svg"]


def test_the_hash_changes_with_a_source(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "csrc" / "cuda").mkdir(parents=True)
    seen = {machine.source_hash(tmp_path)}
    for name, code in (("kernels/a.py", "1"), ("kernels/a.py", "2"), ("csrc/cuda/a.cu", "2")):
        (tmp_path / name).write_text(code)
        seen.add(machine.source_hash(tmp_path))
    (tmp_path / "kernels" / "a.py").rename(tmp_path / "kernels" / "b.py")
    assert len(seen | {machine.source_hash(tmp_path)}) == 5


def test_results_are_named_after_the_device():
    assert [machine.slug(name) for name in ("NVIDIA H200", "NVIDIA GeForce RTX 4090")] == ["h200", "rtx-4090"]


def benchmarks(*arguments):
    command = [sys.executable, "-m", "benchmarks", *map(str, arguments)]
    # Without these variables, which make pytest-benchmark measure nothing in a worker of pytest-xdist.
    shell = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return subprocess.run(command, cwd=ROOT, env=shell, capture_output=True, text=True, timeout=300)


def test_a_run_and_a_comparison(tmp_path):
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    name = f"bench_bias_gelu[{SIZE}-forward-torch]"
    done = benchmarks("--only", name, "--budget", 200, "--json", a)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"bias_gelu, {SIZE}, forward" in done.stdout and "1 numbers in" in done.stdout
    assert f"bias_gelu, {SIZE}, forward: fused is checked" in done.stderr, "what runs is shown"
    saved = json.loads(a.read_text())
    (one,) = saved["benchmarks"]
    assert one["stats"]["median"] > 0 and set(one["extra_info"]["ratio"]) == {"fused"}
    assert one["extra_info"]["peak_bytes"] > 0
    assert saved["machine_info"]["sources"] == machine.source_hash()
    assert saved["schema"] == runs.SCHEMA
    assert set(one["extra_info"]["errors"]) == {"result", "gradient of x", "gradient of bias"}
    low, high = one["extra_info"]["spread"]["fused"]
    assert 0 < low <= high

    b.write_text(a.read_text())
    done = benchmarks("compare", a, os.path.relpath(b, ROOT))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 of 1 got slower" in done.stdout


def test_the_readme_has_the_results_and_says_where_they_are_older_than_the_kernels():
    documents = {name: (ROOT / name).read_text() for name in markdown.PAGES}
    for file in runs.files():
        result = json.loads(file.read_text())
        for name, tables in markdown.PAGES.items():
            shown = tables(result, machine.source_hash())
            assert f"{shown}\n" in documents[name], "run `python -m benchmarks report`"
        for theme in picture.THEMES:
            drawn = file.with_name(f"{file.stem}-{theme}.svg").read_text()
            assert drawn == picture.ratios(result, theme), "run `python -m benchmarks report`"


@pytest.mark.skipif(not testing.interpreted(), reason="a GPU may support any shape")
def test_tuning_ranks_what_runs_and_leaves_the_tables_alone():
    shapes = [(16, 32, 4, 1), (32, 32, 4, 1)]
    entry = tune.of_attention("DKDV", 2, torch.float32, 16, 40, B=1, H=1)._replace(candidates=shapes)
    before, times = list(kernels.DKDV), iter([3.0, 2.0, 1.0, 1.0])

    def clock(function):
        function()
        return next(times)

    assert tune.ranked(entry, clock) == [(2.0, shapes[1]), (5.0, shapes[0])]

    def too_large(function):
        raise tune.OutOfResources(2, 1, "shared memory")

    assert tune.ranked(entry, too_large) == []
    assert before == kernels.DKDV
    for entry in (entry for entries in tune.ENTRIES.values() for entry in entries()):
        assert entry.current in entry.candidates, entry


@pytest.mark.skipif(not testing.interpreted(), reason="a GPU may support any shape")
@pytest.mark.parametrize("table", ["FORWARD", "DX"])
def test_tuning_runs_every_candidate_of_linear_gelu(table):
    entry = tune.of_linear_gelu(table, 0, torch.bfloat16, 24, 40, T=10)
    found = tune.ranked(entry, lambda function: function() and 1.0)
    assert [shape for _, shape in found] == sorted(entry.candidates)


def test_a_share_of_the_bound_is_told_where_the_bound_is_known(monkeypatch):
    call = Call({}, "FLOP/s", forward=10**12, backward=10**9, moved=(10**9, 10**12))
    assert (
        call.bound(BOTH) is None
        and numbers.rate({"work": 2e9, "unit": "B/s", "bound": None}, 1) == "2.00 GB/s"
    )
    monkeypatch.setattr(machine, "device_slug", lambda: "h200")
    assert call.bound("forward") == 10**12 / 790e12
    assert call.bound(BOTH) == 10**12 / 790e12 + 10**12 / 4.3e12
    assert numbers.rate({"work": 2e9, "unit": "B/s", "bound": 0.25}, 1) == "2.00 GB/s, 25%"


def test_every_gpu_with_a_bound_has_a_datasheet():
    assert set(machine.REACHED) == set(machine.DATASHEET)
    assert machine.bound(798e12, 1, "h100-80gb-hbm3") == machine.bound(1, 3e12, "h100-80gb-hbm3") == 1
    assert machine.bound(1, 1, "rtx-4090") is None


def test_the_backend_is_the_one_that_torch_chooses_for_these_arguments():
    q, k, v = (torch.randn(2, 16, 2, 8) for _ in range(3))
    call = Call({"q": q, "k": k, "v": v, "dropout": 0.1}, "FLOP/s", 1, 1, ("q", "k", "v"))
    case = OpCase("attention", lambda make: call, SIZES[SIZE], BOTH, {})
    assert case.info("torch")["backend"] == "math", "a CPU's flash attention has no dropout"
    call.args["dropout"] = 0.0
    assert case.info("torch")["backend"] == "flash"
    assert "backend" not in case.info("fused")
    assert sdpa_backend(lambda: F.gelu(q)) is None
