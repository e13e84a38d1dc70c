"""The benchmark harness: what it measures with, what it refuses, and what it prints."""

import contextlib
import json
import os
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))  # the harness is not installed

from benchmarks import clock, conftest, gate, machine, providers, rivals, runner, tune
from benchmarks.cases import BOTH, Call, Case, OpCase, sdpa_backend
from benchmarks.inputs import SIZES
from benchmarks.report import markdown, numbers, runs, text
from electra_fast import reference, testing
from electra_fast.kernels import attention as kernels
from electra_fast.testing.baseline import TORCH

ROOT = Path(__file__).parents[1]
SIZE = next(iter(SIZES))


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
    on_cuda = object.__new__(clock.CUDA)  # its L2 is that of no GPU
    timed = on_cuda.prepare(waits)
    assert timed.run is waits
    assert timed.how.endswith("capture failed: operation not permitted when stream is capturing")
    timed = on_cuda.prepare(lambda: None)
    assert timed.run == "replay" and timed.how == "graph replay, cold L2"


GELU = {"x": torch.linspace(-4, 4, 96).view(12, 8), "bias": torch.linspace(-1, 1, 8)}
MASK = {
    "ids": torch.arange(200, 456).view(4, 64),
    "candidates": torch.ones(4, 64, dtype=torch.bool),
    "key_mask": torch.arange(64) < torch.tensor([[64], [40], [7], [1]]),
    "rng": torch.tensor([0, 1]),
    "mask_id": 103,
}


def test_the_gate_lets_the_baselines_pass():
    gate.Gate("bias_gelu", GELU, ("x", "bias")).check(TORCH.bias_gelu)
    gate.Gate("mask_tokens", MASK, ()).check(TORCH.mask_tokens)


def test_the_gate_tells_errors_beside_what_is_allowed():
    found = gate.Gate("bias_gelu", GELU, ("x", "bias")).check(
        lambda x, bias: F.gelu(x + bias) * (1 + 2.0**-20)
    )
    assert set(found) == {"result", "gradient of x", "gradient of bias"}
    error, allowed = found["result"]
    assert error < allowed < 2.0**-16
    assert error == pytest.approx(2.0**-20 * F.gelu(GELU["x"] + GELU["bias"]).abs().max().item(), rel=0.2)


def test_the_spread_is_of_the_ratios_round_by_round():
    drifting = [1.0, 2.0, 4.0, 8.0, 16.0]
    assert runner.spread([3 * t for t in drifting], drifting) == (3.0, 3.0)
    assert runner.spread([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [1.0] * 6) == (2.0, 5.0)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x, bias: F.gelu(x + bias, approximate="tanh"),
        lambda x, bias: F.gelu(x + bias.detach()) + 0 * bias.sum(),
        lambda x, bias: F.gelu(x + bias).bfloat16().float(),
        lambda x, bias: F.gelu(x + bias) * torch.nan,
    ],
)
def test_the_gate_refuses_other_work(wrong):
    with pytest.raises(AssertionError):
        gate.Gate("bias_gelu", GELU, ("x", "bias")).check(wrong)


@pytest.mark.parametrize("change", [{"mask_prob": 0.3}, {"key_mask": torch.ones(4, 64, dtype=torch.bool)}])
def test_the_gate_refuses_other_masks(change):
    with pytest.raises(AssertionError):
        gate.Gate("mask_tokens", MASK, ()).check(lambda **args: reference.mask_tokens(**args | change))


HEAD = ("x", "table", "bias")


@pytest.fixture
def head():
    """Arguments of `mlm_head`: a quarter of the slots unused, two pieces of the gate's."""
    g, slots = torch.Generator().manual_seed(0), gate.SLOTS + 100
    shapes = {"x": (slots, 16), "table": (300, 16), "bias": (300,)}
    args = {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
    args["targets"] = torch.randint(300, (slots,), generator=g)
    args["weights"] = (torch.arange(slots) % 4 != 1).float()
    return args | {"rng": torch.tensor([0, 1])}


def test_the_definition_in_pieces_is_the_definition(head):
    example = gate.Gate("mlm_head", head, HEAD).example.to(torch.float64)
    (got, got_gradients), (ref, ref_gradients) = gate.pieces(example), gate.whole(example)
    for name in ("loss", "lse", "correct"):
        torch.testing.assert_close(got[name], ref[name], check_dtype=False)
    assert set(got_gradients) == set(ref_gradients) == set(HEAD)
    for name in HEAD:
        torch.testing.assert_close(got_gradients[name], ref_gradients[name])


@pytest.mark.parametrize("name", ["attention", "attention_qkv"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_attention_by_sequences_is_the_definition(name, packed, monkeypatch):
    g, B, L, H, D = torch.Generator().manual_seed(0), 7, 12, 2, 8
    bounds = torch.tensor([0, 12, 12, 15, 27, 28, 35, 46], dtype=torch.int32)
    key_mask = torch.rand(B, L, generator=g) > 0.3
    site = {"cu_seqlens": bounds, "max_seqlen": L} if packed else {"key_mask": key_mask}
    names, heads = (("qkv",), (3, H, D)) if name == "attention_qkv" else (("q", "k", "v"), (H, D))
    shape = (46, *heads) if packed else (B, L, *heads)
    args = {x: torch.randn(shape, generator=g) for x in names} | site
    example = gate.Gate(name, args, names).example.to(torch.float64)
    ref, ref_gradients = gate.whole(example)

    monkeypatch.setattr(gate, "SCORES", 3 * H * L * L)  # of three sequences
    calls, define = [], getattr(reference, name)
    monkeypatch.setattr(reference, name, lambda **args: calls.append(1) or define(**args))
    got, got_gradients = gate.sequences(example)
    assert len(calls) == 2 * 3, "three pieces, each computed again for its gradient"
    torch.testing.assert_close(got, ref)
    torch.testing.assert_close(got_gradients, ref_gradients)
    assert set(got_gradients) == set(names)


@pytest.mark.parametrize("rival", ["linear_ce", "linear_ce_chunked"])
def test_the_gate_lets_a_rival_leave_out_what_it_has_not(rival, head, monkeypatch):
    monkeypatch.setattr(rivals, "LOGITS", 300 * 500)  # three chunks
    try:
        gate.Gate("mlm_head", head, HEAD).check(rivals.RIVALS[rival])
    except ImportError as missing:
        pytest.skip(str(missing))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda head: head._replace(loss=head.loss * 1.01),
        lambda head: head._replace(loss=head.loss.detach()),
        lambda head: head._replace(samples=None),
        lambda head: head._replace(samples=head.samples + 300),
        lambda head: head._replace(samples=head.samples[1:]),
        lambda head: head._replace(lse=head.lse + 1),
    ],
)
def test_the_gate_refuses_a_rival_s_other_work(wrong, head):
    check = gate.Gate("mlm_head", head, HEAD).check
    check(lambda **args: TORCH.mlm_head(**args)._replace(correct=None, lse=None))
    with pytest.raises(AssertionError):
        check(lambda **args: wrong(TORCH.mlm_head(**args)))


def test_a_rival_draws_from_the_softmax():
    torch.manual_seed(0)
    x, table, bias = torch.ones(20_000, 1), torch.zeros(4, 1), torch.tensor([0.1, 0.2, 0.3, 0.4]).log()
    share = torch.bincount(rivals.draw(x, table, bias), minlength=4) / len(x)
    assert (share - bias.exp()).abs().max() < 0.015  # four standard deviations


def test_a_rival_that_is_missing_is_dropped_by_name(head, monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    monkeypatch.delattr(F, "linear_cross_entropy", raising=False)
    losses = {"liger": rivals.liger, "linear_ce": rivals.linear_ce}
    functions = {name: rivals.with_a_draw(loss) for name, loss in losses.items()}
    case = OpCase("mlm_head", None, SIZES[SIZE], BOTH, functions)
    case.call = Call(head, "FLOP/s", 1, 1, HEAD)
    run = runner.Runner(60.0, time.monotonic())
    for name, why in (("liger", "liger_kernel"), ("linear_ce", "no torch.nn.functional.linear")):
        with pytest.raises(pytest.skip.Exception, match=f"^dropped: .*, {name}: .*{why}"):
            run.report(Benchmark(), case, name)


def test_every_rival_has_a_label_and_comes_late():
    assert set(rivals.RIVALS) <= set(providers.RIVALS) <= set(providers.LATE) & set(providers.LABELS)
    assert set(providers.RIVALS) <= set(providers.ORDER) and providers.ORDER[-1] == "reference"


def test_the_sizes_that_one_op_has_do_without_the_reference():
    sizes = SIZES[SIZE], SIZES[SIZE]._replace(name="larger")
    common, own = (OpCase("mlm_head", None, size, BOTH, rivals.RIVALS) for size in sizes)
    assert own.name == "mlm_head, larger, forward+backward"
    assert own.providers == ("fused", "torch", *rivals.RIVALS, "compile")
    assert set(common.providers) == {*own.providers, "reference"}


class Fake(Case):
    """One right provider, one wrong, one that raises."""

    name, providers = "fake, small, forward", ("fused", "wrong", "broken")
    headline = providers
    seconds = 0.01

    def prepare(self, provider):
        if provider == "wrong":
            gate.Gate("bias_gelu", GELU, ("x",)).check(lambda x, bias: F.gelu(x))
        return (lambda: 1 / 0) if provider == "broken" else (lambda: F.gelu(GELU["x"]))

    def info(self, provider):
        return {"op": "fake", "unit": "B/s", "work": 768}


class Benchmark(types.SimpleNamespace):
    """What the runner uses of pytest-benchmark's fixture."""

    def __init__(self):
        super().__init__(extra_info={}, group=None, samples=[], stats=types.SimpleNamespace(stats=None))

    def pedantic(self, function, rounds):
        for _ in range(rounds):
            start = runner.CLOCK()
            function()
            self.samples.append(runner.CLOCK() - start)


def test_a_wrong_provider_gets_a_word_and_no_number(monkeypatch):
    run, benchmark = runner.Runner(60.0, time.monotonic()), Benchmark()
    monkeypatch.setattr(run.clock, "peak_bytes", lambda function: 0)
    run.report(benchmark, Fake(), "fused")
    assert len(benchmark.samples) >= Fake.rounds[0] and min(benchmark.samples) > 0
    assert benchmark.extra_info["ratio"] == {}, "there is nothing to compare with"
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
    with pytest.raises(pytest.UsageError, match="no speeds"):
        conftest.refuse_the_interpreter()


def fake_benchmark(group, provider, seconds, ratio):
    extra = {"provider": provider, "p20": seconds, "p80": seconds, "host": seconds, "ratio": ratio}
    extra |= {"unit": "B/s", "work": 10**6, "peak_bytes": 10**6, "how": "CPU time"}
    extra |= {
        "op": runs.case(group).op,
        "size": runs.case(group).size,
        "served_by": "reference" if provider == "fused" else None,
    }
    return {"group": group, "extra_info": extra, "stats": {"median": seconds, "rounds": 5}}


GROUP = "embed, small, forward+backward"
RESULT = {
    "machine_info": {
        "device": "cpu", "device_name": "A CPU", "threads": 2, "cpu_capability": "AVX2", "torch": "2.13.0",
        "sources": "abc",
    },
    "datetime": "2026-11-23T08:00:00",
    "benchmarks": [
        fake_benchmark(GROUP, "torch", 0.004, {"fused": 0.5}),
        fake_benchmark(GROUP, "fused", 0.002, {"torch": 2.0}),
        fake_benchmark(GROUP, "compile", 0.006, {"fused": 0.5}),
        fake_benchmark("mlm_head, small, forward", "fused", 1.5, {}),
    ],
    "wrong": ["rtd_loss, small, forward, reference: loss: 1 from float64"],
    "fails": [],
    "dropped": ["mlm_head, small, forward, compile: needs 240 s, 9 s are left"],
    "budget": 240.0,
    "seconds": 99.5,
}  # fmt: skip


def test_the_table_has_every_case_and_says_what_is_missing():
    lines = text.table(RESULT).splitlines()
    assert lines[0] == "A CPU (2 threads, AVX2), 2026-11-23, torch 2.13.0"
    rows = {line.split()[0]: line for line in lines if line.startswith("  ")}
    assert "2.00" in rows["fused"] or "1 500" in rows["fused"]
    assert rows["torch"].split()[1:] == "4.00 4.00 - 4.00 4 000 250 MB/s 1.00 2.00x as fast".split()
    assert rows["torch.compile"].endswith("2.00x as fast (then 3.00)")
    wrong = lines[lines.index("rtd_loss, small, forward") + 1]
    assert wrong.split() == ["reference", "wrong"]
    assert "without a kernel here, so that fused is plain PyTorch: embed, mlm_head" in lines
    assert "no time was left for 1 numbers; make bench BUDGET=360 measures them too" == lines[-2], (
        "the command for what was dropped"
    )


def test_the_markdown_says_whether_kernels_changed_since():
    assert "changed" not in markdown.tables(RESULT, "abc")
    shown = markdown.tables(RESULT, "abd")
    assert "kernels changed since" in shown
    assert "| embed | small | 2.00 | 2.00 |" in shown and "fused, ms" not in shown  # no time from a CPU
    assert "| rtd_loss | small |  |  |" in shown


def test_the_readme_s_tables_are_replaced_and_nothing_else(tmp_path):
    readme, results = tmp_path / "README.md", tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    assert markdown.update_readme(readme, tmp_path) == 1, "no results, no README"
    (results / "cpu.json").write_text(json.dumps(RESULT))
    readme.write_text(f"before\n{markdown.BEGIN}\nold\n{markdown.END}\nafter\n")
    assert markdown.update_readme(readme, tmp_path) == 0
    shown = readme.read_text()
    assert markdown.update_readme(readme, tmp_path) == 0 and readme.read_text() == shown
    assert shown.startswith("before\n") and shown.endswith("\nafter\n")
    assert "old" not in shown and "A CPU" in shown


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
    # As from a shell: in what looks like a worker of pytest-xdist, pytest-benchmark measures nothing.
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
    readme = (ROOT / "README.md").read_text()
    for file in runs.files():
        table = markdown.tables(json.loads(file.read_text()), machine.source_hash())
        assert table in readme, "run `python -m benchmarks report`"


@pytest.mark.skipif(not testing.interpreted(), reason="a GPU may take any shape")
def test_tuning_ranks_what_runs_and_leaves_the_tables_alone():
    row = tune.Row("DKDV", 2, torch.float32, 16, 40)
    before, times = list(kernels.DKDV), iter([3.0, 2.0, 1.0, 1.0])

    def clock(function):
        function()
        return next(times)

    shapes = [(16, 32, 4, 1), (32, 32, 4, 1)]
    assert tune.ranked(row, shapes, clock, 1, 1) == [(2.0, shapes[1]), (5.0, shapes[0])]

    def too_large(function):
        raise tune.OutOfResources(2, 1, "shared memory")

    assert tune.ranked(row, shapes, too_large, 1, 1) == []
    assert before == kernels.DKDV
    for row in tune.rows():
        assert getattr(kernels, row.table)[row.key] in row.candidates(), row


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
