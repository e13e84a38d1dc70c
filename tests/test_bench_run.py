"""A run of the benchmarks: its order, its budget, its progress, and where its results go."""

import contextlib
import copy
import json
import os
import subprocess
import termios
import time
from importlib import import_module

import pytest
import torch
from fake_runs import RESULT, ROOT, SIZE, Benchmark, Fake
from pytest_benchmark.stats import Stats

from benchmarks import __main__ as command
from benchmarks.gpu import command as gpu
from benchmarks.harness import clock, machine, providers, runner
from benchmarks.harness.cases import BOTH, Round
from benchmarks.harness.progress import Progress
from benchmarks.report import commit, markdown, numbers, text
from electra_fast import testing


def test_the_headline_of_an_op_is_measured_even_when_the_budget_is_spent(monkeypatch):
    run, benchmark = runner.Runner(0.0, time.monotonic()), Benchmark()
    monkeypatch.setattr(run.clock, "peak_bytes", lambda function: 0)
    run.report(benchmark, Fake(), "fused", Round.OPS)
    assert len(benchmark.samples) == Fake.rounds[0] and min(benchmark.samples) > 0


@pytest.mark.parametrize("when", [Round.STEP, Round.OTHERS])
def test_a_step_that_is_ready_as_the_budget_ends_is_timed(when, monkeypatch):
    run, benchmark = runner.Runner(60.0, time.monotonic()), Benchmark()
    monkeypatch.setattr(run.clock, "peak_bytes", lambda function: 0)

    def ready(function):
        run.deadline = time.monotonic()
        return clock.Timed(function, "", function)

    monkeypatch.setattr(run.clock, "prepare", ready)
    if when is Round.STEP:
        run.report(benchmark, Fake(), "fused", when)
        assert len(benchmark.samples) == Fake.rounds[0]
    else:
        with pytest.raises(pytest.skip.Exception, match=r"dropped: .*fused: needs"):
            run.report(benchmark, Fake(), "fused", when)


def test_a_run_has_each_op_once_then_the_step_then_the_rest():
    files = sorted((ROOT / "benchmarks").glob("bench_*.py"))
    benches = {f.stem: getattr(import_module(f"benchmarks.{f.stem}"), f.stem, None) for f in files}
    # A candidate in Triton is timed on a GPU only.
    plans = {n.removeprefix("bench_"): list(b.runs.values()) for n, b in benches.items() if b is not None}
    for op in testing.OPS:
        first = [run for run in plans[op] if run.round is Round.OPS]
        passes = "forward" if op.endswith("_tokens") else BOTH
        assert [run[:3] for run in first] == [(SIZE, passes, "fused"), (SIZE, passes, "torch")]
    by_round = {
        when: {n for n, plan in plans.items() if when in {run.round for run in plan}} for when in Round
    }
    assert by_round[Round.OPS] == set(testing.OPS) and by_round[Round.STEP] == {"step"}
    rounds = {(run.provider, run.round) for plan in plans.values() for run in plan}
    late = {when for provider, when in rounds if provider in providers.LATE}
    assert late == {Round.RIVALS, Round.DEFINITIONS}, "the long cases of inference are after the rivals"
    assert {when for provider, when in rounds if provider == "reference"} == {Round.DEFINITIONS}
    assert sorted(Round) == [Round.OPS, Round.STEP, Round.OTHERS, Round.RIVALS, Round.DEFINITIONS]


class Pair(Fake):
    """Two right providers; the first times of one are noisy."""

    providers = headline = ("fused", "torch")
    rounds = (2, 2)


def test_what_the_budget_leaves_goes_to_the_least_precise_ratio(monkeypatch):
    run, shown, case = runner.Runner(60.0, time.monotonic()), {p: Benchmark() for p in Pair.headline}, Pair()
    prepare, noise = run._prepare, [1.0, 3.0]

    def prepared(case, provider):
        timed = prepare(case, provider)
        timed.how = provider
        return timed

    def sample(timed):
        late = noise.pop(0) if noise and timed.how == "torch" else 2.0
        timed.times.append(1.0 if timed.how == "fused" else late)
        timed.host.append(1.0)

    monkeypatch.setattr(run, "_prepare", prepared)
    monkeypatch.setattr(run.clock, "sample", sample)
    monkeypatch.setattr(run.clock, "peak_bytes", lambda function: 0)
    for provider, benchmark in shown.items():
        run.report(benchmark, case, provider)
        benchmark.stats.stats = Stats()
    assert shown["fused"].extra_info["spread"]["torch"] == pytest.approx((1.4, 2.6))
    run.sharpen()
    low, high = shown["torch"].extra_info["spread"]["fused"]
    again = len(shown["torch"].stats.stats.data)
    assert again > 2 and numbers.standard_error((low, high), again) <= runner.PRECISE
    assert shown["torch"].stats.stats.median == 2.0 and shown["torch"].extra_info["ratio"]["fused"] == 0.5

    spent = runner.Runner(0.0, time.monotonic())
    spent.headlines, spent.results = run.headlines, run.results
    spent.sharpen()
    assert len(run.results[case.name, "torch"].timed.times) == again, "the budget is spent"


def test_a_standard_error_is_that_of_a_median():
    g, rounds = torch.Generator().manual_seed(0), 25
    samples = 1 + 0.1 * torch.randn(4000, rounds, generator=g, dtype=torch.float64)
    of_medians = samples.median(1).values.std().item()
    bounds = (clock.quantile(samples.flatten().tolist(), q) for q in (0.2, 0.8))
    assert numbers.standard_error(tuple(bounds), rounds) == pytest.approx(of_medians, rel=0.1)


def test_progress_is_a_line_every_ten_seconds_and_a_bar_on_a_terminal(capfd):
    now = time.monotonic()
    progress = Progress(240.0, now - 5)
    progress.total = 107
    for what in ("embed is timed", "linear is timed"):  # the second follows within ten seconds
        progress.say(what)
    progress.close()
    assert capfd.readouterr().err == "   5 s, 235 s left: 0 of 107, embed is timed\n"

    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    progress = Progress(240.0, now - 300, os.fdopen(theirs, "w", buffering=1))
    progress.say("linear is timed")
    progress.close()
    said = b""
    with contextlib.suppress(OSError):  # the other end is closed
        while part := os.read(ours, 1000):
            said += part
    os.close(ours)
    said = said.decode()
    assert "0 of 0, linear is timed |" in said and "the budget is spent" in said


def test_results_of_a_run_go_where_git_ignores_them(monkeypatch):
    monkeypatch.delenv("OUT", raising=False)
    whole = command.results_file(command.parser().parse_args([]), "cpu")
    assert whole == ROOT / "build" / "bench" / "cpu.json"
    part = command.results_file(command.parser().parse_args(["--only", "embed"]), "cpu")
    assert part.name == "cpu.json" and not part.is_relative_to(ROOT)
    part.parent.rmdir()
    if (ROOT / ".git").exists():
        for file in (whole, gpu.RESULTS / "h200.json"):
            assert subprocess.run(["git", "check-ignore", "-q", file], cwd=ROOT).returncode == 0


def test_the_end_of_a_run_has_a_line_per_case():
    lines = text.summary(RESULT).splitlines()
    assert lines[4].split() == "embed, small 2.00 torch 4.00 2.00x as fast 5".split()
    assert lines[5].split() == "3.00 torch.compile 6.00 2.00x as fast 5".split()
    assert lines[6].split() == "mlm_head, small 1 500 5".split()
    assert "wrong: rtd_loss, small, forward, reference: loss: 1 from float64" in lines
    precise = copy.deepcopy(RESULT)
    precise["benchmarks"][0]["extra_info"]["spread"] = {"fused": (0.4, 0.6)}
    assert text.summary(precise).splitlines()[4].endswith("2.00x as fast  ± 13.3%       5")
    several = RESULT | {"only": "mlm", "dropped": ["a, b, c, liger: no liger", "a, b, d, liger: no liger"]}
    assert text.dropped(several) == ["absent: Liger: no liger"]
    several["dropped"] = RESULT["dropped"] * 2
    (line,) = text.dropped(several)
    assert "for 2 numbers; python -m benchmarks --only 'mlm' --budget 600" in line


@pytest.fixture
def repository(tmp_path):
    """Return a git checkout with kernels, a README and no results, and a run of these kernels."""
    root = tmp_path / "checkout"
    (root / "kernels").mkdir(parents=True)
    (root / "benchmarks" / "results").mkdir(parents=True)
    (root / "kernels" / "embed.py").write_text("1")
    (root / "docs").mkdir()
    for name in markdown.PAGES:
        (root / name).write_text(f"{markdown.BEGIN}\n{markdown.END}\n")
    who = ("-c", "user.name=a", "-c", "user.email=a@b")
    for words in (["init", "-q"], ["add", "."], [*who, "commit", "-qm", "first"]):
        subprocess.run(["git", *words], cwd=root, check=True)
    machine_info = RESULT["machine_info"] | {"sources": machine.source_hash(root)}
    return root, RESULT | {"machine_info": machine_info}


def test_a_run_is_committed_from_a_clean_checkout_of_its_kernels(repository, tmp_path):
    (root, result), file = repository, tmp_path / "run.json"
    file.write_text(json.dumps(result))
    for _ in range(2):  # files that the first call wrote do not stop the second
        assert commit.commit(file, root) == 0
    assert json.loads((root / "benchmarks/results/cpu.json").read_text()) == result
    assert "A CPU" in (root / "README.md").read_text()
    assert "kernels have changed" not in (root / "README.md").read_text()


@pytest.mark.parametrize(
    ("change", "edit", "refusal"),
    [
        ({}, "kernels/embed.py", "must be clean, got changes in kernels/embed.py"),
        ({}, "kernels/new.py", "must be clean, got changes in kernels/new.py"),
        ({"only": "embed"}, None, "must be a whole run, got a part"),
        ({"quick": True}, None, "must be a whole run, got a part"),
        ({"machine_info": RESULT["machine_info"]}, None, "must be a run of the kernels of this commit"),
    ],
)
def test_what_says_nothing_of_this_commit_is_not_committed(change, edit, refusal, repository, tmp_path):
    (root, result), file = repository, tmp_path / "run.json"
    file.write_text(json.dumps(result | change))
    if edit:
        (root / edit).write_text("2")
    with pytest.raises(ValueError, match=refusal):
        commit.commit(file, root)
    assert not (root / "benchmarks/results/cpu.json").exists()
