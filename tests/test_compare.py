"""The comparison of two results: it finds regressions, ignores drift, and refuses what is not comparable."""

import copy
import json
import subprocess

import pytest
from fake_runs import GROUP, RESULT, ROOT, fake_benchmark

from benchmarks import __main__ as command
from benchmarks.harness import commits


def result(fused=0.002, torch=0.004):
    """Return a result with one case and nothing wrong."""
    benchmarks = [
        fake_benchmark(GROUP, "fused", fused, {"torch": torch / fused}),
        fake_benchmark(GROUP, "torch", torch, {"fused": fused / torch}),
    ]
    for benchmark in benchmarks:
        extra = benchmark["extra_info"]
        extra["p20"], extra["p80"] = 0.98 * extra["p20"], 1.02 * extra["p80"]
        benchmark["fullname"] = extra["provider"]
    return copy.deepcopy(RESULT) | {"benchmarks": benchmarks, "wrong": []}


@pytest.fixture
def compared(tmp_path, capsys):
    def compare(before, after, *options):
        files = [tmp_path / "a.json", tmp_path / "b.json"]
        for file, content in zip(files, (before, after), strict=True):
            file.write_text(content if isinstance(content, str) else json.dumps(content))
        status = command.main(["compare", *map(str, files), *options])
        said = capsys.readouterr()
        return status, said.out + said.err

    return compare


@pytest.mark.parametrize(
    ("after", "options", "status"),
    [
        (result(), [], 0),
        (result(fused=0.0023), [], 1),
        (result(fused=0.0023), ["--threshold", "20%"], 0),
        (result(fused=0.0023), ["--threshold", "0.1"], 1),
        (result(fused=0.00206), ["--threshold", "1%"], 0),  # the spreads overlap
        (result(fused=0.0023, torch=0.0046), [], 0),  # the whole machine is slower
        (result(torch=0.003), [], 0),  # only torch changed
        (result(fused=0.0015), [], 0),
    ],
)
def test_only_what_is_slower_beyond_both_spreads_fails(after, options, status, compared):
    got, said = compared(result(), after, *options)
    assert got == status, said
    assert f"{status} of 2 got slower" in said
    assert ("  slower" in said) == bool(status)
    row = next(line for line in said.splitlines() if line.startswith("  fused"))
    assert "2.00 (1.96 - 2.04)" in row and "2.00 -> " in row


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("device_name", "Another"),
        ("threads", 4),
        ("cpu_capability", "AVX512"),
        ("torch", "2.14"),
        ("device", "h200"),
    ],
)
def test_other_machines_are_refused(key, value, compared):
    other = result()
    other["machine_info"][key] = value
    status, said = compared(result(), other)
    assert status == 2 and f"compare: {key} must be the same in both" in said and repr(value) in said


def test_what_is_wrong_torn_of_another_schema_or_apart_is_refused(compared):
    wrong = result() | {"wrong": ["embed, small, forward, torch: y: 1 from float64"]}
    apart = result()
    for benchmark in apart["benchmarks"]:
        benchmark["group"] = "linear, small, forward"
    for other, sentence in (
        (wrong, "results must be right"),
        (json.dumps(result())[:-9], "must be complete JSON"),
        (result() | {"schema": 0}, "must have schema 1, got 0"),
        (apart, "must have a case in common, got none"),
        ("{}", "must be a run"),
    ):
        status, said = compared(result(), other)
        assert status == 2 and sentence in said
    assert command.main(["compare"]) == 2


def test_what_one_result_lacks_is_named(compared):
    more = result()
    more["benchmarks"].append(fake_benchmark("linear, small, forward", "fused", 1.0, {}))
    status, said = compared(result(), more)
    assert status == 0 and "only after: linear, small, forward, fused" in said


def test_several_processes_make_one_result_whose_spread_holds_all():
    merged = commits.merged([result(), result(fused=0.003), result(fused=0.0024)])
    fused = merged["benchmarks"][0]
    assert fused["stats"]["median"] == 0.0024
    assert fused["extra_info"]["p20"] == pytest.approx(0.98 * 0.002)
    assert fused["extra_info"]["p80"] == pytest.approx(1.02 * 0.003)
    assert fused["extra_info"]["ratio"]["torch"] == pytest.approx(0.004 / 0.0024)


def test_a_commit_that_is_none_is_refused(capsys):
    assert command.main(["compare", "--base", "no-such-commit"]) == 2
    assert "compare: git rev-parse" in capsys.readouterr().err


def test_red_tests_stop_a_comparison_and_leave_nothing_behind(monkeypatch, tmp_path, capsys):
    """A tree whose tests fail is not timed; the worktree is gone afterwards."""
    before = subprocess.check_output(["git", "worktree", "list"], cwd=ROOT, text=True)
    said = []

    def run(tree, *arguments):
        said.append((tree.name.split()[0], arguments))
        if "--collect-only" in arguments:
            return "benchmarks/bench_rtd_loss.py::bench_rtd_loss[small]"
        if arguments[:3] == ("-m", "pytest", "-q"):
            raise ValueError("compare: `python -m pytest` must pass")
        return ""

    monkeypatch.setattr(commits.Tree, "run", run)
    monkeypatch.setattr(commits.tempfile, "tempdir", str(tmp_path))
    assert command.main(["compare", "--base", "HEAD", "--only", "rtd_loss"]) == 2
    assert "must pass" in capsys.readouterr().err
    assert said[-1] == ("HEAD", ("-m", "pytest", "-q", "-x", "tests/test_rtd_loss.py"))
    assert not any("--budget" in " ".join(arguments) for _, arguments in said)
    assert subprocess.check_output(["git", "worktree", "list"], cwd=ROOT, text=True) == before
    assert not list(tmp_path.iterdir())
